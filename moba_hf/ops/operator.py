"""`moba_attention` and `select_blocks`: validate, route, hand the selection to an engine.

The engines' forward and backward are wrapped in PyTorch custom ops with fake and autograd registration, once for all
engines, so that `torch.compile(fullgraph=True)` sees single opaque calls. Their namespace contains "flash_attn"
because selective activation checkpointing in the ecosystem keeps, rather than recomputes, ops named so.
"""

import functools
import logging
import math
from operator import index

import torch

from . import engines, routing

logger = logging.getLogger(__name__)


def moba_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    block_size: int,
    top_k: int,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    scale: float | None = None,
    engine: str = "auto",
) -> torch.Tensor:
    """Mixture of Block Attention over packed sequences; differentiable in query, key and value.

    Every query attends its own block causally and the top_k − 1 past blocks with the highest ⟨query, mean key⟩, each
    query head by itself (arXiv 2502.13189). The selection carries no gradient.

    Args:
        query: [total_q, heads, head_dim]; float16, bfloat16, float32 or float64.
        key, value: [total_k, kv_heads, head_dim], dtype and device of the query; heads a multiple of kv_heads.
        block_size: tokens per block, counted from each sequence's first token.
        top_k: blocks attended by a query, its own included; 1 is block-local attention.
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1] cumulative lengths, as in FlashAttention; give both or
            neither (one sequence). The queries are the last positions of their sequence. Their values are checked on
            CPU tensors only: reading them from a GPU would stall it.
        scale: factor on the scores before the softmax; head_dim ** -0.5 by default. The gate is not scaled.
        engine: "auto", "reference", "blockwise", "flash" or "triton".

    Returns:
        [total_q, heads, head_dim] in the query's dtype.

    Raises:
        ValueError, TypeError: an argument that cannot be computed correctly, before any work is done.
        RuntimeError: the engine asked for cannot run here.
    """
    cu_seqlens_q, cu_seqlens_k = _check(query, key, value, block_size, top_k, cu_seqlens_q, cu_seqlens_k)
    scale = query.shape[-1] ** -0.5 if scale is None else _check_scale(scale)
    if engine == "auto" and _covers(block_size * top_k, key, cu_seqlens_k):
        return dense_attention(query, key, value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, scale=scale)
    name = _choose(engine, query, block_size)
    if engine == "auto" and not torch.compiler.is_compiling():
        _say_once(name, query.device.type)
    selected = _select(query, key, cu_seqlens_q, cu_seqlens_k, block_size, _useful_slots(top_k, key, block_size), name)
    where = (selected, cu_seqlens_q, cu_seqlens_k, block_size)
    if name == "reference":
        return engines.load(name).attention(query, key, value, *where, scale)
    query, scale = _positive_scale(query, scale)
    return attention_forward(query, key, value, *where, scale, name)[0]


def select_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    block_size: int,
    top_k: int,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
) -> torch.Tensor:
    """The routing of `moba_attention` alone: which past blocks each query head attends besides its own block.

    Arguments as in `moba_attention`. Returns int32 [total_q, heads, top_k − 1]: block numbers within the sequence,
    ascending, then −1 where fewer past blocks exist.
    """
    cu_seqlens_q, cu_seqlens_k = _check(query, key, key, block_size, top_k, cu_seqlens_q, cu_seqlens_k)
    slots = _useful_slots(top_k, key, block_size)
    name = _choose("auto", query, block_size)
    selected = _select(query, key, cu_seqlens_q, cu_seqlens_k, block_size, slots, name)
    return torch.nn.functional.pad(selected, (0, top_k - 1 - slots), value=-1)


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Full causal attention over the same packed layout; differentiable, and never a [queries, keys] mask in memory.

    Arguments and result as in `moba_attention`, whose checks the caller has passed or does not need.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, scale = _positive_scale(query, scale)
    nothing = query.new_empty((*query.shape[:2], 0), dtype=torch.int32)
    return attention_forward(query, key, value, nothing, cu_seqlens_q, cu_seqlens_k, 1, scale, "dense")[0]


def _covers(sight: int, key: torch.Tensor, cu_seqlens_k: torch.Tensor) -> bool:
    """Whether block_size · top_k reaches over every sequence, so that MoBA is full attention.

    The sequences' own lengths count on a CPU; elsewhere, and while compiling, reading them would cost a wait.
    """
    if key.shape[0] <= sight:
        return True
    if torch.compiler.is_compiling() or key.device.type != "cpu":
        return False
    return bool(cu_seqlens_k.diff().max() <= sight)


def _choose(engine: str, query: torch.Tensor, block_size: int) -> str:
    # index: a compiled graph with dynamic shapes fixes these two numbers and keeps the others dynamic (int does not)
    return engines.choose(engine, query.device.type, query.dtype, index(block_size), index(query.shape[-1]))


def _positive_scale(query: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The same scores with a scale ≥ 2⁻¹⁰⁰: kernels mask with −inf before they scale by it, and divide by it."""
    if abs(scale) < 2.0**-100:
        return query * scale, 1.0
    return (query, scale) if scale > 0 else (-query, -scale)


def _useful_slots(top_k: int, key: torch.Tensor, block_size: int) -> int:
    """top_k − 1, or the number of past blocks that can exist at all where that is less."""
    return min(top_k - 1, key.shape[0] // block_size)


# ---- custom ops ----------------------------------------------------------------------------------------------------


def _select(query, key, cu_seqlens_q, cu_seqlens_k, block_size, slots, engine):
    return select_op(query.detach(), key.detach(), cu_seqlens_q, cu_seqlens_k, block_size, slots, engine)


@torch.library.custom_op("moba_flash_attn::select_blocks", mutates_args=())
def select_op(
    query: torch.Tensor,
    key: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    slots: int,
    engine: str,
) -> torch.Tensor:
    """Selected past blocks, int32 [total_q, heads, slots]; by the engine's routing kernel where it has one."""
    select = engines.routing_kernel(engine, query.device.type) or routing.select
    return select(query, key, cu_seqlens_q, cu_seqlens_k, block_size, slots)


@select_op.register_fake
def _(query, key, cu_seqlens_q, cu_seqlens_k, block_size, slots, engine):
    return query.new_empty((*query.shape[:2], slots), dtype=torch.int32)


@torch.library.custom_op("moba_flash_attn::attention_forward", mutates_args=())
def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    selected_blocks: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    scale: float,
    engine: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, lse) of the engine named; the contract is in `engines/__init__.py`."""
    return engines.load(engine).forward(
        query, key, value, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale
    )


@attention_forward.register_fake
def _(query, key, value, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale, engine):
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=lse_dtype)


@torch.library.custom_op("moba_flash_attn::attention_backward", mutates_args=())
def attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    selected_blocks: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_size: int,
    scale: float,
    engine: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, contiguous, in their dtypes."""
    return engines.load(engine).backward(
        grad_output, query, key, value, output, lse, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale
    )


@attention_backward.register_fake
def _(grad_output, query, key, value, output, lse, selected_blocks, cu_seqlens_q, cu_seqlens_k, *_):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.block_size, ctx.scale, ctx.engine = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_output, _grad_lse):
    query, key, value, selected, cu_seqlens_q, cu_seqlens_k, output, lse = ctx.saved_tensors
    grads = attention_backward(
        grad_output, query, key, value, output, lse, selected, cu_seqlens_q, cu_seqlens_k,
        ctx.block_size, ctx.scale, ctx.engine,
    )  # fmt: skip
    return *grads, None, None, None, None, None, None


attention_forward.register_autograd(_backward, setup_context=_save_for_backward)


# ---- validation ----------------------------------------------------------------------------------------------------

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(query, key, value, block_size, top_k, cu_seqlens_q, cu_seqlens_k):
    """Raise on anything that cannot be computed correctly; return the cumulative lengths, filled in."""
    for name, number in (("block_size", block_size), ("top_k", top_k)):
        if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an int, but was {number!r}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1, but was {number}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in _DTYPES:
            what = getattr(tensor, "dtype", type(tensor).__name__)
            raise TypeError(f"{name} must be a float16, bfloat16, float32 or float64 tensor, but was {what}")
        if tensor.ndim != 3:
            raise ValueError(f"{name} must be [tokens, heads, head_dim], but its shape was {tuple(tensor.shape)}")
        if (tensor.dtype, tensor.device) != (query.dtype, query.device):
            given = f"{tensor.dtype} on {tensor.device}"
            raise TypeError(
                f"{name} must have the query's dtype and device, {query.dtype} on {query.device}, but was {given}"
            )
    if key.shape != value.shape:
        raise ValueError(f"key and value must have equal shapes, but were {tuple(key.shape)} and {tuple(value.shape)}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"query heads must be a multiple of kv heads, but were {query.shape[1]} and {key.shape[1]}")
    if query.shape[2] != key.shape[2] or query.shape[2] == 0:
        raise ValueError(f"head_dim must be equal in query and key, but was {query.shape[2]} and {key.shape[2]}")
    return _check_cu_seqlens(query, key, cu_seqlens_q, cu_seqlens_k)


def _check_cu_seqlens(query, key, cu_seqlens_q, cu_seqlens_k):
    given = {"cu_seqlens_q": (cu_seqlens_q, query), "cu_seqlens_k": (cu_seqlens_k, key)}
    if cu_seqlens_q is None and cu_seqlens_k is None:
        if query.shape[0] > key.shape[0]:
            raise ValueError(f"a sequence has {query.shape[0]} queries but only {key.shape[0]} keys")
        ends = torch.arange(2, dtype=torch.int32, device=query.device)  # a tensor made of numbers would be copied there
        return tuple(ends * x.shape[0] for x in (query, key))
    for name, (cu, _) in given.items():
        if not isinstance(cu, torch.Tensor) or cu.dtype != torch.int32 or cu.ndim != 1 or cu.shape[0] < 2:
            what = f"{cu.dtype} {tuple(cu.shape)}" if isinstance(cu, torch.Tensor) else repr(cu)
            raise TypeError(f"{name} must be an int32 tensor [sequences + 1], but was {what}; give both or neither")
        if cu.device != query.device:
            raise TypeError(f"{name} must be on the query's device {query.device}, but was on {cu.device}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        lengths = (cu_seqlens_q.shape[0], cu_seqlens_k.shape[0])
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have equal lengths, but had {lengths[0]} and {lengths[1]}"
        )
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        for name, (cu, tensor) in given.items():
            steps = cu.diff()
            if cu[0] != 0 or cu[-1] != tensor.shape[0] or (steps < 0).any():
                raise ValueError(
                    f"{name} must rise from 0 to {tensor.shape[0]} (the rows given), but was {cu.tolist()}"
                )
        if (cu_seqlens_q.diff() > cu_seqlens_k.diff()).any():
            raise ValueError("a sequence has more queries than keys: cu_seqlens_q rises faster than cu_seqlens_k")
    return cu_seqlens_q, cu_seqlens_k


def _check_scale(scale) -> float:
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, but was {scale!r}")
    return float(scale)


@functools.cache
def _say_once(engine: str, device: str) -> None:
    logger.info("moba_hf: engine %r computes MoBA on %s", engine, device)
