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
block numbers within the sequence in ascending order, then −1. cu_seqlens_*: int32 [sequences + 1]; equal neighbours
are empty sequences. Rows past cu_seqlens_q[-1] belong to no sequence: output 0, lse −inf; rows past cu_seqlens_k[-1]
are never read, and all of these get zero gradients. Selected blocks are complete blocks strictly before the query's
own block; the own block (causal) is always attended and never listed.
"""

import importlib
from dataclasses import dataclass

import torch

NAMES = ("reference", "blockwise", "flash", "triton")
_MODULES = {"flash": "flash_varlen"}


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
    result = {}
    for name in NAMES:
        try:
            reason = load(name).unavailable()
        except ImportError as error:
            reason = f"cannot be imported: {error}"
        result[name] = EngineStatus(name, reason is None, reason or "")
    return result


@torch.compiler.assume_constant_result  # a compiled graph keeps the choice made while tracing
def choose(engine: str, device: str) -> str:
    """Resolve `engine` for tensors on a device of this type; raises where the engine asked for cannot run.

    "auto" is Triton on CUDA where it is installed, and blockwise elsewhere.
    Raises ValueError for an unknown name and RuntimeError for an engine that cannot run here.
    """
    if engine == "auto":
        return "triton" if device == "cuda" and load("triton").unavailable() is None else "blockwise"
    if engine not in NAMES:
        raise ValueError(f"engine={engine!r} is unknown; choose one of {('auto', *NAMES)}")
    reason = load(engine).unavailable()
    if reason is None and engine == "triton" and device != "cuda":
        reason = f"its kernels need a CUDA device and the tensors are on {device!r}" if not _interpreted() else None
    if reason is not None:
        raise RuntimeError(f"engine={engine!r} cannot run: {reason}")
    return engine


def _interpreted() -> bool:
    import os

    return os.environ.get("TRITON_INTERPRET") == "1"
