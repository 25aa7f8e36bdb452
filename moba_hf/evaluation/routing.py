"""Which past blocks each query chose: recorded from a real forward pass."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel


def record_routing(model: PreTrainedModel, input_ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """The blocks selected in every layer that ran MoBA on one sequence.

    The selection is taken from the operator as it is called, not computed again: it is what the layer attended.

    Args:
        model: a model with attn_implementation "moba".
        input_ids: int64 [1, length], one document.

    Returns:
        Layer number -> int32 [length, heads, slots]: block numbers, ascending, then −1; the own block is not listed.
        Empty where every layer attends everything (short sequence, or full-attention layers only).
    """
    if input_ids.shape[0] != 1:
        raise ValueError(f"input_ids must be one sequence [1, length], but was {tuple(input_ids.shape)}")
    recorder = _Recorder()
    attentions = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int) and list(m.children())]
    hooks = [m.register_forward_pre_hook(recorder.enter) for m in attentions]
    try:
        with torch.no_grad(), recorder:
            model.get_decoder()(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return recorder.selected


class _Recorder(TorchDispatchMode):
    """Sees every operator called, keeps the results of `select_blocks` by the layer that is running."""

    def __init__(self):
        super().__init__()
        self.layer, self.selected = None, {}

    def enter(self, module, _args) -> None:
        self.layer = module.layer_idx

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.name() == "moba_flash_attn::select_blocks":
            self.selected[self.layer] = result.cpu()
        return result
