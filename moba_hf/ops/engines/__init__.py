"""The engines: interchangeable ways to compute attention over a given selection of blocks.

An engine is a module of this package with three functions (the reference has `attention` in place of the pair,
because autograd differentiates it):

    unavailable() -> str | None
        Why the engine cannot run on this machine, with the remedy; None when it can.
    forward(query, key, value, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale) -> (output, lse)
    backward(grad_output, query, key, value, output, lse, selected_blocks, cu_seqlens_q, cu_seqlens_k,
             block_size, scale) -> (grad_query, grad_key, grad_value)

query, output, grad_output: [total_q, heads, head_dim]; key, value: [total_k, kv_heads, head_dim], one floating dtype,
any strides whose last is 1 (grad_output: any strides at all). lse: float32 [total_q, heads], natural logarithm of the
softmax denominator over scaled scores (float64 for float64 inputs). selected_blocks: int32 [total_q, heads, slots],
block numbers within the sequence in ascending order, then −1. scale: ≥ 2⁻¹⁰⁰. cu_seqlens_*: int32 [sequences + 1];
equal neighbours are empty sequences. Rows past cu_seqlens_q[-1] belong to no sequence: output 0, lse −inf; rows past
cu_seqlens_k[-1] are never read; all of these get zero gradients. Selected blocks are complete blocks strictly before
the query's own block; the own block (causal) is always attended and never listed.
"""

import importlib
from dataclasses import dataclass

import torch

NAMES = ("reference", "blockwise", "flash", "triton")
_MODULES = {"flash": "flash_varlen"}
_FLASH_FROM = 8192  # block size: see `automatic`


@dataclass(frozen=True)
class EngineStatus:
    """Whether an engine can run on this machine. `reason` says why not and what would help; empty when available."""

    name: str
    available: bool
    reason: str = ""


def load(name: str):
    """The engine's module. Imports it now: kernels and their packages stay out of `import moba_hf`."""
    return importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}")


def status() -> dict[str, EngineStatus]:
    """Every engine by name: available here or not, and why."""
    reasons = {name: _unavailable(name) for name in NAMES}
    return {name: EngineStatus(name, reason is None, reason or "") for name, reason in reasons.items()}


def _unavailable(name: str) -> str | None:
    try:
        return load(name).unavailable()
    except ImportError as error:
        return f"cannot be imported: {error}"


def _unsupported(name: str, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the engine cannot take these tensors here; the engines in plain PyTorch take all of them."""
    try:
        engine = load(name)
    except ImportError as error:
        return f"cannot be imported: {error}"
    return engine.unsupported(device, dtype, head_dim) if hasattr(engine, "unsupported") else engine.unavailable()


@torch.compiler.assume_constant_result  # a compiled graph keeps the choice made while tracing
def choose(engine: str, device: str, dtype: torch.dtype, block_size: int, head_dim: int) -> str:
    """Resolve `engine` for tensors of this kind on a device of this type; raises where the engine asked for cannot run.

    "auto" is what `automatic` says. Raises ValueError for an unknown name and RuntimeError for an engine that cannot
    run here.
    """
    if engine == "auto":
        if device != "cuda":
            return automatic(device, None, False, block_size)
        flash = load("flash").provider_name(device, dtype, head_dim)
        return automatic(device, flash, _unsupported("triton", device, dtype, head_dim) is None, block_size)
    if engine not in NAMES:
        raise ValueError(f"engine={engine!r} is unknown; choose one of {('auto', *NAMES)}")
    reason = _unsupported(engine, device, dtype, head_dim)
    if reason is not None:
        raise RuntimeError(f"engine={engine!r} cannot run: {reason}")
    return engine


def routing_kernel(engine: str, device: str):
    """The routing function that goes with an engine, or None for the one in PyTorch.

    An engine may have a `select` of its own. The flash engine has none and takes Triton's, where that runs.
    """
    if engine == "flash" and device == "cuda" and _unavailable("triton") is None:
        engine = "triton"
    return getattr(load(engine), "select", None)


def decode_kernels(engine: str, query: torch.Tensor, block_size: int):
    """The engine whose `select_cached` and `decode` take few queries over a key cache, or None for the way in PyTorch.

    query: [..., head_dim]. Raises as `choose` does. The flash engine has none and takes Triton's, where that runs.
    """
    device, head_dim = query.device.type, query.shape[-1]
    name = choose(engine, device, query.dtype, block_size, head_dim)
    if name == "flash" and device == "cuda" and _unsupported("triton", device, query.dtype, head_dim) is None:
        name = "triton"
    return load(name) if hasattr(load(name), "decode") else None


def automatic(device: str, flash: str | None, triton: bool, block_size: int) -> str:
    """What engine="auto" takes.

    device: "cuda", "cpu", …; flash: the FlashAttention kernels that fit dtype and head_dim, None for none
    (`flash_varlen.provider_name`); triton: whether the Triton engine runs here.

    The flash engine writes out the gathered queries and the partial outputs, about 8 · head_dim bytes for each pair of
    query and selected block, against 4 · head_dim · block_size FLOP of attention: head_dim cancels, and the traffic is
    13 % of the time at block_size 4096. On an H100 FlashAttention-4 makes up for it at 8192: forward as fast as our
    kernels, with backward a quarter faster; at 4096 forward a third slower, with backward as fast (docs/benchmarks.md).
    FlashAttention-3, not measured, is taken to be like it. FlashAttention-2 (also PyTorch's own) is slower, and only
    stands in where Triton is missing.
    """
    if device != "cuda":
        return "blockwise"
    if flash in ("fa3", "fa4") and block_size >= _FLASH_FROM:
        return "flash"
    if triton:
        return "triton"
    return "flash" if flash else "blockwise"
