"""Which past blocks each query chose: recorded from a real forward pass."""

from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel


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


def record_routing(model: PreTrainedModel, input_ids: torch.Tensor, queries: int = 1024) -> Routing:
    """Run one document through the model and keep what every layer selected for at most `queries` of its positions.

    The selection is taken from the operator as it is called, not computed again: it is what the layer attended.

    Args:
        model: a model with attn_implementation "moba".
        input_ids: int64 [1, length], one document.
        queries: positions kept, evenly spread: a million of them would fill the memory.
    """
    if input_ids.shape[0] != 1:
        raise ValueError(f"input_ids must be one sequence [1, length], but was {tuple(input_ids.shape)}")
    length = input_ids.shape[1]
    recorder = _Recorder(torch.linspace(0, length - 1, min(queries, length)).long())
    attentions = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int) and list(m.children())]
    hooks = [m.register_forward_pre_hook(recorder.enter) for m in attentions]
    try:
        with torch.no_grad(), recorder:
            model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return Routing(recorder.positions, length, recorder.layers)


class _Recorder(TorchDispatchMode):
    """Sees every operator called, keeps the results of `select_blocks` by the layer that is running."""

    def __init__(self, positions: torch.Tensor):
        super().__init__()
        self.positions, self.layer, self.layers = positions, None, {}

    def enter(self, module, _args) -> None:
        self.layer = module.layer_idx

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.name() == "moba_flash_attn::select_blocks":
            self.layers[self.layer] = result[self.positions.to(result.device)].cpu()
        return result
