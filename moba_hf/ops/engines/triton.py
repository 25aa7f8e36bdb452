"""MoBA in our own fused kernels, for CUDA devices: routing, forward and backward without a host sync.

What the kernels are and how the work is cut: `kernels/`. Temporaries stay within 1 GiB (MOBA_HF_WORKSPACE_MB). With
torch.use_deterministic_algorithms(True) gradients, too, are bitwise reproducible; outputs always are. Triton launches
on the current device, not the tensors' own, which may differ where layers are spread over GPUs: hence `device_of`.
"""

import importlib.metadata
import importlib.util
import os

import torch

from ..blocks import BlockLayout

_WIDEST = 256


def unavailable() -> str | None:
    """Why the engine cannot run here, with the remedy; None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'moba_hf[triton]'"
    if not torch.cuda.is_available() and not _interpreted():
        return "it needs a CUDA device (or TRITON_INTERPRET=1, Triton's slow interpreter, for tests)"
    return interpreter_problem() if _interpreted() else None


def interpreter_problem() -> str | None:
    """Why the kernels cannot run in this Triton's interpreter, with the remedy; None when they can.

    Triton 3.6 makes a loop's bound an integer by int(array of one element), which NumPy 2.4 refuses.
    """
    triton, numpy = (".".join(importlib.metadata.version(name).split(".")[:2]) for name in ("triton", "numpy"))
    if _number(triton) < (3, 7) and _number(numpy) >= (2, 4):
        return f"Triton {triton}'s interpreter stops at NumPy {numpy}; pip install 'triton>=3.7' or 'numpy<2.4'"
    return None


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def unsupported(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the engine cannot take tensors of this kind; None when it can."""
    reason = unavailable()
    if reason is None and device != "cuda" and not _interpreted():
        reason = f"its kernels need a CUDA device and the tensors are on {device!r}"
    if reason is None and dtype == torch.float64:
        reason = "its kernels accumulate in float32 and the tensors are float64; engine='blockwise' takes them"
    if reason is None and head_dim > _WIDEST:
        reason = f"its tiles hold at most head_dim {_WIDEST}, but it was {head_dim}; engine='blockwise' takes it"
    return reason


def select(query, key, cu_seqlens_q, cu_seqlens_k, block_size: int, slots: int) -> torch.Tensor:
    """Selected past blocks: int32 [total_q, heads, slots], ascending, then −1. Used in place of the PyTorch routing."""
    from ..kernels.block_gate import select_blocks

    query, key = _unit_stride(query, key)
    with torch.cuda.device_of(query):
        layout = _layout(query, key, cu_seqlens_q, cu_seqlens_k, block_size)
        return select_blocks(query, key, layout, block_size, slots, _forward_settings(query, block_size).gate)


def forward(query, key, value, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale):
    """See the engine contract in `engines/__init__.py`."""
    from ..kernels.attention_forward import forward_pass

    query, key, value = _unit_stride(query, key, value)
    settings = _forward_settings(query, block_size)
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.cuda.device_of(query):
        layout = _layout(query, key, cu_seqlens_q, cu_seqlens_k, block_size)
        return forward_pass(
            query, key, value, selected_blocks, layout, block_size, scale, settings, deterministic
        )  # fmt: skip


def backward(
    grad_output, query, key, value, output, lse, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale
):
    """See the engine contract in `engines/__init__.py`."""
    from ..kernels.attention_backward import backward_pass
    from ..kernels.backward_settings import backward_settings

    query, key, value = _unit_stride(query, key, value)
    settings = backward_settings(_capability(query), query.dtype, query.shape[2], block_size)
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.cuda.device_of(query):
        layout = _layout(query, key, cu_seqlens_q, cu_seqlens_k, block_size)
        return backward_pass(
            grad_output, query, key, value, output, lse, selected_blocks, layout, block_size, scale, settings,
            deterministic,
        )  # fmt: skip


def select_cached(query, means, starts, kv_len: int, block_size: int, slots: int) -> torch.Tensor | None:
    """Past blocks of few queries by the means kept beside a key cache, as in `kernels.decode_gate`.

    Used in place of the PyTorch routing; None for more blocks than the kernel takes.
    """
    from ..kernels.decode_gate import MOST_BLOCKS
    from ..kernels.decode_gate import select_cached as select

    if means.shape[2] > MOST_BLOCKS:
        return None
    query, means = (x if x.stride(3) == 1 else x.contiguous() for x in (query, means))
    with torch.cuda.device_of(query):
        return select(query, means, starts, kv_len, block_size, slots)


def decode(query, key, value, past_blocks, starts, block_size: int, scale: float) -> torch.Tensor:
    """[batch, q_len, heads, head_dim]: few queries over chosen blocks of a key cache. Shapes as in `kernels.decode`."""
    from ..kernels.decode import attend_blocks

    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    with torch.cuda.device_of(query):
        return attend_blocks(query, key, value, past_blocks, starts, block_size, scale)


def _layout(query, key, cu_seqlens_q, cu_seqlens_k, block_size) -> BlockLayout:
    from ..kernels.block_layout import block_layout

    ends = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    return block_layout(*ends, query.shape[0], key.shape[0], block_size)


def _forward_settings(query, block_size):
    from ..kernels.forward_settings import forward_settings

    return forward_settings(_capability(query), query.dtype, query.shape[2], block_size)


def _capability(query) -> tuple[int, int]:
    """Compute capability; the interpreter stands for a small GPU."""
    return torch.cuda.get_device_capability(query.device) if query.is_cuda else (8, 6)


def _unit_stride(*states):
    """Kernels read rows of head_dim neighbours; any other strides are passed on."""
    return tuple(x if x.stride(2) == 1 else x.contiguous() for x in states)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
