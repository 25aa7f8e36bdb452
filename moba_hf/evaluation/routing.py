"""Which past blocks each query chose, and by which gate scores: recorded from a real forward pass."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..ops import block_means


@dataclass(frozen=True)
class Routing:
    """The blocks that queries of one document selected.

    Attributes:
        positions: int64 [queries], ascending: which queries were kept.
        length: tokens of the document.
        layers: layer number -> int32 [queries, heads, slots]: block numbers, ascending, then −1; the own block is not
            listed. Holds the layers that ran sparse; empty where every layer attends everything.
    """

    positions: torch.Tensor
    length: int
    layers: dict[int, torch.Tensor]


@dataclass(frozen=True)
class Gate:
    """What one layer's gate saw of one document, and what it chose.

    Attributes:
        query: [length, heads, head_dim], in the model's dtype: as attention gets it, rotary embedding included.
        key: [length, kv_heads, head_dim], likewise.
        selected: int32 [length, heads, slots], as in `Routing`.
        block_size: tokens per block.
    """

    query: torch.Tensor
    key: torch.Tensor
    selected: torch.Tensor
    block_size: int

    def scores(self) -> torch.Tensor:
        """⟨query, mean key of the block⟩: float32 [length, heads, blocks]; −inf for blocks that are not past ones."""
        length, heads, _ = self.query.shape
        means = block_means(self.key, self.block_size).float()
        means = means.repeat_interleave(heads // self.key.shape[1], dim=1)  # [complete blocks, heads, head_dim]
        scores = torch.einsum("qhd,bhd->qhb", self.query.float(), means)
        own = torch.arange(length, device=scores.device) // self.block_size
        block = torch.arange(means.shape[0], device=scores.device)
        past = (block < own[:, None])[:, None]
        unfinished = -(-length // self.block_size) - means.shape[0]  # a short last block is nobody's past block
        return torch.nn.functional.pad(scores.masked_fill(~past, -torch.inf), (0, unfinished), value=-torch.inf)


def record_routing(model: PreTrainedModel, input_ids: torch.Tensor, queries: int = 1024) -> Routing:
    """Run one document through the model and keep what every layer selected for at most `queries` of its positions.

    The selection is taken from the operator as it is called, not computed again: it is what the layer attended.

    Args:
        model: a model with attn_implementation "moba".
        input_ids: int64 [1, length], one document.
        queries: positions kept, evenly spread: a million of them would fill the memory.
    """
    length = input_ids.shape[-1]
    positions = torch.linspace(0, length - 1, min(queries, length)).long()

    def keep(_layer, query, _key, _block_size, selected):
        return selected[positions.to(query.device)].cpu()

    return Routing(positions, length, _record(model, input_ids, keep))


def record_gates(model: PreTrainedModel, input_ids: torch.Tensor, layers: Collection[int]) -> dict[int, Gate]:
    """Run one document through the model and keep what the gate of each of these layers saw and chose.

    Args:
        model: a model with attn_implementation "moba".
        input_ids: int64 [1, length], one document; all its queries and keys are kept, on the CPU.
        layers: layer numbers.

    Raises:
        ValueError: a layer that did not run sparse: it does not exist, stays full, or its blocks cover the document.
    """
    wanted = frozenset(layers)

    def keep(layer, query, key, block_size, selected):
        return Gate(query.cpu(), key.cpu(), selected.cpu(), block_size) if layer in wanted else None

    gates = {layer: gate for layer, gate in _record(model, input_ids, keep).items() if gate is not None}
    if missing := sorted(wanted - gates.keys()):
        raise ValueError(
            f"layers must be layers that run sparse, but {missing} did not: they are full_attention_layers or none at "
            f"all, or block_size · top_k covers all {input_ids.shape[1]} tokens"
        )
    return gates


def _record(model: PreTrainedModel, input_ids: torch.Tensor, keep: Callable) -> dict:
    """Layer → what `keep(layer, query, key, block_size, selected)` returned when the layer routed."""
    if input_ids.shape[0] != 1:
        raise ValueError(f"input_ids must be one sequence [1, length], but was {tuple(input_ids.shape)}")
    recorder = _Recorder(keep)
    attentions = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int) and list(m.children())]
    hooks = [m.register_forward_pre_hook(recorder.enter) for m in attentions]
    try:
        with torch.no_grad(), recorder:
            model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return recorder.layers


class _Recorder(TorchDispatchMode):
    """Sees every operator called, keeps of `select_blocks` what it is told to, by the layer that is running."""

    def __init__(self, keep: Callable):
        super().__init__()
        self.keep, self.layer, self.layers = keep, None, {}

    def enter(self, module, _args) -> None:
        self.layer = module.layer_idx

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.name() == "moba_flash_attn::select_blocks":
            query, key, _, _, block_size, *_ = args
            self.layers[self.layer] = self.keep(self.layer, query, key, block_size, result)
        return result
