"""MoBA in plain PyTorch, on any device; the default on a CPU.

Own blocks are contiguous tiles. For past blocks, the rows (token, head of the group) that chose a block are gathered
from all heads of the group, attend it in one call, and are merged into the running result by their log-sum-exp: no
partial result of size tokens · top_k is ever kept, and K/V are never repeated for the heads of a group.
"""

from typing import NamedTuple

import torch

from ..blocks import Span, sequence_spans
from .tiles import Accumulators, attend, attend_backward, merge, own_block_tiles, tile_backward, tile_forward

_MOST_ROWS = 16384  # rows gathered at a time: bounds the workspace where many queries choose one block
_FEWEST_ROWS = 64  # worth a thread of their own in the backward


def unavailable() -> None:
    """Runs wherever PyTorch does."""


def forward(query, key, value, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale):
    """See the engine contract in `engines/__init__.py`."""
    spans = sequence_spans(cu_seqlens_q, cu_seqlens_k)
    result = Accumulators.empty(query)
    attend(own_block_tiles(spans, block_size), query, key, value, scale, result)
    flat_query, output, lse = query.flatten(0, 1), result.output.flatten(0, 1), result.lse.flatten()
    for gathered in _past_blocks(selected_blocks, spans, block_size, key.shape[1]):
        rows, (k, v) = gathered.rows, gathered.keys(key, value, block_size)
        tile_output, tile_lse = tile_forward(_take(flat_query, rows[None]), k, v, scale)
        rows_output, rows_lse = output.index_select(0, rows), lse.index_select(0, rows)
        merge(rows_output, rows_lse, tile_output[0, 0], tile_lse[0, 0])
        _in_large_elements(output).index_copy_(0, rows, _in_large_elements(rows_output))
        lse.index_copy_(0, rows, rows_lse)
    return result.output.to(query.dtype), result.lse


def backward(
    grad_output, query, key, value, output, lse, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale
):
    """See the engine contract in `engines/__init__.py`."""
    spans = sequence_spans(cu_seqlens_q, cu_seqlens_k)
    grads = [x.new_zeros(x.shape, dtype=lse.dtype) for x in (query, key, value)]
    tiles = own_block_tiles(spans, block_size)
    attend_backward(tiles, grad_output, query, key, value, output, lse, scale, grads)
    flat_grad, flat_query, flat_output = (x.flatten(0, 1) for x in (grad_output, query, output))
    flat_lse, grad_rows = lse.flatten(), grads[0].flatten(0, 1)
    for gathered in _past_blocks(selected_blocks, spans, block_size, key.shape[1]):
        rows, (k, v) = gathered.rows, gathered.keys(key, value, block_size)
        pieces = _pieces(rows)
        grad_query, *grad_keys = tile_backward(
            _take(flat_grad, pieces), _take(flat_query, pieces), k.expand(len(pieces), -1, -1, -1),
            v.expand(len(pieces), -1, -1, -1), _take(flat_output, pieces), _padded_lse(flat_lse, pieces, rows), scale,
        )  # fmt: skip
        grad_rows.index_add_(0, rows, grad_query.flatten(0, 2)[: len(rows)].to(grad_rows.dtype))
        for total, grad in zip(gathered.keys(*grads[1:], block_size), grad_keys):
            total[0].add_(grad.sum(0, dtype=total.dtype))
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, (query, key, value)))


class _Gathered(NamedTuple):
    """Rows of the flattened [total_q · heads] that attend one past block of one kv head."""

    rows: torch.Tensor
    kv_head: int
    key_start: int

    def keys(self, key, value, block_size: int):
        """Views [1, 1, block_size, head_dim] of the block."""
        block = slice(self.key_start, self.key_start + block_size)
        return key[None, None, block, self.kv_head], value[None, None, block, self.kv_head]


def _take(states, pieces):
    """Rows of [total_q · heads, head_dim] as [pieces, 1, rows, head_dim]; pieces: int64 [pieces, rows]."""
    return states.index_select(0, pieces.flatten()).unflatten(0, pieces.shape)[:, None]


def _in_large_elements(rows: torch.Tensor) -> torch.Tensor:
    """The same memory in elements of 16 bytes, where that divides a row: [rows, fewer] for contiguous [rows, head_dim].

    The CPU's index_copy_ moves one element at a time: 0.22 instead of 0.38 ms for 4600 rows of 64 floats.
    """
    fits = rows.device.type == "cpu" and rows.shape[1] * rows.element_size() % 16 == 0
    return rows.view(torch.complex128) if fits else rows


def _pieces(rows: torch.Tensor) -> torch.Tensor:
    """The rows cut into equal pieces, one a thread: [pieces, rows a piece]. The last row fills up what is missing.

    The CPU kernel's backward shares out (batch, head) alone among its threads. A single one leaves each of its small
    products to all threads in turn: 32 instead of 17 ms for 4600 rows × 512 keys, and far worse on a busy machine.
    """
    threads = torch.get_num_threads() if rows.device.type == "cpu" else 1
    count = max(1, min(threads, len(rows) // _FEWEST_ROWS))
    missing = -len(rows) % count
    return torch.cat([rows, rows[-1:].expand(missing)]).view(count, -1) if missing else rows.view(count, -1)


def _padded_lse(lse: torch.Tensor, pieces: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[pieces, 1, rows a piece], infinite in the filled-up places: their weights, and so their gradients, are 0."""
    taken = lse.index_select(0, pieces.flatten())
    taken[len(rows) :] = float("inf")
    return taken.view(len(pieces), 1, -1)


def _past_blocks(selected_blocks: torch.Tensor, spans: list[Span], block_size: int, kv_heads: int):
    """Everything chosen, block by block: a stable sort of the entries (row, slot) by block, one kv head at a time."""
    heads, slots = selected_blocks.shape[1:]
    numbers, key_starts = _numbered(selected_blocks, spans, block_size)
    blocks, group = len(key_starts), heads // kv_heads
    if slots == 0 or blocks == 0:
        return
    numbers = numbers.to(torch.int16 if blocks < 2**15 else torch.int32)  # int16 sorts twice as fast
    for kv_head in range(kv_heads):
        entries = numbers[:, kv_head * group : (kv_head + 1) * group].flatten()
        counts = entries.bincount(minlength=blocks + 1)[:blocks].tolist()
        order = entries.sort(stable=True).indices[: sum(counts)].div_(slots, rounding_mode="floor")
        rows = order + order.div(group, rounding_mode="floor") * (heads - group) + kv_head * group
        for key_start, chosen in zip(key_starts, rows.split(counts)):
            for part in chosen.split(_MOST_ROWS) if chosen.numel() else ():
                yield _Gathered(part, kv_head, key_start)


def _numbered(selected_blocks, spans: list[Span], block_size: int):
    """Block numbers counted through all sequences (the number of blocks where none is chosen), and their first keys."""
    numbers = torch.full_like(selected_blocks, -1)
    key_starts: list[int] = []
    for span in spans:
        chosen = selected_blocks[span.query_start : span.query_end]
        numbers[span.query_start : span.query_end] = torch.where(chosen < 0, -1, chosen + len(key_starts))
        key_starts += range(span.key_start, span.key_end - block_size + 1, block_size)
    return numbers.masked_fill_(numbers < 0, len(key_starts)), key_starts
