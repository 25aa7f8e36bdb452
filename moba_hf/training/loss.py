"""Cross entropy that never holds the logits of a whole long sequence: 1M tokens · 128K vocabulary · 4 bytes is 512 GB.

Three ways, chosen by two arguments:

    use_liger_kernel: true   liger-kernel's fused linear cross entropy; needs liger-kernel, Triton and a GPU
    tiled_loss: true         TRL's language model head in tiles; needs trl, runs on every device
    neither                  Transformers' own: all logits, in float32; refused beyond `FULL_LOGITS` bytes

SFTTrainer always takes TRL's head; use_liger_kernel then brings liger's kernels for the layers alone.
"""

import functools
import importlib.util

import torch

FULL_LOGITS = 8 << 30  # bytes of float32 logits that one forward may hold


def check_loss(training_args, *, tiled: bool, tokens: int, vocabulary: int) -> None:
    """Refuse a loss that cannot run here, or that would hold too many logits.

    Args:
        tiled: the argument tiled_loss.
        tokens: of one forward on one device: batch · sequence length / sequence-parallel ranks.
        vocabulary: size.

    Raises:
        ValueError: both ways at once; full logits of more than `FULL_LOGITS` bytes; liger without a GPU.
        ModuleNotFoundError: liger-kernel or trl is missing.
    """
    liger = training_args.use_liger_kernel
    if liger and tiled:
        raise ValueError("use_liger_kernel and tiled_loss both replace the loss: choose one")
    check_liger(training_args)
    if tiled:
        _need("trl", "tiled_loss", 'pip install "moba_hf[sft]"')
    if not liger and not tiled and 4 * tokens * vocabulary > FULL_LOGITS:
        size = 4 * tokens * vocabulary / 2**30
        raise ValueError(
            f"{tokens} tokens · {vocabulary} words are {size:.0f} GiB of float32 logits in one forward; set "
            f"use_liger_kernel: true (needs liger-kernel and a GPU) or tiled_loss: true (needs trl)"
        )


def check_liger(training_args) -> None:
    """Refuse use_liger_kernel where it cannot run: ValueError on a CPU, ModuleNotFoundError without liger-kernel."""
    if not training_args.use_liger_kernel:
        return
    if training_args.device.type == "cpu":
        raise ValueError(
            "use_liger_kernel needs a GPU, its kernels are Triton; on a CPU leave it out or take tiled_loss"
        )
    _need("liger_kernel", "use_liger_kernel", 'pip install "moba_hf[liger]"')


def _need(module: str, argument: str, remedy: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"{argument} needs {module.replace('_', '-')}: {remedy}")


def tile_loss(model) -> None:
    """Where the model is given labels, it computes its loss in tiles and returns no logits; without labels, as ever."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)
    forward = model.forward

    @functools.wraps(forward)
    def tiled(*args, labels: torch.Tensor | None = None, shift_labels: torch.Tensor | None = None, **kwargs):
        learns = labels is not None or shift_labels is not None
        return forward(*args, labels=labels, shift_labels=shift_labels, fused_lm_head=learns, **kwargs)

    model.forward = tiled
