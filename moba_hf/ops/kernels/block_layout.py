"""`BlockLayout` on a GPU in a handful of launches: the same integers as `BlockLayout.build`, whose thirty small
operations take longer than routing does at 8K tokens (measured on an H100: 0.4 ms a time)."""

import torch
import triton
import triton.language as tl

from ..blocks import BlockLayout

_ROWS = 256


@triton.jit(do_not_specialize=["sequences", "rows"])
def query_layout_kernel(
    ends_q_ptr, ends_k_ptr, blocks_ptr, position_ptr, key_start_ptr, first_block_ptr, sequences, rows, block_size,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Position, first key row and first block of ROWS queries.

    ends_q, ends_k: int32 [sequences + 1], cumulative lengths; blocks: int32 [sequences], complete blocks up to and
    with each sequence. Each query finds its sequence by bisection.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sequence = _bisect(ends_q_ptr + 1, row, sequences, ROWS)
    inside = (row < rows) & (sequence < sequences)
    start_q = tl.load(ends_q_ptr + sequence, mask=inside, other=0)
    end_q = tl.load(ends_q_ptr + sequence + 1, mask=inside, other=0)
    start_k = tl.load(ends_k_ptr + sequence, mask=inside, other=0)
    end_k = tl.load(ends_k_ptr + sequence + 1, mask=inside, other=0)
    blocks = tl.load(blocks_ptr + sequence, mask=inside, other=0)
    position = (row - start_q) + (end_k - start_k) - (end_q - start_q)
    first = blocks - (end_k - start_k) // block_size
    tl.store(position_ptr + row, tl.where(inside, position, -1), mask=row < rows)
    tl.store(key_start_ptr + row, start_k, mask=row < rows)
    tl.store(first_block_ptr + row, first, mask=row < rows)


@triton.jit(do_not_specialize=["sequences", "n_blocks", "total_k"])
def block_start_kernel(
    ends_k_ptr, blocks_ptr, block_start_ptr, sequences, n_blocks, total_k, block_size, ROWS: tl.constexpr
):
    """First key row of ROWS complete blocks; pointers as in `query_layout_kernel`; total_k where unused."""
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sequence = _bisect(blocks_ptr, block, sequences, ROWS)
    used = (block < n_blocks) & (sequence < sequences)
    start_k = tl.load(ends_k_ptr + sequence, mask=used, other=0)
    end_k = tl.load(ends_k_ptr + sequence + 1, mask=used, other=0)
    blocks = tl.load(blocks_ptr + sequence, mask=used, other=0)
    within = block - (blocks - (end_k - start_k) // block_size)
    tl.store(block_start_ptr + block, tl.where(used, start_k + within * block_size, total_k), mask=block < n_blocks)


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
    blocks = (cu_seqlens_k.diff() // block_size).cumsum(0, dtype=torch.int32)
    queries = torch.empty((3, total_q), dtype=torch.int32, device=device)
    block_start = torch.empty(n_blocks, dtype=torch.int32, device=device)
    if total_q:
        query_layout_kernel[(triton.cdiv(total_q, _ROWS),)](
            cu_seqlens_q, cu_seqlens_k, blocks, *queries, sequences, total_q, block_size, ROWS=_ROWS
        )
    if n_blocks:
        block_start_kernel[(triton.cdiv(n_blocks, _ROWS),)](
            cu_seqlens_k, blocks, block_start, sequences, n_blocks, total_k, block_size, ROWS=_ROWS
        )
    return BlockLayout(*queries, block_start)
