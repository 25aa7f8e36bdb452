"""Step 1 of the paper's Algorithm 1: block means, gate scores and the causal top-k; never the matrix of all scores."""

import torch
import triton
import triton.language as tl

from .primitives import padded

_KEPT = 8192  # rows · slots a program keeps, in registers: 16384 spill 140 of them on sm_90
_MOST_SLOTS = _KEPT // 16  # a matrix product takes no fewer rows


@triton.jit
def block_means_kernel(
    k_ptr, block_start_ptr, means_ptr, k_token, k_head, total_k, kv_heads,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Mean key of each complete block, summed in float32.

    Program (b, h) owns block b of KV head h. k: [total_k, kv_heads, HEAD_DIM]; block_start: int32 [n_blocks], total_k
    where unused; means: key dtype [n_blocks, kv_heads, HEAD_DIM]. Reads each key once.
    """
    block, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start = tl.load(block_start_ptr + block)
    d = tl.arange(0, WIDTH)
    total = tl.zeros([KEYS, WIDTH], tl.float32)
    for first in range(0, BLOCK_SIZE, KEYS):
        key = first + tl.arange(0, KEYS)
        inside = (key < BLOCK_SIZE) & (start + key < total_k)
        offset = (start + key)[:, None].to(tl.int64) * k_token + kv_head * k_head + d[None, :]
        mask = inside[:, None] & (d < HEAD_DIM)[None, :]
        total += tl.load(k_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / BLOCK_SIZE
    out = (block * kv_heads + kv_head) * HEAD_DIM + d
    tl.store(means_ptr + out, mean.to(means_ptr.dtype.element_ty), mask=d < HEAD_DIM)


@triton.jit(do_not_specialize=["total_rows", "block_size"])
def gate_kernel(
    q_ptr, means_ptr, position_ptr, first_block_ptr, selected_ptr,
    q_token, q_head, total_rows, heads, kv_heads, block_size,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, SLOTS_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The SLOTS best past blocks of ROWS rows (token, head of the group) of one KV head.

    Program (i, h) scans the blocks its rows may choose from the newest to the oldest, BLOCKS at a time, and keeps the
    best so far in registers; a block enters only if its score is strictly higher than the lowest kept, so of equal
    scores the newest stay. q: [total_q, heads, HEAD_DIM]; means: [n_blocks, kv_heads, HEAD_DIM]; position,
    first_block: int32 [total_q]; selected: int32 [total_q, heads, SLOTS], every element written: ascending, then −1.
    CHUNKS: queries are fewer than keys, so rows of several sequences may lie far apart: one sequence after the other.
    """
    kv_head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < total_rows
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    d = tl.arange(0, WIDTH)
    row_mask = inside[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + (token * q_token + head * q_head)[:, None] + d[None, :], mask=row_mask, other=0.0)
    position = tl.load(position_ptr + token, mask=inside, other=-1)
    first = tl.load(first_block_ptr + token, mask=inside, other=0)
    last = first + tl.maximum(position, 0) // block_size  # exclusive
    some = last > first
    lowest = tl.min(tl.where(some, first, 2147483647), 0)
    highest = tl.max(tl.where(some, last, 0), 0)

    slot = tl.arange(0, SLOTS_WIDTH)[None, :]
    # Empty slots hold −inf and numbers below 0, all different; lanes beyond SLOTS hold +inf and are never the lowest.
    best = tl.where(slot < SLOTS, float("-inf"), float("inf")) + tl.zeros([ROWS, SLOTS_WIDTH], tl.float32)
    chosen = -1 - slot + tl.zeros([ROWS, SLOTS_WIDTH], tl.int32)
    threshold = tl.full([ROWS], float("-inf"), tl.float32)
    # Blocks from first_of_all to last_of_all are candidates of every row; none are where a row has no candidate.
    first_of_all = tl.max(tl.where(some, first, 0), 0)
    last_of_all = tl.min(tl.where(inside, tl.where(some, last, 0), 2147483647), 0)
    means_ptr += kv_head.to(tl.int64) * HEAD_DIM
    if CHUNKS:
        while lowest < highest:
            ends = tl.where(some & (first == lowest), last, 0)  # rows of the other sequences may choose none of these
            best, chosen, threshold = _keep_best(
                q, means_ptr, kv_heads, lowest, tl.max(ends, 0), first, ends, first_of_all, last_of_all, best, chosen,
                threshold, HEAD_DIM, WIDTH, BLOCKS,
            )  # fmt: skip
            lowest = tl.min(tl.where(some & (first > lowest), first, 2147483647), 0)
    else:
        best, chosen, threshold = _keep_best(
            q, means_ptr, kv_heads, lowest, highest, first, last, first_of_all, last_of_all, best, chosen, threshold,
            HEAD_DIM, WIDTH, BLOCKS,
        )  # fmt: skip

    empty = chosen < 0
    local = tl.sort(tl.where(empty, 2147483647, chosen - first[:, None]))
    local = tl.where(local == 2147483647, -1, local)
    out = (token * heads + head)[:, None] * SLOTS + slot
    tl.store(selected_ptr + out, local, mask=inside[:, None] & (slot < SLOTS))


@triton.jit
def _keep_best(
    q, means_ptr, kv_heads, lowest, highest, first, last, first_of_all, last_of_all, best, chosen, threshold,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Scan the blocks highest − 1 … lowest, of which each row may choose first … last − 1: what it keeps then.

    best, chosen: score and number of the blocks kept; threshold: the lowest score of them.
    """
    column, d = tl.arange(0, BLOCKS), tl.arange(0, WIDTH)
    for i in range(0, tl.maximum(highest - lowest + BLOCKS - 1, 0) // BLOCKS):
        newest = highest - 1 - i * BLOCKS
        block = newest - column  # descending: of equal scores the first column is the most recent block
        mean_mask = (block >= lowest)[:, None] & (d < HEAD_DIM)[None, :]
        offset = block[:, None].to(tl.int64) * kv_heads * HEAD_DIM + d[None, :]
        means = tl.load(means_ptr + offset, mask=mean_mask, other=0.0)
        scores = tl.dot(q, tl.trans(means), input_precision="ieee")
        if (newest >= last_of_all) | (newest - BLOCKS + 1 < first_of_all):
            candidate = (block[None, :] >= first[:, None]) & (block[None, :] < last[:, None])
            scores = tl.where(candidate, scores, float("-inf"))
        high = tl.max(scores, 1)
        more = tl.max((high > threshold).to(tl.int32), 0)
        while more > 0:
            best_column = tl.min(tl.where(scores == high[:, None], column[None, :], BLOCKS), 1)
            # the lowest kept leaves; of several, the oldest
            lowest_kept = best == threshold[:, None]
            oldest = tl.min(tl.where(lowest_kept, chosen, 2147483647), 1)
            hit = (high > threshold)[:, None] & lowest_kept & (chosen == oldest[:, None])
            best = tl.where(hit, high[:, None], best)
            chosen = tl.where(hit, (newest - best_column)[:, None], chosen)
            threshold = tl.min(best, 1)
            scores = tl.where(column[None, :] == best_column[:, None], float("-inf"), scores)
            high = tl.max(scores, 1)
            more = tl.max((high > threshold).to(tl.int32), 0)
    return best, chosen, threshold


def block_means(key: torch.Tensor, block_start: torch.Tensor, block_size: int) -> torch.Tensor:
    """Means of the complete blocks of a packed batch: key dtype [n_blocks, kv_heads, head_dim]; unused ones are 0."""
    total_k, kv_heads, head_dim = key.shape
    means = torch.empty((len(block_start), kv_heads, head_dim), dtype=key.dtype, device=key.device)
    width = padded(head_dim)
    if means.numel():
        block_means_kernel[(len(block_start), kv_heads)](
            key, block_start, means, *key.stride()[:2], total_k, kv_heads,
            BLOCK_SIZE=block_size, HEAD_DIM=head_dim, WIDTH=width, KEYS=max(1, min(64, 8192 // width)),
        )  # fmt: skip
    return means


def select_blocks(query, key, layout, block_size: int, slots: int, settings) -> torch.Tensor:
    """Selected past blocks: int32 [total_q, heads, slots], ascending within the sequence, then −1.

    query: [total_q, heads, head_dim]; key: [total_k, kv_heads, head_dim]; layout: `BlockLayout`. Raises ValueError
    for more slots than a program can keep.
    """
    if slots > _MOST_SLOTS:
        raise ValueError(
            f"top_k must be at most {_MOST_SLOTS + 1} for the Triton routing, which keeps them in registers, but was "
            f"{slots + 1}; engine='blockwise' takes it"
        )
    total_q, heads, head_dim = query.shape
    kv_heads, group = key.shape[1], heads // key.shape[1]
    selected = torch.empty((total_q, heads, slots), dtype=torch.int32, device=query.device)
    if selected.numel() == 0 or len(layout.block_start) == 0:
        return selected.fill_(-1)
    means = block_means(key, layout.block_start, block_size)
    width = max(2, triton.next_power_of_2(slots))
    tile_rows = min(settings.rows, _KEPT // width)
    rows = total_q * group
    gate_kernel[(triton.cdiv(rows, tile_rows), kv_heads)](
        query, means, layout.query_position, layout.first_block, selected,
        *query.stride()[:2], rows, heads, kv_heads, block_size,
        GROUP=group, SLOTS=slots, SLOTS_WIDTH=width, HEAD_DIM=head_dim,
        WIDTH=padded(head_dim), ROWS=tile_rows, BLOCKS=settings.keys,
        CHUNKS=total_q < key.shape[0], num_warps=settings.warps,
    )  # fmt: skip
    return selected
