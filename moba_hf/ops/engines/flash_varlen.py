"""The paper's five steps (arXiv 2502.13189, Algorithm 1) over variable-length FlashAttention kernels.

Routing (step 1) is done; here rows are ordered by the block they selected (2), FlashAttention runs once over the own
blocks, causally, and once over the past blocks, without a mask (3), the outputs go back in order (4), and the streams
are merged by their log-sum-exp (5). The backward gives FlashAttention's backward the merged output and log-sum-exp,
which makes each stream's gradients those of its share of the one softmax.

GQA: keys and values are never repeated. The own stream uses the kernels' own GQA; in the past stream the rows of all
heads of a group, which select different blocks, are queries of their one KV head. That work is cut up (flash_plan) so
that its memory stays within MOBA_HF_WORKSPACE_MB (1024 by default, read at every call): gathered rows, partial outputs,
sort keys, what the kernels pad; in the backward also each call's key gradients and the float32 sums of dK and dV. Those
sums of one KV head fill 1 GiB at 1M tokens of head_dim 128. Long sequences therefore hold them in halves, in storage of
the results that is not needed yet (gradient_sums). What can still exceed the workspace, in the backward of millions of
tokens: what is held for each key of the last KV head where queries are fewer than keys (4 bytes per key element), and
of every head while a CUDA graph is captured.

Host syncs, their number independent of tokens and sequences: one in the backward, for how far keys run ahead of
queries; two in a backward so long that blocks come in tiles, for the rows and keys of each; one per pass with kernels
that launch a thread block per tile of the longest segment (FlashAttention-2), for the length of the longest list of
rows, where the bound known from shapes would launch mostly empty blocks. None happens while a CUDA graph is captured;
the bounds known from shapes serve instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import flash_providers
from .flash_plan import Work
from .flash_providers import Segments
from .gradient_sums import HalvedSums, WholeSums
from .softmax_merge import merge_weights


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
    work = Work.plan(query, key, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale, backward=False)
    if work is None:
        return torch.zeros_like(query, memory_format=torch.contiguous_format), _no_keys(query)
    output, lse = work.provider.forward(query, key, value, work.blocks.own(), scale)
    output = output.masked_fill_(work.blocks.outside[:, None, None], 0)
    lse = lse.T.masked_fill(work.blocks.outside[:, None], float("-inf"))
    for piece in work.pieces():
        if piece.tiles:
            _add_past_forward(work, piece, query, key, value, output, lse)
    return output, lse.contiguous()


def _no_keys(query):
    return query.new_full(query.shape[:2], float("-inf"), dtype=torch.promote_types(query.dtype, torch.float32))


def _add_past_forward(work, piece, query, key, value, output, lse) -> None:
    """Attend the past blocks of the piece, one tile in the forward, and merge them into its rows of output and lse."""
    past, (tile,) = work.order_by_block(piece), piece.tiles
    rows = query[piece.tokens, piece.heads].flatten(0, 1).index_select(0, past.row[tile.entries])[:, None]
    k, v = (x[tile.keys, piece.kv_head] for x in (key, value))
    part, part_lse = work.provider.forward(rows, k, v, past.segments(tile), work.scale)
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
    work = Work.plan(query, key, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale, backward=True)
    if work is None:
        return grads
    for kv_head, sums in _sums(work, grads):
        for piece in work.pieces_of(kv_head):
            rows = _Rows(*(x[piece.tokens, piece.heads] for x in (grad_output, query, output, lse)))
            grad_rows = _own_backward(work, piece, rows, key, value, sums)
            if piece.tiles:
                _add_past_backward(work, piece, rows, key, value, grad_rows, sums)
            sums.finish(piece.finished)  # first: what they lack may lie in these rows of dQ
            grads[0][piece.tokens, piece.heads] = grad_rows.to(query.dtype).unflatten(0, (-1, work.group))
        del sums  # before the next ones are made
    return grads


def _sums(work, grads) -> Iterator[tuple[int, WholeSums | HalvedSums]]:
    """(KV head, sums of its dK and dV), in turn; each takes the head's whole backward.

    With tiles, the lower halves lie where results are still to come: in the dQ of tokens whose turn has not come, or in
    the dK and dV of the next head. The last head, where each query head has a KV head of its own, finds room for one of
    the two at a time: its backward runs twice.
    """
    for kv_head in range(work.kv_heads):
        own = [x[:, kv_head] for x in grads[1:]]
        if not work.tiled or own[0].element_size() != 2:
            yield kv_head, WholeSums(own)
            continue
        room = [grads[0][:, kv_head * work.group + i] for i in range(work.spare_heads)]
        room += [x[:, kv_head + 1] for x in grads[1:] if kv_head + 1 < work.kv_heads]
        if len(room) == 1:
            yield from ((kv_head, HalvedSums(own[i : i + 1], room, first=i)) for i in range(2))
        else:
            yield kv_head, HalvedSums(own, room[:2] or [torch.empty_like(x) for x in own])


@dataclass(frozen=True)
class _Rows:
    """A piece's rows, [tokens, group, ...]. A gradient may be expanded from one number, which no kernel reads."""

    grad: torch.Tensor
    query: torch.Tensor
    output: torch.Tensor
    lse: torch.Tensor


def _own_backward(work, piece, rows: _Rows, key, value, sums) -> torch.Tensor:
    """The own-block stream: returns grad_query in float32, [tokens · group, head_dim], and adds to the sums."""
    segments = work.own_segments(piece)
    k, v = (x[piece.own_keys, piece.kv_head] for x in (key, value))
    grad_query, *grads = work.provider.backward(
        rows.grad.contiguous(), rows.query, k, v, rows.output, rows.lse.T, segments, work.scale
    )
    _add_grads(sums, piece.own_keys, grads, segments)
    outside = work.blocks.outside[piece.tokens, None, None]
    wide = torch.promote_types(grad_query.dtype, torch.float32)
    return grad_query.masked_fill_(outside, 0).to(wide).flatten(0, 1)


def _add_past_backward(work, piece, rows: _Rows, key, value, grad_rows, sums) -> None:
    """The past-block stream: adds to grad_rows, [tokens · group, head_dim], and to the sums."""
    past = work.order_by_block(piece)
    parts = [_tile_backward(work, piece, tile, past, rows, key, value, sums) for tile in piece.tiles]
    grad_query = torch.cat(parts) if len(parts) > 1 else parts[0]
    for slot in range(work.slots):
        grad_rows += past.take(grad_query, slot)


def _tile_backward(work, piece, tile, past, rows: _Rows, key, value, sums) -> torch.Tensor:
    """grad_query of the tile's entries, [entries, 1, head_dim]; adds to the sums."""
    row, segments = past.row[tile.entries], past.segments(tile)
    grad, query, output = (x.flatten(0, 1).index_select(0, row)[:, None] for x in (rows.grad, rows.query, rows.output))
    lse = rows.lse.flatten().index_select(0, row)[None]
    k, v = (x[tile.keys, piece.kv_head] for x in (key, value))
    grad_query, *grads = work.provider.backward(grad, query, k, v, output, lse, segments, work.scale)
    _add_grads(sums, tile.keys, grads, segments)
    return grad_query


def _add_grads(sums, keys: slice, grads, segments: Segments) -> None:
    """Add the gradients of keys and values; those past the last segment are undefined."""
    undefined = torch.arange(keys.stop - keys.start, device=grads[0].device) >= segments.cu_seqlens_k[-1]
    sums.add(keys, [grad[:, 0].masked_fill_(undefined[:, None], 0) for grad in grads])
