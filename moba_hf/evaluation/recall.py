"""Recall: how much of full attention's mass falls on the blocks that MoBA would select, by layer and by head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..config import MobaConfig
from ..ops import select_blocks
from .modes import attention

_RANGE = 2**25  # attention weights held at once: 128 MB in float32


@dataclass(frozen=True)
class Mass:
    """Share of full attention's mass within the sight of one query, averaged over queries; float32 [heads] each.

    All three count the own block and top_k − 1 past blocks; they differ in which.

    Attributes:
        selected: those that MoBA selects: the recall.
        recent: the latest ones, as a sliding window would.
        best: those with most mass: no selection gets more.
    """

    selected: torch.Tensor
    recent: torch.Tensor
    best: torch.Tensor


@dataclass(frozen=True)
class Suggestion:
    """Layers to keep in full attention, and why."""

    layers: tuple[int, ...]
    ground: str


def measure(
    model: PreTrainedModel, input_ids: torch.Tensor, settings: MobaConfig, queries: int = 512
) -> dict[int, Mass]:
    """Run one document in full attention and ask in every layer how much of its mass MoBA would have seen.

    Only queries that have more past blocks than they can select are counted: the others see everything.

    Args:
        model: any model; layers that are not plain causal attention (sliding windows) are left out.
        input_ids: int64 [1, length], one document.
        settings: block_size and top_k.
        queries: how many of them are looked at, evenly spread.

    Returns:
        Layer number → Mass.

    Raises:
        ValueError: as `sparse_from` does; or more than one document, or no layer could be measured.
    """
    length = input_ids.shape[1]
    if input_ids.shape[0] != 1:
        raise ValueError(f"input_ids must be one sequence [1, length], but was {tuple(input_ids.shape)}")
    sight = sparse_from(settings, length)
    positions = torch.linspace(sight, length - 1, min(queries, length - sight)).long()
    look = _Look(lambda query, key, scale: mass(query, key, positions, scale, settings))
    hooks = [
        module.register_forward_pre_hook(look.enter)
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and list(module.children())
    ]
    try:
        with torch.no_grad(), attention(model, "sdpa"), look:
            model(input_ids=input_ids.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    if not look.layers:
        raise ValueError("the model has no layer of plain causal attention that scaled_dot_product_attention computes")
    return look.layers


def sparse_from(settings: MobaConfig, length: int) -> int:
    """The first position of a document that has more past blocks than it can select.

    Raises:
        ValueError: the document is so short that MoBA would see all of it.
    """
    sight = settings.block_size * settings.top_k
    if length <= sight:
        raise ValueError(
            f"block_size · top_k = {sight} covers all {length} tokens: MoBA is full attention there; take longer text"
        )
    return sight


class _Look(TorchFunctionMode):
    """Sees every call of scaled_dot_product_attention, and measures those of plain causal attention by their layer."""

    def __init__(self, measure_layer: Callable[[torch.Tensor, torch.Tensor, float], Mass]):
        super().__init__()
        self.measure_layer, self.layer, self.layers = measure_layer, None, {}

    def enter(self, module, _args) -> None:
        self.layer = module.layer_idx

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and kwargs.get("is_causal"):
            query, key = args[:2]
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            self.layers[self.layer] = self.measure_layer(query[0].transpose(0, 1), key[0].transpose(0, 1), scale)
        return func(*args, **kwargs)


def mass(query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, scale: float, settings: MobaConfig) -> Mass:
    """Mass of one layer, over the queries at `positions`.

    Args:
        query: [length, heads, head_dim]. key: [length, kv_heads, head_dim].
        positions: int64 [queries], each with at least top_k past blocks.
        scale: on the scores before the softmax.
        settings: block_size and top_k.
    """
    length, heads, _ = query.shape
    selected = select_blocks(query, key, block_size=settings.block_size, top_k=settings.top_k)
    step = max(1, _RANGE // (heads * length))
    parts = [_shares(query, key, rows, scale, settings, selected) for rows in positions.to(query.device).split(step)]
    return Mass(*(torch.cat(column).mean(0).float().cpu() for column in zip(*parts, strict=True)))


def _shares(query, key, rows, scale, settings: MobaConfig, selected) -> tuple[torch.Tensor, ...]:
    """Shares (selected, recent, best) of the queries in `rows`: float32 [rows, heads] each."""
    heads, kv_heads = query.shape[1], key.shape[1]
    q = query[rows].float().unflatten(1, (kv_heads, heads // kv_heads))
    scores = torch.einsum("qhgd,khd->qhgk", q, key.float()).flatten(1, 2) * scale  # [rows, heads, keys]
    column = torch.arange(key.shape[0], device=key.device)
    weights = scores.masked_fill_(column > rows[:, None, None], float("-inf")).softmax(-1)
    by_block = _sum_blocks(weights, settings.block_size)
    own = (rows // settings.block_size)[:, None, None].expand(-1, heads, 1)
    slots = settings.top_k - 1
    own_mass = by_block.gather(-1, own).squeeze(-1)
    past = by_block.scatter(-1, own, 0.0)
    recent = own - 1 - torch.arange(slots, device=key.device)
    chosen = selected[rows].long()
    taken = past.gather(-1, chosen.clamp(min=0)).masked_fill(chosen < 0, 0)
    best = past.topk(min(slots, past.shape[-1]), dim=-1).values
    return tuple(own_mass + part.sum(-1) for part in (taken, past.gather(-1, recent.clamp(min=0)), best))


def _sum_blocks(weights: torch.Tensor, block_size: int) -> torch.Tensor:
    """[…, keys] → [..., blocks]: the last block may be short."""
    missing = -weights.shape[-1] % block_size
    return torch.nn.functional.pad(weights, (0, missing)).unflatten(-1, (-1, block_size)).sum(-1)


def check_number(number: int, layers: int) -> None:
    """ValueError where `number` of `layers` layers cannot be suggested."""
    if not 1 <= number <= layers:
        raise ValueError(f"suggest must be 1 … {layers}, the layers that can be measured, but was {number}")


def suggest(layers: dict[int, Mass], number: int) -> Suggestion:
    """The `number` layers where MoBA's selection misses most of full attention's mass, and the figures behind it.

    Raises:
        ValueError: as `check_number` does.
    """
    check_number(number, len(layers))
    recall = {layer: part.selected.mean().item() for layer, part in layers.items()}
    lowest = sorted(recall, key=lambda layer: (recall[layer], -layer))[:number]
    rest = [recall[layer] for layer in recall if layer not in lowest] or [float("nan")]
    figures = ", ".join(f"layer {layer} {recall[layer]:.3f}" for layer in lowest)
    return Suggestion(
        tuple(sorted(lowest)),
        f"lowest mean recall over heads: {figures}; all other layers {min(rest):.3f} to {max(rest):.3f}. Mass that is "
        f"missed need not raise the loss: compare the loss with scripts/eval_position_loss.py --hybrid_layers "
        f"{' '.join(map(str, sorted(lowest)))}. (The paper keeps the last three layers full.)",
    )


def to_dict(layers: dict[int, Mass]) -> dict[str, dict[str, list[float]]]:
    """As JSON can hold it."""
    return {
        str(number): {field.name: getattr(layers[number], field.name).tolist() for field in fields(Mass)}
        for number in sorted(layers)
    }


def from_dict(layers: dict[str, dict[str, list[float]]]) -> dict[int, Mass]:
    """The inverse of `to_dict`."""
    return {int(number): Mass(**{name: torch.tensor(x) for name, x in of.items()}) for number, of in layers.items()}


def average(measured: Sequence[dict[int, Mass]]) -> dict[int, Mass]:
    """The mean of several documents, layer by layer."""
    names = [field.name for field in fields(Mass)]
    return {
        layer: Mass(*(torch.stack([getattr(of[layer], name) for of in measured]).mean(0) for name in names))
        for layer in measured[0]
    }
