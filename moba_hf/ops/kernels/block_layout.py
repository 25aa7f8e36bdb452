"""`BlockLayout` on a GPU in one launch: the same integers as `BlockLayout.build`, whose thirty small operations take
longer than routing does at 8K tokens (measured on an H100: 0.4 ms a time)."""

import torch
import triton
import triton.language as tl

from ..blocks import BlockLayout

_ROWS = 256


@triton.jit(do_not_specialize=["sequences", "rows", "n_blocks", "total_k"])
def layout_kernel(
    ends_q_ptr, ends_k_ptr, position_ptr, own_start_ptr, key_row_ptr, first_block_ptr, block_start_ptr,
    sequences, rows, n_blocks, total_k, block_size,
    ROWS: tl.constexpr,
):  # fmt: skip
    """`BlockLayout` of ROWS queries and of ROWS blocks.

    Program i owns the queries and the blocks i · ROWS … (i + 1) · ROWS − 1, as far as there are any; each finds its
    sequence by bisection. ends_q, ends_k: int32 [sequences + 1], cumulative lengths; position, own_start, key_row,
    first_block: int32 [rows] and block_start: int32 [n_blocks], the fields of `BlockLayout`, every element written
    once.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sequence = _bisect(ends_q_ptr + 1, row, sequences, ROWS)
    inside = (row < rows) & (sequence < sequences)
    end_q = tl.load(ends_q_ptr + sequence + 1, mask=inside, other=0)
    start_k, end_k = _span(ends_k_ptr, sequence, inside)
    key_row = end_k - (end_q - row)
    position = key_row - start_k
    tl.store(position_ptr + row, tl.where(inside, position, -1), mask=row < rows)
    tl.store(own_start_ptr + row, tl.where(inside, key_row - position % block_size, total_k), mask=row < rows)
    tl.store(key_row_ptr + row, tl.where(inside, key_row, total_k), mask=row < rows)
    tl.store(first_block_ptr + row, start_k // block_size, mask=row < rows)

    block = row  # if several sequences begin with its number, it is the last one's: the others are shorter than a block
    sequence = _bisect(ends_k_ptr + 1, block * block_size + block_size - 1, sequences, ROWS)
    used = (block < n_blocks) & (sequence < sequences)
    start_k, end_k = _span(ends_k_ptr, sequence, used)
    start = start_k + (block - start_k // block_size) * block_size
    used = used & (start + block_size <= end_k)
    tl.store(block_start_ptr + block, tl.where(used, start, total_k), mask=block < n_blocks)


@triton.jit(do_not_specialize=["rows", "total_k", "tiles"])
def key_tile_kernel(
    own_start_ptr, key_row_ptr, first_query_ptr, end_query_ptr, rows, total_k, tiles,
    KEYS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Which queries attend TILES tiles of KEYS keys as their own block's.

    Program i owns the tiles i · TILES … of the packed keys, and bisects for each. own_start, key_row: int32 [rows],
    `BlockLayout`'s, both rising; first_query, end_query: int32 [tiles], every element written once.
    """
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    last_key = tl.minimum(tile * KEYS + KEYS, total_k) - 1
    tl.store(first_query_ptr + tile, _bisect(key_row_ptr, tile * KEYS - 1, rows, TILES), mask=tile < tiles)
    tl.store(end_query_ptr + tile, _bisect(own_start_ptr, last_key, rows, TILES), mask=tile < tiles)


@triton.jit
def _span(ends_ptr, sequence, mask):
    """First row of each sequence, and the one after its last; 0 where masked."""
    start = tl.load(ends_ptr + sequence, mask=mask, other=0)
    return start, tl.load(ends_ptr + sequence + 1, mask=mask, other=0)


@triton.jit
def _bisect(ends_ptr, value, size, ROWS: tl.constexpr):
    """How many of the `size` rising numbers at ends_ptr are ≤ value."""
    low = tl.zeros([ROWS], tl.int32)
    high = tl.zeros([ROWS], tl.int32) + size
    steps = size
    while steps > 0:
        middle = (low + high) // 2
        open_ = low < high
        after = open_ & (tl.load(ends_ptr + middle, mask=open_, other=0) <= value)
        low = tl.where(after, middle + 1, low)
        high = tl.where(open_ & (after == 0), middle, high)
        steps = steps // 2
    return low


def block_layout(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, total_q: int, total_k: int, block_size: int
) -> BlockLayout:
    """As `BlockLayout.build`, whose arguments and result it has."""
    device, n_blocks, sequences = cu_seqlens_q.device, total_k // block_size, cu_seqlens_q.shape[0] - 1
    queries = torch.empty((4, total_q), dtype=torch.int32, device=device).unbind()
    layout = BlockLayout(*queries, torch.empty(n_blocks, dtype=torch.int32, device=device))
    if total_q or n_blocks:
        layout_kernel[(triton.cdiv(max(total_q, n_blocks), _ROWS),)](
            cu_seqlens_q, cu_seqlens_k, *queries, layout.block_start,
            sequences, total_q, n_blocks, total_k, block_size, ROWS=_ROWS,
        )  # fmt: skip
    return layout


def own_queries(own_start: torch.Tensor, key_row: torch.Tensor, total_k: int, keys: int) -> torch.Tensor:
    """int32 [2, tiles]: for each tile of `keys` packed keys, the first query whose own block meets it, and the end."""
    tiles = triton.cdiv(total_k, keys)
    queries = torch.empty((2, tiles), dtype=torch.int32, device=own_start.device)
    if tiles:
        key_tile_kernel[(triton.cdiv(tiles, _ROWS),)](
            own_start, key_row, *queries.unbind(), own_start.shape[0], total_k, tiles, KEYS=keys, TILES=_ROWS
        )
    return queries
