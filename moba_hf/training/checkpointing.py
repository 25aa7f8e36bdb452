"""Activation checkpointing for long sequences: attention that is not computed twice, activations in host memory.

Keys of `gradient_checkpointing_kwargs`, besides those of torch.utils.checkpoint:

    selective: true          keep what attention returns, recompute everything else (one more hidden state a layer, plus
                             4 bytes of log-sum-exp and 4 bytes for each selected block, per query and head)
    offload: true            each layer's input waits in host memory (Transformers 5.23)
    every_n_layers: n        checkpoint every n-th layer alone (Transformers 5.23)
"""

import functools
import inspect

import transformers
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

_SINCE_OFFLOAD = ("offload", "every_n_layers")


def check_checkpointing(training_args) -> None:
    """Raise ValueError for settings that this Transformers does not know, or that exclude each other."""
    settings = training_args.gradient_checkpointing_kwargs or {}
    if settings and not training_args.gradient_checkpointing:
        raise ValueError(f"gradient_checkpointing_kwargs={settings} needs gradient_checkpointing: true")
    known = inspect.signature(getattr(PreTrainedModel, "activation_checkpointing_enable", lambda: 0)).parameters
    for name in _SINCE_OFFLOAD:
        if name in settings and name not in known:
            raise ValueError(
                f"gradient_checkpointing_kwargs: {name} needs Transformers 5.23 or later, but this is "
                f"{transformers.__version__}; leave it out, or upgrade"
            )
    if settings.get("offload") and training_args.device.type == "cpu":
        raise ValueError("gradient_checkpointing_kwargs: offload moves activations off a GPU, but this run is on a CPU")
    if settings.get("selective") and settings.get("use_reentrant"):
        raise ValueError("gradient_checkpointing_kwargs: selective needs use_reentrant: false")


def keep_attention(model: PreTrainedModel) -> None:
    """From now on, where the model checkpoints activations with `selective: true`, attention is not recomputed.

    Wraps the method that switches checkpointing on, so that Trainer's arguments stay plain values.
    """
    enable = model.gradient_checkpointing_enable

    @functools.wraps(enable)
    def wrapper(gradient_checkpointing_kwargs=None, **kwargs):
        settings = dict(gradient_checkpointing_kwargs or {})
        if settings.pop("selective", False):
            settings |= {"use_reentrant": False, "context_fn": _contexts}
        return enable(gradient_checkpointing_kwargs=settings or None, **kwargs)

    model.gradient_checkpointing_enable = wrapper


def _contexts():
    return create_selective_checkpoint_contexts(_policy)


def _policy(context, operation, *args, **kwargs) -> CheckpointPolicy:
    """Our operators, and PyTorch's own attention in the layers that stay full."""
    name = operation.name()
    if name.startswith("moba_flash_attn::") or ("scaled_dot_product" in name and "attention" in name):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
