"""What scripts/benchmark_attention.py times: our engines, dense attention, FlexAttention and the peers' own functions.

    dense …          PyTorch's dense attention, each of its backends on CUDA
    fa2 fa3 fa4      dense attention by the FlashAttention packages, through the adapters of the flash engine
    flex             FlexAttention with a block mask of exactly our selection, made anew in every forward as routing is
    moonshot_moba    `moba_attn_varlen` of github.com/MoonshotAI/MoBA
    flash_moba       `flash_moba_varlen_func` of github.com/mit-han-lab/flash-moba

`top_k` counts the own block in both peers as it does here. Each contender takes and returns packed tensors.
"""

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import moba_hf
from moba_hf.ops.engines import flash_providers

DENSE = {  # contender: backend of PyTorch's attention; None is the one it takes by itself
    "cpu": {"dense": None},
    "cuda": {
        "dense cudnn": SDPBackend.CUDNN_ATTENTION,
        "dense flash": SDPBackend.FLASH_ATTENTION,
        "dense efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
}
FLASH = ("fa2", "fa3", "fa4")
OTHERS = (*FLASH, "flex", "moonshot_moba", "flash_moba")
_TILE = 128  # rows and keys of a tile of FlexAttention's block mask: its default


class Absent(Exception):
    """Why a contender cannot run here."""


@dataclass(frozen=True)
class Problem:
    """`batch` sequences of `length` tokens, packed; dtype and device of all tensors."""

    length: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    top_k: int
    dtype: torch.dtype
    device: str

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """int32 [batch + 1]; one tensor for all calls, because moonshot_moba keeps what it derives from it."""
        return torch.arange(self.batch + 1, dtype=torch.int32, device=self.device) * self.length

    @property
    def routing(self) -> dict:
        """The arguments that routing takes."""
        ends = self.cu_seqlens
        return dict(block_size=self.block_size, top_k=self.top_k, cu_seqlens_q=ends, cu_seqlens_k=ends)

    def states(self, seed: int) -> list[torch.Tensor]:
        """query, key, value, grad_output: [batch · length, heads, head_dim]; all but the last require gradients."""
        generator = torch.Generator(self.device).manual_seed(seed)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        shape = (self.batch * self.length, self.head_dim)
        make = lambda h: torch.randn(shape[0], h, shape[1], device=self.device, dtype=self.dtype, generator=generator)  # noqa: E731
        query, key, value, grad = (make(h) for h in heads)
        return [*(x.requires_grad_() for x in (query, key, value)), grad]

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Packed [batch · length, heads, head_dim] → [batch, heads, length, head_dim], a view."""
        return x.unflatten(0, (self.batch, self.length)).transpose(1, 2)

    @property
    def flop_bound(self) -> float:
        """Query-key pairs of full causal attention over those of MoBA."""
        length, block, slots = self.length, self.block_size, self.top_k - 1
        starts = range(0, length, block)
        own = sum(n * (n + 1) / 2 for n in (min(block, length - start) for start in starts))
        past = sum(min(block, length - start) * min(slots, i) * block for i, start in enumerate(starts))
        return length * (length + 1) / 2 / (own + past)

    def least_bytes(self, backward: bool) -> tuple[int, int]:
        """(bytes of the inputs, of the results): query, key, value, grad_output; output and three gradients."""
        item, tokens = self.dtype.itemsize * self.head_dim, self.batch * self.length
        query, key = tokens * self.heads * item, tokens * self.kv_heads * item
        return (2 * query + 2 * key, 2 * query + 2 * key) if backward else (query + 2 * key, query)


@dataclass(frozen=True)
class Contender:
    """attend(query, key, value) → [batch · length, heads, head_dim], differentiable where its package is.

    select(query, key): what of it is routing, to be timed by itself; None where it has none or keeps it inside.
    """

    name: str
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    select: Callable[[torch.Tensor, torch.Tensor], object] | None = None
    dense: bool = False


def make(name: str, problem: Problem) -> Contender:
    """The contender of that name: of `DENSE`, of `OTHERS`, or one of our engines. Raises Absent."""
    if name in DENSE[problem.device]:
        return _sdpa(name, problem)
    if name in FLASH:
        return _flash_attention(name, problem)
    makers = {"flex": _flex, "moonshot_moba": _moonshot_moba, "flash_moba": _flash_moba}
    return makers[name](problem) if name in makers else _engine(name, problem)


def _engine(name: str, problem: Problem) -> Contender:
    def attend(query, key, value):
        return moba_hf.moba_attention(query, key, value, **problem.routing, engine=name)

    return Contender(name, attend, lambda query, key: moba_hf.select_blocks(query, key, **problem.routing))


# ---- dense ---------------------------------------------------------------------------------------------------------


def _sdpa(name: str, problem: Problem) -> Contender:
    backend, grouped = DENSE[problem.device][name], problem.heads != problem.kv_heads

    def attend(query, key, value):
        with nullcontext() if backend is None else sdpa_kernel(backend):
            rows = (problem.rows(x) for x in (query, key, value))
            output = scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=grouped)
        return output.transpose(1, 2).flatten(0, 1)

    return Contender(name, attend, dense=True)


class _FlashAttention(torch.autograd.Function):
    """A provider's forward and backward as one differentiable function."""

    @staticmethod
    def forward(ctx, query, key, value, provider, segments):
        ctx.provider, ctx.segments = provider, segments
        output, lse = provider.forward(query, key, value, segments, query.shape[-1] ** -0.5)
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        query, *_ = saved = ctx.saved_tensors
        return *ctx.provider.backward(grad_output, *saved, ctx.segments, query.shape[-1] ** -0.5), None, None


def _flash_attention(name: str, problem: Problem) -> Contender:
    try:
        provider = flash_providers.named(name, problem.dtype, problem.head_dim)
    except flash_providers.Unavailable as reason:
        raise Absent(str(reason)) from reason
    ends = problem.cu_seqlens
    segments = flash_providers.Segments(ends, ends, problem.length, problem.length, causal=True)
    return Contender(name, lambda *states: _FlashAttention.apply(*states, provider, segments), dense=True)


# ---- FlexAttention -------------------------------------------------------------------------------------------------


def _flex(problem: Problem) -> Contender:
    from torch.nn.attention import flex_attention

    # Every length is compiled for itself, and what is kept of the others counts against a limit. After an attempt that
    # failed PyTorch would go on without compiling, many times slower: not without the reset, and not with fullgraph.
    torch.compiler.reset()
    attention = torch.compile(flex_attention.flex_attention, dynamic=False, fullgraph=True)

    def select(query, key):
        return block_mask(moba_hf.select_blocks(query.detach(), key.detach(), **problem.routing), problem)

    def attend(query, key, value):
        rows = (problem.rows(x) for x in (query, key, value))
        grouped = problem.heads != problem.kv_heads
        output = attention(*rows, block_mask=select(query, key), enable_gqa=grouped)
        return output.transpose(1, 2).flatten(0, 1)

    return Contender("flex", attend, select)


def block_mask(selected: torch.Tensor, problem: Problem):
    """FlexAttention's BlockMask of a selection, int32 [batch · length, heads, slots] as select_blocks gives it.

    A tile that no row sees anything of is left out; one of which every row sees all is marked full, so that no mask is
    computed in it. Made from counts of rows per block, because a mask of queries by keys would not fit at any length
    worth measuring.
    """
    from torch.nn.attention.flex_attention import BlockMask

    selected = selected.unflatten(0, (problem.batch, problem.length))
    block_size, slots = problem.block_size, range(selected.shape[-1])

    def sees(b, h, i, j):
        block = j // block_size
        seen = (block == i // block_size) & (j <= i)
        for slot in slots:
            seen = seen | (selected[b, i, h, slot] == block)
        return seen

    visited, full = _tiles(selected, problem)
    (count, index), (full_count, full_index) = _listed(visited & ~full), _listed(full)
    return BlockMask.from_kv_blocks(
        count, index, full_count, full_index, BLOCK_SIZE=_TILE, mask_mod=sees,
        seq_lengths=(problem.length, problem.length), compute_q_blocks=torch.is_grad_enabled(),
    )  # fmt: skip


def _tiles(selected: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """(visited, full): bool [batch, heads, tiles of rows, tiles of keys]."""
    length, size, device = problem.length, problem.block_size, selected.device
    blocks, tiles = -(-length // size), -(-length // _TILE)
    position = torch.arange(length, device=device)
    own = (position // size).expand(problem.batch, problem.heads, length)[..., None]
    past = selected.transpose(1, 2).long()
    listed = torch.cat([torch.where(past < 0, blocks, past), own], -1)  # the last column gathers what is no block
    row_tile = (position // _TILE)[:, None] * (blocks + 1)
    counts = torch.zeros(problem.batch, problem.heads, tiles * (blocks + 1), dtype=torch.int32, device=device)
    where = (listed + row_tile).flatten(2)
    counts.scatter_add_(2, where, torch.ones_like(where, dtype=torch.int32))
    counts = counts.unflatten(2, (tiles, blocks + 1))[..., :blocks]  # rows of the tile that attend the block
    start = torch.arange(tiles, device=device) * _TILE
    end = (start + _TILE).clamp(max=length)
    first, last = start // size, (end - 1) // size  # the blocks that a tile of keys overlaps
    any_row = _between(counts > 0, first, last) > 0
    every_row = _between(counts == _TILE, first, last) == last - first + 1
    causal = start < end[:, None]  # the tile of keys begins before the rows end
    return any_row & causal, every_row & (end <= start[:, None])


def _between(marks: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """How many of bool [..., blocks] are set from block first[t] to last[t]: int32 [..., tiles]."""
    total = torch.nn.functional.pad(marks.cumsum(-1, dtype=torch.int32), (1, 0))
    return total[..., last + 1] - total[..., first]


def _listed(marks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(how many are set, their places and then the others'): int32 [...], [..., tiles]."""
    order = marks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return marks.sum(-1, dtype=torch.int32), order.to(torch.int32)


# ---- the peers -----------------------------------------------------------------------------------------------------


def _peer(module: str, function: str, source: str) -> Callable:
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # a package built for another PyTorch or CUDA fails in ways of its own
        raise Absent(f"{module}.{function} cannot be imported ({source}): {error}") from error


def _moonshot_moba(problem: Problem) -> Contender:
    """It takes as many key heads as query heads, so a group's are repeated first, as its authors' wrapper does."""
    function = _peer("moba.moba_efficient", "moba_attn_varlen", "github.com/MoonshotAI/MoBA")
    group = problem.heads // problem.kv_heads

    def attend(query, key, value):
        key, value = (x if group == 1 else x.repeat_interleave(group, 1) for x in (key, value))
        return function(
            query, key, value, problem.cu_seqlens, problem.length,
            moba_chunk_size=problem.block_size, moba_topk=problem.top_k,
        )  # fmt: skip

    return Contender("moonshot_moba", attend)


def _flash_moba(problem: Problem) -> Contender:
    function = _peer("flash_moba", "flash_moba_varlen_func", "github.com/mit-han-lab/flash-moba")

    def attend(query, key, value):
        return function(
            query, key, value, problem.cu_seqlens, problem.cu_seqlens, problem.length, problem.length,
            moba_chunk_size=problem.block_size, moba_topk=problem.top_k, causal=True,
        )  # fmt: skip

    return Contender("flash_moba", attend)
