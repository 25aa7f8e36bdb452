"""MoBA in plain PyTorch, on any device; the default on a CPU.

One range of queries and one kv head at a time. Own blocks are contiguous tiles. For past blocks, the rows (token, head
of the group) that chose a block are gathered from all heads of the group and attend it in one call; K/V are never
repeated for the heads of a group. What a row gets from its own block and from each block it chose lies in one table,
and the weighted sum of its places there is the result; the backward sums the shares of a query's gradient likewise.

The ranges bound the table. It and the buffers for gathered rows are used again and again: fresh memory costs a CPU more
than the work on it (gathering 75 MB: 33 ms, and 9 into memory used before), and a table summed by one `embedding_bag`
less than merging every block's output into the rows that chose it (24 against 290 ms of 2 s).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import embedding_bag

from ..blocks import Span, query_ranges, sequence_spans
from .softmax_merge import merge_weights
from .tiles import Accumulators, Tile, attend, attend_backward, own_block_tiles, tile_backward, tile_forward

_FORWARD_TABLE, _BACKWARD_TABLE = 48 << 20, 32 << 20  # bytes; the backward holds the gradients as well
_MOST_ROWS = 8192  # rows gathered at a time: bounds the buffers where many queries choose one block
_FEWEST_ROWS = 64  # worth a thread of their own in the backward
_LONGEST_SUM = 3072  # rows in a piece: the gradients of a block's keys lose digits in longer sums


def unavailable() -> None:
    """Runs wherever PyTorch does."""


def forward(query, key, value, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale):
    """See the engine contract in `engines/__init__.py`."""
    spans = sequence_spans(cu_seqlens_q, cu_seqlens_k)
    output, lse = _empty_result(query, spans)
    (buffer,), flat_query = _buffers(query, 1), query.flatten(0, 1)
    for part in _parts(query, key, selected_blocks, spans, block_size, _FORWARD_TABLE):
        table, table_lse = part.table, part.table.new_empty(len(part.table))
        own = Accumulators(part.own(table), part.own(table_lse))
        attend(part.tiles, query[part.queries, part.heads], part.one_head(key), part.one_head(value), scale, own)
        for block in part.blocks:
            pieces = _pieces(block.rows)
            rows, k, v = _take(flat_query, pieces, buffer), *(block.keys(x, len(pieces)) for x in (key, value))
            for places, result in zip((table, table_lse), tile_forward(rows, k, v, scale)):
                places[block.places].copy_(result.flatten(0, 2)[: len(block.rows)])
        weights, total = merge_weights(part.by_row(table_lse, float("-inf")))
        output[part.queries, part.heads] = part.own(part.sum(weights))
        lse[part.queries, part.heads] = part.own(total)
    return output, lse


def backward(
    grad_output, query, key, value, output, lse, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale
):
    """See the engine contract in `engines/__init__.py`."""
    spans = sequence_spans(cu_seqlens_q, cu_seqlens_k)
    grad_query = _empty_result(query, spans)[0]
    grad_keys = [x.new_zeros(x.shape, dtype=lse.dtype) for x in (key, value)]
    by_token, buffers = (grad_output, query, output), _buffers(query, 3)
    flat, flat_lse = [x.flatten(0, 1) for x in by_token], lse.flatten()
    for part in _parts(query, key, selected_blocks, spans, block_size, _BACKWARD_TABLE):
        grads = [part.own(part.table).zero_(), *(part.one_head(x) for x in grad_keys)]
        here = [x[part.queries, part.heads] for x in (*by_token, lse)]
        attend_backward(part.tiles, *here[:2], part.one_head(key), part.one_head(value), *here[2:], scale, grads)
        for block in part.blocks:
            pieces = _pieces(block.rows)
            grad, rows, rows_output = (_take(x, pieces, buffer) for x, buffer in zip(flat, buffers))
            k, v = (block.keys(x, len(pieces)) for x in (key, value))
            rows_lse = _padded_lse(flat_lse, pieces, len(block.rows))
            grad_rows, *block_grads = tile_backward(grad, rows, k, v, rows_output, rows_lse, scale)
            part.table[block.places].copy_(grad_rows.flatten(0, 2)[: len(block.rows)])
            for total, block_grad in zip(grad_keys, block_grads):
                block.keys(total)[0, 0].add_(block_grad.sum((0, 1), dtype=total.dtype))
        there = part.by_row(part.table.new_ones(len(part.table)), 0.0)
        grad_query[part.queries, part.heads] = part.own(part.sum(there))
    return grad_query, *(grad.to(key.dtype) for grad in grad_keys)


def _empty_result(query, spans: list[Span]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE to be filled in; rows that belong to no sequence have theirs."""
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
    end = spans[-1].query_end if spans else 0
    output[end:], lse[end:] = 0.0, float("-inf")
    return output, lse


# ---- one range of queries, one kv head -----------------------------------------------------------------------------


class _Block(NamedTuple):
    """Rows of the flattened [total_q · heads] that attend one past block, and where their results go in the table."""

    rows: torch.Tensor
    places: slice
    kv_head: int
    key_start: int
    block_size: int

    def keys(self, states, pieces: int = 1):
        """The block as a view [pieces, 1, block_size, head_dim] of packed keys or values."""
        block = states[self.key_start : self.key_start + self.block_size, self.kv_head]
        return block.expand(pieces, 1, -1, -1)


@dataclass(frozen=True)
class _Part:
    """What one range of queries attends in one kv head.

    The table [places, head_dim], float32 or wider, has one place for each row (token, head of the group), its own
    block, and then one for each block that a row chose, block by block. `index` [rows, 1 + slots] says where a row's
    places are; a slot that chose nothing points at the row's own place. `entries` are the positions in the flattened
    index of the places after the rows.
    """

    queries: slice
    kv_head: int
    group: int
    tiles: list[Tile]  # of the own blocks; query rows counted from the start of the range
    blocks: list[_Block]
    table: torch.Tensor
    index: torch.Tensor
    entries: torch.Tensor

    @property
    def heads(self) -> slice:
        return slice(self.kv_head * self.group, (self.kv_head + 1) * self.group)

    def one_head(self, states):
        """[tokens, 1, head_dim] of packed keys or values."""
        return states[:, self.kv_head : self.kv_head + 1]

    def own(self, places):
        """The part of a table-like tensor that belongs to own blocks: [tokens of the range, group, …]."""
        return places[: len(self.index)].unflatten(0, (-1, self.group))

    def by_row(self, places, missing: float):
        """One number for each place as [rows, 1 + slots], `missing` where a slot chose nothing."""
        spread = places.new_full(self.index.shape, missing)
        spread[:, 0] = places[: len(self.index)]
        spread.view(-1).index_copy_(0, self.entries, places[len(self.index) :])
        return spread

    def sum(self, weights):
        """Σ weights · places of each row: [rows, head_dim]."""
        return embedding_bag(self.index, self.table, mode="sum", per_sample_weights=weights)


def _parts(query, key, selected_blocks, spans: list[Span], block_size: int, table_bytes: int):
    """Everything to compute, in pieces whose table takes so many bytes at most; it is the same memory each time."""
    (total, heads, head_dim), kv_heads, columns = query.shape, key.shape[1], 1 + selected_blocks.shape[2]
    group, wide = heads // kv_heads, torch.promote_types(query.dtype, torch.float32)
    tokens = table_bytes // (group * columns * head_dim * wide.itemsize)
    tokens = max(1, min(total, max(1, tokens // block_size) * block_size))
    memory = query.new_empty(tokens * group * columns, head_dim, dtype=wide)
    for queries, inside in query_ranges(spans, tokens):
        numbers, key_starts = _numbered(selected_blocks[queries], inside, block_size)
        tiles = own_block_tiles(inside, block_size)
        for kv_head in range(kv_heads):
            entries, counts = _sorted_entries(numbers[:, kv_head * group : (kv_head + 1) * group], len(key_starts))
            index, entries, rows = _index_table(entries, numbers.shape[0] * group, columns)
            rows = rows + rows.div(group, rounding_mode="floor") * (heads - group)
            rows += queries.start * heads + kv_head * group  # as rows of the flattened query
            blocks = _blocks(rows, counts, key_starts, len(index), kv_head, block_size)
            table = memory[: index.shape[0] + len(entries)]
            yield _Part(queries, kv_head, group, tiles, blocks, table, index, entries)


def _numbered(selected_blocks, spans: list[Span], block_size: int):
    """Block numbers counted through all sequences (the number of blocks where none is chosen), and their first keys."""
    numbers = torch.full_like(selected_blocks, -1)
    key_starts: list[int] = []
    for span in spans:
        chosen = selected_blocks[span.query_start : span.query_end]
        numbers[span.query_start : span.query_end] = torch.where(chosen < 0, -1, chosen + len(key_starts))
        key_starts += range(span.key_start, span.key_end - block_size + 1, block_size)
    numbers.masked_fill_(numbers < 0, len(key_starts))
    return numbers.to(torch.int16 if len(key_starts) < 2**15 else torch.int32), key_starts  # int16 sorts twice as fast


def _sorted_entries(numbers, blocks: int) -> tuple[torch.Tensor, list[int]]:
    """The entries (row, slot) that chose a block, flattened, by block and then by row; how many each block has."""
    numbers = numbers.flatten()
    counts = numbers.bincount(minlength=blocks + 1)[:blocks].tolist() if blocks else []
    return numbers.sort(stable=True).indices[: sum(counts)], counts


def _index_table(entries, rows: int, columns: int):
    """The index of `_Part`, the positions in it of the sorted entries, and their rows."""
    own = torch.arange(rows, device=entries.device)
    index = own[:, None].repeat(1, columns)
    if columns == 1:
        return index, entries, entries
    chosen = entries.div(columns - 1, rounding_mode="floor")
    positions = entries + chosen + 1
    index.view(-1).index_copy_(0, positions, torch.arange(rows, rows + len(entries), device=entries.device))
    return index, positions, chosen


def _blocks(rows, counts: list[int], key_starts: list[int], place: int, kv_head: int, block_size: int) -> list[_Block]:
    """Past blocks that were chosen; what many rows chose, in several pieces."""
    blocks = []
    for key_start, chosen in zip(key_starts, rows.split(counts)):
        for piece in chosen.split(_MOST_ROWS) if chosen.numel() else ():
            blocks.append(_Block(piece, slice(place, place + len(piece)), kv_head, key_start, block_size))
            place += len(piece)
    return blocks


# ---- gathered rows -------------------------------------------------------------------------------------------------


def _buffers(query, count: int) -> list[torch.Tensor]:
    most = _MOST_ROWS + _MOST_ROWS // _LONGEST_SUM + torch.get_num_threads()  # `_pieces` fills up the last one
    return [query.new_empty(most, query.shape[-1]) for _ in range(count)]


def _take(states, pieces, buffer):
    """Rows of [total_q · heads, head_dim] as [pieces, 1, rows, head_dim], in the buffer; pieces: [pieces, rows]."""
    taken = buffer[: pieces.numel()]
    torch.index_select(states, 0, pieces.flatten(), out=taken)
    return taken.unflatten(0, pieces.shape)[:, None]


def _pieces(rows: torch.Tensor) -> torch.Tensor:
    """The rows cut into equal pieces, one or more a thread: [pieces, rows a piece]. The last row fills up the rest.

    The CPU kernel's backward shares out (batch, head) alone among its threads. A single one leaves each of its small
    products to all threads in turn: 32 instead of 17 ms for 4600 rows × 512 keys, and far worse on a busy machine. Its
    forward shares out runs of 256 rows, which for 3100 rows are 7 for one of two threads and 6, the last of them short,
    for the other.
    """
    threads = torch.get_num_threads() if rows.device.type == "cpu" else 1
    count = max(1, min(threads, len(rows) // _FEWEST_ROWS)) * -(-len(rows) // (threads * _LONGEST_SUM))
    missing = -len(rows) % count
    return torch.cat([rows, rows[-1:].expand(missing)]).view(count, -1) if missing else rows.view(count, -1)


def _padded_lse(lse: torch.Tensor, pieces: torch.Tensor, rows: int) -> torch.Tensor:
    """[pieces, 1, rows a piece], infinite in the filled-up places: their weights, and so their gradients, are 0."""
    taken = lse.index_select(0, pieces.flatten())
    taken[rows:] = float("inf")
    return taken.view(len(pieces), 1, -1)
