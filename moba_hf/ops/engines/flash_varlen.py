"""The paper's five steps (arXiv 2502.13189, Algorithm 1) over variable-length FlashAttention kernels.

Routing (step 1) is done; here rows are ordered by the block they selected (2), FlashAttention runs once over the own
blocks, causally, and once over the past blocks, without a mask (3), the outputs go back in order (4), and the streams
are merged by their log-sum-exp (5). The backward gives FlashAttention's backward the merged output and log-sum-exp,
which makes each stream's gradients those of its share of the one softmax.

GQA: keys and values are never repeated. The own stream uses the kernels' own GQA; in the past stream the rows of all
heads of a group, which select different blocks, are queries of their one KV head. A *piece* of that work is one KV head
and one range of tokens, so that its memory stays within MOBA_HF_WORKSPACE_MB (1024 by default, read at every call):
gathered rows, partial outputs and sort keys. The backward adds 12 bytes per key element of one KV head, for the sums in
float32, and what its kernels pad: 128 rows per block. At 1M tokens of head_dim 128 that alone is 1.5 GiB; the ranges
then take a quarter of the budget.

Host syncs, their number independent of tokens and sequences: one in the backward, for how far keys run ahead of
queries; one per pass with kernels that launch a thread block per tile of the longest segment (FlashAttention-2), for
the length of the longest list of rows, where the bound known from shapes would launch mostly empty blocks. Neither
happens while a CUDA graph is captured; the bounds known from shapes serve instead.
"""

import os
from dataclasses import dataclass

import torch

from . import flash_providers
from .flash_providers import Segments
from .softmax_merge import merge_weights

_MOST_SEGMENTS = 65535  # the kernels put the segments on the second axis of a CUDA grid
_TILE = 128  # rows that FlashAttention-2 gives a thread block


def unavailable() -> str | None:
    """Why no FlashAttention kernels can run on this machine's GPU; None when some can."""
    reason = unsupported("cuda", torch.bfloat16, 128)
    return reason and f"{reason} (tensors on the CPU can use it, through a slow stand-in meant for tests)"


def unsupported(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why tensors like these cannot be computed here; None when they can."""
    try:
        flash_providers.choose(device, dtype, head_dim)
    except flash_providers.Unavailable as reason:
        return str(reason)
    return None


def provider_name(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Which kernels would compute tensors like these: a name of flash_providers, or None."""
    try:
        return flash_providers.choose(device, dtype, head_dim).name
    except flash_providers.Unavailable:
        return None


# ---- forward -------------------------------------------------------------------------------------------------------


def forward(query, key, value, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale):
    """(output, lse): the engine contract."""
    work = _Work.plan(query, key, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale, backward=False)
    if work is None:
        return torch.zeros_like(query, memory_format=torch.contiguous_format), _no_keys(query)
    output, lse = work.provider.forward(query, key, value, work.blocks.own(), scale)
    output = output.masked_fill_(work.blocks.outside[:, None, None], 0)
    lse = lse.T.masked_fill(work.blocks.outside[:, None], float("-inf"))
    for piece in work.pieces():
        _add_past_forward(work, piece, query, key, value, output, lse)
    return output, lse.contiguous()


def _no_keys(query):
    return query.new_full(query.shape[:2], float("-inf"), dtype=torch.promote_types(query.dtype, torch.float32))


def _add_past_forward(work, piece, query, key, value, output, lse) -> None:
    """Attend the past blocks of the piece and merge them into its rows of output and lse."""
    past = work.order_by_block(piece, key.shape[0])
    rows = query[piece.tokens, piece.heads].flatten(0, 1).index_select(0, past.row)[:, None]
    k, v = (x[:, piece.kv_head] for x in (key, value))
    part, part_lse = work.provider.forward(rows, k, v, past.segments, work.scale)
    own = output[piece.tokens, piece.heads].flatten(0, 1)
    part_lse = part_lse[0][past.place].masked_fill_(~past.listed, float("-inf"))
    own_lse = lse[piece.tokens, piece.heads].flatten()
    weights, total = merge_weights(torch.cat([own_lse[:, None], part_lse], 1))
    merged = weights[:, :1] * own
    for slot in range(part_lse.shape[1]):
        # An entry without a block has weight 0, but its partial output is undefined: 0 · NaN would spoil the row.
        merged.addcmul_(past.take(part, slot), weights[:, slot + 1, None])
    output[piece.tokens, piece.heads] = merged.to(output.dtype).unflatten(0, (-1, work.group))
    lse[piece.tokens, piece.heads] = total.unflatten(0, (-1, work.group))


# ---- backward ------------------------------------------------------------------------------------------------------


def backward(
    grad_output, query, key, value, output, lse, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale
):
    """(grad_query, grad_key, grad_value): the engine contract."""
    grads = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    work = _Work.plan(query, key, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale, backward=True)
    if work is None:
        return grads
    wide = torch.promote_types(query.dtype, torch.float32)
    ahead = _keys_ahead(cu_seqlens_q, cu_seqlens_k, key.shape[0])
    for kv_head in range(key.shape[1]):
        sums = tuple(torch.zeros(key.shape[0], key.shape[2], dtype=wide, device=key.device) for _ in range(2))
        for piece in work.pieces_of(kv_head):
            rows = _Rows(*(x[piece.tokens, piece.heads] for x in (grad_output, query, output, lse)))
            grad_rows = _own_backward(work, piece, rows, key, value, sums, ahead)
            if work.slots:
                _add_past_backward(work, piece, rows, key, value, grad_rows, sums, ahead)
            grads[0][piece.tokens, piece.heads] = grad_rows.to(query.dtype).unflatten(0, (-1, work.group))
        grads[1][:, kv_head], grads[2][:, kv_head] = sums
    return grads


def _keys_ahead(cu_seqlens_q, cu_seqlens_k, total_k: int) -> int:
    """A bound on how much later a query's own key comes in the packed key than the query in the packed query."""
    if cu_seqlens_q.is_cuda and torch.cuda.is_current_stream_capturing():
        return total_k
    return int(cu_seqlens_k[-1] - cu_seqlens_q[-1])


@dataclass(frozen=True)
class _Rows:
    """A piece's rows, [tokens, group, ...]. A gradient may be expanded from one number, which no kernel reads."""

    grad: torch.Tensor
    query: torch.Tensor
    output: torch.Tensor
    lse: torch.Tensor


def _own_backward(work, piece, rows: _Rows, key, value, sums, ahead: int) -> torch.Tensor:
    """The own-block stream: returns grad_query in float32, [tokens · group, head_dim], and adds to the sums."""
    first = max(0, piece.tokens.start - work.block_size + 1)  # no own block of these tokens begins before it
    keys = slice(first, min(key.shape[0], piece.tokens.stop + ahead))
    segments = work.blocks.own_of(piece.tokens, first)
    k, v = (x[keys, piece.kv_head] for x in (key, value))
    grad_query, *grads = work.provider.backward(
        rows.grad.contiguous(), rows.query, k, v, rows.output, rows.lse.T, segments, work.scale
    )
    _add_grads(sums, keys, grads, segments)
    outside = work.blocks.outside[piece.tokens, None, None]
    return grad_query.masked_fill_(outside, 0).to(sums[0].dtype).flatten(0, 1)


def _add_past_backward(work, piece, rows: _Rows, key, value, grad_rows, sums, ahead: int) -> None:
    """The past-block stream: adds to grad_rows, [tokens · group, head_dim], and to the sums."""
    keys = slice(0, min(key.shape[0], piece.tokens.stop + ahead))
    past = work.order_by_block(piece, keys.stop)
    grad, query, output = (
        x.flatten(0, 1).index_select(0, past.row)[:, None] for x in (rows.grad, rows.query, rows.output)
    )
    lse = rows.lse.flatten().index_select(0, past.row)[None]
    k, v = (x[keys, piece.kv_head] for x in (key, value))
    grad_query, *grads = work.provider.backward(grad, query, k, v, output, lse, past.segments, work.scale)
    _add_grads(sums, keys, grads, past.segments)
    for slot in range(work.slots):
        grad_rows += past.take(grad_query, slot)


def _add_grads(sums, keys: slice, grads, segments: Segments) -> None:
    """Add the gradients of keys and values; those past the last segment are undefined."""
    undefined = torch.arange(keys.stop - keys.start, device=sums[0].device) >= segments.cu_seqlens_k[-1]
    for total, grad in zip(sums, grads):
        total[keys] += grad[:, 0].masked_fill_(undefined[:, None], 0)


# ---- what attends what ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blocks:
    """All blocks of the batch, complete or not, in the order of their keys. No host sync; shapes from shapes.

    cu_queries, cu_keys: int32 [blocks + 1]; block i holds the keys cu_keys[i]:cu_keys[i+1] and is the own block of the
        queries cu_queries[i]:cu_queries[i+1]. `blocks` is the most there can be; the surplus is empty.
    first_block: int32 [total_q], number of the first block of the query's sequence; `blocks` for rows of no sequence.
    key_end: int32 [total_q], the row after the query's own key; the end of all keys for rows of no sequence.
    outside: bool [total_q], rows of no sequence.
    """

    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    first_block: torch.Tensor
    key_end: torch.Tensor
    outside: torch.Tensor
    longest: int

    @classmethod
    def build(cls, cu_seqlens_q, cu_seqlens_k, total_q: int, total_k: int, block_size: int) -> "_Blocks":
        device, sequences = cu_seqlens_q.device, cu_seqlens_q.shape[0] - 1
        q_start, k_start, k_end = cu_seqlens_q[:-1], cu_seqlens_k[:-1], cu_seqlens_k[1:]
        offset = (k_end - k_start) - (cu_seqlens_q[1:] - q_start)
        last_block = ((k_end - k_start + block_size - 1) // block_size).cumsum(0, dtype=torch.int32)
        first_block = torch.cat([last_block.new_zeros(1), last_block[:-1]])

        blocks = total_k // block_size + sequences
        block = torch.arange(blocks, dtype=torch.int32, device=device)
        owner = torch.searchsorted(last_block, block, right=True)
        used = owner < sequences
        owner = owner.clamp(max=sequences - 1)
        begin = (block - first_block[owner]) * block_size
        queries = torch.where(used, q_start[owner] + (begin - offset[owner]).clamp(min=0), cu_seqlens_q[-1])
        keys = torch.where(used, k_start[owner] + begin, cu_seqlens_k[-1])

        row = torch.arange(total_q, dtype=torch.int32, device=device)
        sequence = torch.searchsorted(cu_seqlens_q[1:], row, right=True)
        outside = sequence == sequences
        sequence = sequence.clamp(max=sequences - 1)
        own_key_end = k_start[sequence] + row - q_start[sequence] + offset[sequence] + 1
        return cls(
            cu_queries=torch.cat([queries, cu_seqlens_q[-1:]]),
            cu_keys=torch.cat([keys, cu_seqlens_k[-1:]]),
            first_block=torch.where(outside, blocks, first_block[sequence]).int(),
            key_end=torch.where(outside, cu_seqlens_k[-1], own_key_end).int(),
            outside=outside,
            longest=max(2, min(block_size, total_k)),
        )

    @property
    def count(self) -> int:
        return self.cu_keys.shape[0] - 1

    def own(self) -> Segments:
        """Every query with its own block."""
        return Segments(self.cu_queries, self.cu_keys, self.longest, self.longest, causal=True)

    def own_of(self, tokens: slice, first_key: int) -> Segments:
        """The same for a range of tokens, over the keys from first_key on.

        A block's queries are its last keys, and the mask is aligned to that; where the range ends inside a block, the
        block must therefore end with the key of the range's last query.
        """
        key_end = self.key_end[tokens.stop - 1]
        cu_queries = self.cu_queries.clamp(tokens.start, tokens.stop) - tokens.start
        cu_keys = torch.minimum(self.cu_keys, key_end).clamp(min=first_key) - first_key
        return Segments(cu_queries, cu_keys, self.longest, self.longest, causal=True)


@dataclass(frozen=True)
class _Piece:
    """One KV head and one range of tokens. max_rows bounds the rows that select one block."""

    kv_head: slice
    heads: slice
    tokens: slice
    max_rows: int


@dataclass(frozen=True)
class _PastRows:
    """A piece's entries (row, slot) ordered by the block selected; a row is a token and a head of the group.

    row: int64 [entries], the row of each entry in this order. place: int64 [rows, slots], where each entry went.
    listed: bool [rows, slots], whether the entry names a block at all; those that do not come last, in no segment.
    """

    row: torch.Tensor
    place: torch.Tensor
    listed: torch.Tensor
    segments: Segments

    def take(self, entries: torch.Tensor, slot: int) -> torch.Tensor:
        """[entries, 1, head_dim] in block order → [rows, head_dim] of one slot; 0 where it names no block."""
        taken = entries[:, 0].index_select(0, self.place[:, slot])
        return taken.masked_fill_(~self.listed[:, slot, None], 0)


@dataclass(frozen=True)
class _Work:
    """How one forward or backward is cut up."""

    provider: flash_providers.Provider
    blocks: _Blocks
    selected_blocks: torch.Tensor
    kv_heads: int
    block_size: int
    scale: float
    ranges: list[slice]
    max_rows: list[list[int]]  # [range][kv_head]

    @classmethod
    def plan(
        cls, query, key, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale, backward: bool
    ) -> "_Work | None":
        """None where there is nothing to attend."""
        total_q, total_k = query.shape[0], key.shape[0]
        if total_q == 0 or total_k == 0:
            return None
        if scale <= 0:  # their running maximum is that of the unscaled scores
            raise ValueError(f"engine='flash' takes a scale above 0, as its kernels do, but was given {scale}")
        provider = flash_providers.choose(query.device.type, query.dtype, query.shape[2])
        blocks = _Blocks.build(cu_seqlens_q, cu_seqlens_k, total_q, total_k, block_size)
        if blocks.count > _MOST_SEGMENTS:
            raise ValueError(
                f"engine='flash' takes at most {_MOST_SEGMENTS} blocks in a batch, but there can be {blocks.count} of "
                f"{block_size} tokens in {total_k}; use larger blocks or another engine"
            )
        step = _tokens_per_range(query, key, selected_blocks.shape[2], blocks.count, backward)
        ranges = [slice(start, min(start + step, total_q)) for start in range(0, total_q, step)]
        max_rows = _max_rows(provider, blocks, selected_blocks, key.shape[1], ranges)
        return cls(provider, blocks, selected_blocks, key.shape[1], block_size, scale, ranges, max_rows)

    @property
    def group(self) -> int:
        return self.selected_blocks.shape[1] // self.kv_heads

    @property
    def slots(self) -> int:
        return self.selected_blocks.shape[2]

    def pieces(self) -> list[_Piece]:
        """The past stream's pieces, none where nothing can be selected."""
        return [piece for kv_head in range(self.kv_heads) for piece in self.pieces_of(kv_head) if self.slots]

    def pieces_of(self, kv_head: int) -> list[_Piece]:
        heads = slice(kv_head * self.group, (kv_head + 1) * self.group)
        one = slice(kv_head, kv_head + 1)
        return [_Piece(one, heads, tokens, rows[kv_head]) for tokens, rows in zip(self.ranges, self.max_rows)]

    def order_by_block(self, piece: _Piece, total_k: int) -> _PastRows:
        """Step 2: a stable sort of the piece's entries by block. No block listed may lie past total_k."""
        entry = _entry_blocks(self.blocks, self.selected_blocks, piece.tokens, piece.heads)
        listed = (entry < self.blocks.count).view(-1, self.slots)
        in_order, order = entry.flatten().sort(stable=True)
        bounds = torch.arange(self.blocks.count + 1, dtype=torch.int32, device=entry.device)
        cu_rows = torch.searchsorted(in_order, bounds, out_int32=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0], device=order.device)
        cu_keys = self.blocks.cu_keys.clamp(max=total_k)
        segments = Segments(cu_rows, cu_keys, piece.max_rows, self.blocks.longest, causal=False)
        return _PastRows(order // self.slots, place.view_as(listed), listed, segments)


def _entry_blocks(blocks: _Blocks, selected_blocks, tokens: slice, heads: slice) -> torch.Tensor:
    """int32 [tokens, heads, slots]: the number of the block selected, `blocks.count` where there is none."""
    selected = selected_blocks[tokens, heads]
    entry = selected + blocks.first_block[tokens, None, None]
    return entry.masked_fill_(selected < 0, blocks.count).clamp_(max=blocks.count)


# ---- sizes ---------------------------------------------------------------------------------------------------------


def _tokens_per_range(query, key, slots: int, blocks: int, backward: bool) -> int:
    """How many tokens of one KV head's group fit in the workspace: see the bytes counted here."""
    group, width, item = query.shape[1] // key.shape[1], query.shape[2], query.element_size()
    wide = torch.promote_types(query.dtype, torch.float32).itemsize
    sort = 64  # keys, order, rows, places and the sort's own buffers
    if backward:
        entry = (4 * item + wide) * width + sort  # query, output and their gradients; FlashAttention-2's dQ sums
        row = (6 * item + 3 * wide) * width  # the same for the own stream, and keys' gradients per head of the group
        fixed = (2 * wide + 2 * item) * width * key.shape[0] + wide * width * _TILE * blocks * group
    else:
        entry = 2 * item * width + sort  # query, partial output
        row = (2 * item + 3 * wide) * width
        fixed = 0
    budget = int(os.environ.get("MOBA_HF_WORKSPACE_MB", "1024")) << 20
    return max(_TILE, max(budget - fixed, budget // 4) // (group * (slots * entry + row)))


def _max_rows(provider, blocks: _Blocks, selected_blocks, kv_heads: int, ranges: list[slice]) -> list[list[int]]:
    """For each range and KV head, a bound on the rows that select one block; measured only where that pays.

    A row selects a block at most once, so tokens · group bounds it: an attention sink reaches that. Kernels that launch
    ceil(bound / 128) thread blocks for every block would then start far more empty ones than the work needs.
    """
    group, slots = selected_blocks.shape[1] // kv_heads, selected_blocks.shape[2]
    bounds = [max(2, (tokens.stop - tokens.start) * group) for tokens in ranges]
    launched = (bounds[0] // _TILE + 1) * blocks.count
    needed = bounds[0] * slots // _TILE + blocks.count
    capturing = selected_blocks.is_cuda and torch.cuda.is_current_stream_capturing()
    if not slots or not provider.launches_by_max_seqlen or launched <= 4 * needed or capturing:
        return [[bound] * kv_heads for bound in bounds]
    longest = torch.stack([_longest_lists(blocks, selected_blocks, kv_heads, tokens) for tokens in ranges])
    return longest.clamp_(min=2).tolist()


def _longest_lists(blocks: _Blocks, selected_blocks, kv_heads: int, tokens: slice) -> torch.Tensor:
    """int32 [kv_heads]: the most rows of the range that select one block."""
    bins = blocks.count + 1
    entry = _entry_blocks(blocks, selected_blocks, tokens, slice(None)).unflatten(1, (kv_heads, -1))
    entry += torch.arange(kv_heads, dtype=torch.int32, device=entry.device)[:, None, None] * bins
    one = torch.ones(1, dtype=torch.int32, device=entry.device)
    counts = one.new_zeros(kv_heads * bins).scatter_add_(0, entry.flatten().long(), one.expand(entry.numel()))
    return counts.view(kv_heads, bins)[:, :-1].amax(1)
