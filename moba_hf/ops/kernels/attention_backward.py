"""Gradients of attention over the selected blocks: steps 3 to 5 of the paper's Algorithm 1, backwards.

With P = softmax(scale · Q Kᵀ) over the keys taken, rebuilt from the saved log-sum-exp, and δ = rowsum(dO · O):

    dV = Pᵀ dO        dS = P ∘ (dO Vᵀ − δ)        dQ = scale · dS K        dK = scale · dSᵀ Q

Keys own their gradients: one program holds dK and dV of a tile of keys in registers while the rows that attend it pass
by, from all heads of the group. The past-block kernel comes first and leaves float32 sums; the own-block kernel begins
with them, adds its part and rounds once. Queries gather theirs: a past block leaves one partial dQ per entry, addressed
by (row, slot), and the last kernel adds them in slot order, then the own block's part. No result depends on the order
of programs, except where the rows of one block are split over several programs, which then add with atomics.

A *row* is one (token, head of the group) of a KV head: row = (token − first token) · group + head within the group.
An *entry* is one (row, slot): entry = row · slots + slot.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .backward_settings import BackwardSettings
from .block_layout import own_queries
from .bucket_sort import bucket_tiles, sort_by_block, sort_bytes
from .primitives import LOG2_E, load_rows, token_and_head
from .tuned_tiles import Tile
from .workspace import head_passes, token_passes

_LOOKED_AT = tl.constexpr(128)  # buckets at a time, in the search for a portion's


@triton.jit(do_not_specialize=["rows"])
def statistics_kernel(
    do_ptr, o_ptr, lse_ptr, statistics_ptr, do_token, do_head, o_token, o_head, rows, heads,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What P and dS need of a row, side by side: its log-sum-exp in base 2, and δ = rowsum(dO · O).

    One program owns ROWS consecutive (token, head) pairs. do, o: [tokens, heads, HEAD_DIM]; lse: float32
    [tokens, heads], natural logarithm; statistics: float32 [tokens, heads, 2]. Everything is read and written once.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // heads, row % heads
    d = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (d < HEAD_DIM)[None, :]
    do = tl.load(do_ptr + (token * do_token + head * do_head)[:, None] + d[None, :], mask=inside, other=0.0)
    o = tl.load(o_ptr + (token * o_token + head * o_head)[:, None] + d[None, :], mask=inside, other=0.0)
    lse = tl.load(lse_ptr + row, mask=row < rows)
    tl.store(statistics_ptr + row * 2, lse * LOG2_E, mask=row < rows)
    tl.store(statistics_ptr + row * 2 + 1, tl.sum(do.to(tl.float32) * o.to(tl.float32), 1), mask=row < rows)


@triton.jit(do_not_specialize=["first_kv_head", "total_k", "n_blocks", "block_size"])
def own_block_keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, statistics_ptr, own_start_ptr, key_row_ptr, first_query_ptr, end_query_ptr,
    block_start_ptr, since_ptr, sum_k_ptr, sum_v_ptr, dk_ptr, dv_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, do_token, do_head, sum_token, sum_head, dk_token, dk_head,
    dv_token, dv_head, first_kv_head, total_k, n_blocks, block_size, heads, scale, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """dK and dV: sums of the past-block kernel, plus the part of the queries whose own block holds the key (step 3).

    Program (i, h) owns keys i · KEYS … of the packed batch, KV head first_kv_head + h, wherever blocks and sequences
    begin, and reads the queries first_query[i] … end_query[i] − 1. A query attends the keys own_start … key_row.
    q, do: [total_q, heads, HEAD_DIM]; k, v: [total_k, kv_heads, HEAD_DIM]; statistics: those of `statistics_kernel`;
    own_start, key_row: int32 [total_q]; first_query, end_query: int32 [key tiles]; block_start: int32 [n_blocks];
    since, sum_k, sum_v: those of `past_block_keys_kernel`, read once where the key's block was selected, not at all
    unless PAST; dk, dv: [total_k, kv_heads, HEAD_DIM], every element of the pass's heads written once.
    """
    tile, slice_head = tl.program_id(0), tl.program_id(1)
    kv_head = (first_kv_head + slice_head).to(tl.int64)
    d = tl.arange(0, WIDTH)
    key = tile * KEYS + tl.arange(0, KEYS)
    key_mask = (key < total_k)[:, None] & (d < HEAD_DIM)[None, :]
    key64 = key[:, None].to(tl.int64)
    k = tl.load(k_ptr + key64 * k_token + kv_head * k_head + d[None, :], mask=key_mask, other=0.0)
    v = tl.load(v_ptr + key64 * v_token + kv_head * v_head + d[None, :], mask=key_mask, other=0.0)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    if PAST:
        summed = key_mask & _selected(
            block_start_ptr, since_ptr + slice_head * n_blocks, key, n_blocks, block_size, total_k
        )[:, None]  # fmt: skip
        sums = slice_head.to(tl.int64) * sum_head + key64 * sum_token + d[None, :]
        dk = tl.load(sum_k_ptr + sums, mask=summed, other=0.0)
        dv = tl.load(sum_v_ptr + sums, mask=summed, other=0.0)
    end = tl.load(end_query_ptr + tile) * GROUP
    # disable_licm: invariants recomputed rather than kept; dK, dV and the scores leave no registers for them
    for first in tl.range(tl.load(first_query_ptr + tile) * GROUP, end, ROWS, num_stages=STAGES, disable_licm=True):
        row = first + tl.arange(0, ROWS)
        taken = row < end
        token, head = token_and_head(row, 0, GROUP)
        head += kv_head * GROUP
        q, do, lse, delta = _load_queries(
            q_ptr, do_ptr, statistics_ptr, token, head, q_token, q_head, do_token, do_head, heads, taken,
            HEAD_DIM, WIDTH,
        )  # fmt: skip
        which = (tl.arange(0, 4) == 0)[None, :]
        where = tl.where(which, own_start_ptr + token[:, None], key_row_ptr + token[:, None])
        own_start, key_row = _load_pair(where, taken, -1)
        visible = (own_start[None, :] <= key[:, None]) & (key[:, None] <= key_row[None, :])
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2
        p = tl.where(visible, tl.math.exp2(scores - lse[None, :]), 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        # the second `where` keeps a row of keys that belongs to no sequence, which may hold anything, out of dK
        ds = tl.where(visible, p * (dp - delta[None, :]), 0.0).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    out = key64 * dk_token + kv_head * dk_head + d[None, :]
    tl.store(dk_ptr + out, (dk * scale).to(dk_ptr.dtype.element_ty), mask=key_mask)
    out = key64 * dv_token + kv_head * dv_head + d[None, :]
    tl.store(dv_ptr + out, dv.to(dv_ptr.dtype.element_ty), mask=key_mask)


@triton.jit(do_not_specialize=["entries_head", "offsets_head", "offsets_block", "first_token", "first_kv_head",
                               "total_k", "n_blocks", "rows_per_program"])  # fmt: skip
def past_block_keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, statistics_ptr, entries_ptr, offsets_ptr, block_start_ptr, since_ptr, dq_ptr,
    dk_ptr, dv_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, do_token, do_head, sum_token, sum_head,
    entries_head, offsets_head, offsets_block, partial_head, first_token, first_kv_head, total_k, n_blocks,
    rows_per_program, heads, scale, scale_log2,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, WITH_DQ: tl.constexpr,
    FIRST: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """dK / scale and dV of the queries that selected a block (step 3); WITH_DQ their partial dQ too: five matmuls.

    Program (i, h) owns one tile of keys of one block — the whole block WITH_DQ — and at most rows_per_program entries
    of the block's bucket, for KV head first_kv_head + h: the bucket's FIRST, or one of the further portions
    (`_portion`). Blocks that fill several key tiles take neighbouring programs, so that the gathered rows are still in
    the L2 cache for the next one.
    q, do: [total_q, heads, HEAD_DIM]; k, v: [total_k, kv_heads, HEAD_DIM]; statistics: those of `statistics_kernel`;
    entries, offsets: those of `Buckets`; block_start: int32 [n_blocks];
    dq: [kv heads of the pass, entries, HEAD_DIM], each entry written once;
    dk, dv: float32 [kv heads of the pass, total_k, HEAD_DIM], of which the keys of blocks that were selected are
    written: stored by the first portion of the first pass that has one, and added to by all others;
    since: int32 [kv heads of the pass, n_blocks], the first token of the pass that stored the sums of each block, or
    −1; what it holds before the first pass, that of STORE, is not read.
    """
    key_tiles: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    slice_head = tl.program_id(1).to(tl.int64)
    portion = tl.program_id(0) // key_tiles
    offsets_ptr += slice_head * offsets_head
    if FIRST:
        bucket = portion
        begin = tl.load(offsets_ptr + bucket.to(tl.int64) * offsets_block)
        end = tl.load(offsets_ptr + (bucket + 1).to(tl.int64) * offsets_block)
        end = tl.minimum(begin + rows_per_program, end)
    else:
        bucket, begin, end = _portion(offsets_ptr, offsets_block, portion, n_blocks, rows_per_program)
    block_start = tl.load(block_start_ptr + bucket)
    used, begun = begin < end, not STORE
    since_ptr += slice_head * n_blocks + bucket
    if STORE:
        tl.store(since_ptr, tl.where(used, first_token, -1))
    elif FIRST:
        since = tl.load(since_ptr)
        begun = (since >= 0) & (since < first_token)  # one of this pass is what another tile of the block's keys noted
        tl.store(since_ptr, tl.where(begun | (not used), since, first_token))
    if not STORE:  # there, empty programs run on behind their mask: ending them here spilled 16 registers, not 4
        if not used:
            return
    kv_head = (first_kv_head + tl.program_id(1)).to(tl.int64)  # head strides reach past 2³¹
    d = tl.arange(0, WIDTH)
    within = (tl.program_id(0) % key_tiles) * KEYS + tl.arange(0, KEYS)
    key = (block_start + within)[:, None].to(tl.int64)
    key_mask = (within < tl.where(used, BLOCK_SIZE, 0))[:, None] & (d < HEAD_DIM)[None, :]
    k = tl.load(k_ptr + key * k_token + kv_head * k_head + d[None, :], mask=key_mask, other=0.0)
    v = tl.load(v_ptr + key * v_token + kv_head * v_head + d[None, :], mask=key_mask, other=0.0)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    entries_ptr += slice_head * entries_head
    dq_ptr += slice_head * partial_head
    # disable_licm: see `own_block_keys_kernel`
    for first in tl.range(begin, end, ROWS, num_stages=STAGES, disable_licm=True):
        taken = first + tl.arange(0, ROWS) < end
        entry = tl.load(entries_ptr + first + tl.arange(0, ROWS), mask=taken, other=0)
        token, head = token_and_head(entry // SLOTS, first_token, GROUP)
        head += kv_head * GROUP
        q, do, lse, delta = _load_queries(
            q_ptr, do_ptr, statistics_ptr, token, head, q_token, q_head, do_token, do_head, heads, taken,
            HEAD_DIM, WIDTH,
        )  # fmt: skip
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")  # not after the exponential: then only dQ is waited for
        p = tl.math.exp2(scores - lse[None, :])
        if BLOCK_SIZE % KEYS != 0:
            p = tl.where((within < BLOCK_SIZE)[:, None], p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        if WITH_DQ:
            dq = tl.dot(tl.trans(ds), k, input_precision="ieee") * scale  # here: float16 has no range to spare
            out = entry[:, None].to(tl.int64) * HEAD_DIM + d[None, :]
            dq_mask = taken[:, None] & (d < HEAD_DIM)[None, :]
            tl.store(dq_ptr + out, dq.to(dq_ptr.dtype.element_ty), mask=dq_mask)
    out = slice_head * sum_head + key * sum_token + d[None, :]
    if begun:  # faster than load, add and store even where nobody else adds: the program does not wait for the sums
        tl.atomic_add(dk_ptr + out, dk, mask=key_mask, sem="relaxed")
        tl.atomic_add(dv_ptr + out, dv, mask=key_mask, sem="relaxed")
    else:
        tl.store(dk_ptr + out, dk, mask=key_mask)
        tl.store(dv_ptr + out, dv, mask=key_mask)


@triton.jit
def _portion(offsets_ptr, offsets_block, number, n_blocks, rows):
    """(bucket, begin, end) of a portion of at most `rows` entries beyond the first of its bucket; empty if unused.

    With p entries before bucket b, its further portions have the numbers from p // rows on. There are
    (size − 1) // rows of them, and the next bucket's begin at (p + size) // rows or after: no two share a number.
    """
    origin = tl.load(offsets_ptr)
    low, size = number * 0, number * 0 + n_blocks  # holds the last bucket whose portions begin at `number` or before
    while size > 1:
        step = (size + _LOOKED_AT - 1) // _LOOKED_AT
        bucket = low + tl.arange(0, _LOOKED_AT) * step
        offset = tl.load(offsets_ptr + bucket.to(tl.int64) * offsets_block, mask=bucket < low + size, other=2147483647)
        before = (offset - origin) // rows <= number
        last = low + (tl.sum((before & (bucket < low + size)).to(tl.int32), 0) - 1) * step
        size, low = tl.minimum(step, low + size - last), last
    bucket = low
    start = tl.load(offsets_ptr + bucket.to(tl.int64) * offsets_block)
    begin = start + (number - (start - origin) // rows + 1) * rows
    stop = tl.load(offsets_ptr + (bucket + 1).to(tl.int64) * offsets_block)
    return bucket, begin, tl.minimum(begin + rows, stop)


@triton.jit
def _selected(block_start_ptr, since_ptr, key, n_blocks, block_size, total_k):
    """Whether each packed key lies in a complete block that a query selected.

    A block's number is ⌊first row of its sequence / block size⌋ plus its number there: ⌊key / block size⌋ or one less.
    """
    number = key // block_size
    inside, inside_before = number < n_blocks, (number > 0) & (number <= n_blocks)
    start = tl.load(block_start_ptr + number, mask=inside, other=total_k)
    before = tl.load(block_start_ptr + number - 1, mask=inside_before, other=total_k)
    in_this = (start <= key) & (key < start + block_size)
    in_before = (before <= key) & (key < before + block_size)
    chosen = tl.load(since_ptr + number, mask=inside & in_this, other=-1)
    chosen_before = tl.load(since_ptr + number - 1, mask=inside_before & in_before, other=-1)
    return (chosen >= 0) | (chosen_before >= 0)


@triton.jit(do_not_specialize=["entries_head", "first_token", "first_kv_head", "max_tiles"])
def past_block_queries_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, statistics_ptr, entries_ptr, bucket_ptr, begin_ptr, end_ptr,
    block_start_ptr, dq_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, do_token, do_head,
    entries_head, partial_head, first_token, first_kv_head, max_tiles, heads, scale, scale_log2,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial dQ of the queries that selected a block, for blocks too large to stay on chip (step 3).

    Program (i, h) owns the ROWS entries begin … end − 1 of one bucket of KV head first_kv_head + h and loops over the
    block's keys. Pointers as in `past_block_keys_kernel`, the tiles cut for ROWS; each entry of dq is written once.
    """
    slice_head = tl.program_id(1).to(tl.int64)
    tile = slice_head * max_tiles + tl.program_id(0)
    bucket = tl.load(bucket_ptr + tile)
    if bucket < 0:
        return
    position = tl.load(begin_ptr + tile) + tl.arange(0, ROWS)
    kv_head = (first_kv_head + tl.program_id(1)).to(tl.int64)
    taken = position < tl.load(end_ptr + tile)
    entry = tl.load(entries_ptr + slice_head * entries_head + position, mask=taken, other=0)
    token, head = token_and_head(entry // SLOTS, first_token, GROUP)
    head += kv_head * GROUP
    d = tl.arange(0, WIDTH)
    q, do, lse, delta = _load_queries(
        q_ptr, do_ptr, statistics_ptr, token, head, q_token, q_head, do_token, do_head, heads, taken,
        HEAD_DIM, WIDTH,
    )  # fmt: skip
    block_start = tl.load(block_start_ptr + bucket).to(tl.int64)
    k_ptr += block_start * k_token + kv_head * k_head
    v_ptr += block_start * v_token + kv_head * v_head
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in tl.range(0, BLOCK_SIZE, KEYS, num_stages=STAGES):
        key = (first + tl.arange(0, KEYS))[:, None]
        key_mask = (key < BLOCK_SIZE) & (d < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + key * k_token + d[None, :], mask=key_mask, other=0.0)
        v = tl.load(v_ptr + key * v_token + d[None, :], mask=key_mask, other=0.0)
        p = tl.math.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None])
        if BLOCK_SIZE % KEYS != 0:
            p = tl.where(tl.trans(key) < BLOCK_SIZE, p, 0.0)
        ds = (p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])).to(q.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    out = slice_head * partial_head + entry[:, None].to(tl.int64) * HEAD_DIM + d[None, :]
    tl.store(dq_ptr + out, (dq * scale).to(dq_ptr.dtype.element_ty), mask=taken[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["first_token", "end_token", "first_kv_head", "total_k"])
def own_block_queries_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, statistics_ptr, own_start_ptr, key_row_ptr, selected_ptr, partial_ptr, dq_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, do_token, do_head, dq_token, dq_head,
    partial_head, first_token, end_token, first_kv_head, total_k, heads, scale, scale_log2, inverse_scale,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """dQ: the partials of the selected blocks in slot order, plus the own block's part, causal (steps 4 and 5).

    Program (i, h) owns ROWS rows of KV head first_kv_head + h. q, do, dq: [total_q, heads, HEAD_DIM];
    k, v: [total_k, kv_heads, HEAD_DIM]; statistics: those of `statistics_kernel`; own_start, key_row: int32 [total_q];
    selected: int32 [total_q, heads, SLOTS], −1 where there is no block, whose partial was never written;
    partial: [kv heads of the pass, entries, HEAD_DIM], read once; dq: every row of the range written once. CHUNKS: as
    in `own_block_merge_kernel`.
    """
    slice_head = tl.program_id(1).to(tl.int64)
    kv_head = (first_kv_head + tl.program_id(1)).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    taken = row < (end_token - first_token) * GROUP
    token, head = token_and_head(row, first_token, GROUP)
    d = tl.arange(0, WIDTH)
    own_start = tl.load(own_start_ptr + token, mask=taken, other=total_k)
    key_row = tl.load(key_row_ptr + token, mask=taken, other=total_k)
    in_sequence = own_start < total_k
    head += kv_head * GROUP
    q, do, lse, delta = _load_queries(
        q_ptr, do_ptr, statistics_ptr, token, head, q_token, q_head, do_token, do_head, heads, in_sequence,
        HEAD_DIM, WIDTH,
    )  # fmt: skip
    partial_ptr += slice_head * partial_head
    selected_ptr += (token * heads + head) * SLOTS
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    # before the own block: after it, Triton 3.9 makes each of the own block's products wait for the one before
    for slot in tl.range(0, SLOTS, num_stages=3):
        block = tl.load(selected_ptr + slot, mask=taken, other=-1)
        entry = row.to(tl.int64) * SLOTS + slot
        partial_mask = (block >= 0)[:, None] & (d < HEAD_DIM)[None, :]
        partial = tl.load(partial_ptr + entry[:, None] * HEAD_DIM + d[None, :], mask=partial_mask, other=0.0)
        dq += partial.to(tl.float32)
    dq *= inverse_scale  # multiplied back with the own block's part
    start, end = tl.min(own_start, 0), tl.max(tl.where(in_sequence, key_row + 1, 0), 0)
    k_ptr += kv_head * k_head
    v_ptr += kv_head * v_head
    if CHUNKS:
        while start < end:
            ends = tl.where(own_start == start, key_row, -1)  # rows of the other blocks see none of these keys
            dq = _add_own_queries(
                q, do, k_ptr, v_ptr, k_token, v_token, lse, delta, start, tl.max(ends, 0) + 1, own_start, ends,
                scale_log2, dq, HEAD_DIM, WIDTH, KEYS, STAGES,
            )  # fmt: skip
            start = tl.min(tl.where(own_start > start, own_start, total_k), 0)
    else:
        dq = _add_own_queries(
            q, do, k_ptr, v_ptr, k_token, v_token, lse, delta, start, end, own_start, key_row, scale_log2, dq,
            HEAD_DIM, WIDTH, KEYS, STAGES,
        )  # fmt: skip
    dq = dq * scale
    out = (token * dq_token + head * dq_head)[:, None] + d[None, :]
    out_mask = taken[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(dq_ptr + out, dq.to(dq_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def _add_own_queries(
    q, do, k_ptr, v_ptr, k_token, v_token, lse, delta, start, end, own_start, key_row, scale_log2, dq,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq / scale with the part of the keys start … end − 1, of which a row attends own_start … key_row."""
    d = tl.arange(0, WIDTH)
    for first in tl.range(start, end, KEYS, num_stages=STAGES, disable_licm=True):
        key = first + tl.arange(0, KEYS)
        key_mask = (key < end)[:, None] & (d < HEAD_DIM)[None, :]
        key64 = key[:, None].to(tl.int64)
        k = tl.load(k_ptr + key64 * k_token + d[None, :], mask=key_mask, other=0.0)
        v = tl.load(v_ptr + key64 * v_token + d[None, :], mask=key_mask, other=0.0)
        visible = (own_start[:, None] <= key[None, :]) & (key[None, :] <= key_row[:, None])
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        p = tl.where(visible, tl.math.exp2(scores - lse[:, None]), 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(q.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _load_queries(
    q_ptr, do_ptr, statistics_ptr, token, head, q_token, q_head, do_token, do_head, heads, taken,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Q, dO, log-sum-exp in base 2 and δ of each row (token, head); all 0 where not taken: so is what they add."""
    q = load_rows(q_ptr, token, head, q_token, q_head, taken, HEAD_DIM, WIDTH)
    do = load_rows(do_ptr, token, head, do_token, do_head, taken, HEAD_DIM, WIDTH)
    statistics_ptr += ((token * heads + head) * 2)[:, None] + tl.arange(0, 4)[None, :]
    lse, delta = _load_pair(statistics_ptr, taken, 0.0)
    return q, do, lse, delta


@triton.jit
def _load_pair(pointer, taken, other):
    """The first two columns of pointer [rows, 4], each [rows], by one load.

    Loads of fewer elements than threads Triton makes in the layout where the result is needed. Along the columns of the
    scores, each thread then fetches a number of its own for each of them: half of all instructions of the past blocks.
    """
    rows: tl.constexpr = pointer.shape[0]
    both = tl.load(pointer, mask=taken[:, None] & (tl.arange(0, 4) < 2)[None, :], other=other)
    first, second = tl.split(tl.reshape(both, [rows, 2, 2]))
    first, _ = tl.split(first)
    second, _ = tl.split(second)
    return first, second


# ---- launchers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backward:
    """What every launch of one backward pass shares; build it with `prepare`.

    query, grad_output: [total_q, heads, head_dim]; key, value: [total_k, kv_heads, head_dim]; last stride 1.
    statistics: float32 [total_q, heads, 2], `statistics_kernel`'s. selected_blocks: int32 [total_q, heads, slots],
    contiguous. own_start, key_row, block_start: `BlockLayout`'s.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad_output: torch.Tensor
    statistics: torch.Tensor
    selected_blocks: torch.Tensor
    own_start: torch.Tensor
    key_row: torch.Tensor
    block_start: torch.Tensor
    block_size: int
    scale: float
    settings: BackwardSettings

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.key, self.value, self.grad_output, self.statistics

    def strides(self) -> tuple[int, ...]:
        return tuple(n for x in (self.query, self.key, self.value, self.grad_output) for n in x.stride()[:2])

    def scales(self) -> dict[str, float]:
        return {"scale": self.scale, "scale_log2": self.scale * LOG2_E.value}

    def shapes(self, tile: Tile) -> dict[str, int]:
        """The compile-time sizes of a kernel and its launch options."""
        head_dim = self.query.shape[2]
        return {
            "GROUP": self.query.shape[1] // self.key.shape[1],
            "HEAD_DIM": head_dim,
            "WIDTH": max(16, triton.next_power_of_2(head_dim)),
            "ROWS": tile.rows,
            "KEYS": tile.keys,
            "STAGES": tile.stages,
            "num_warps": tile.warps,
        }


def prepare(
    grad_output, query, key, value, output, lse, selected_blocks, layout, block_size, scale, settings
) -> Backward:
    """Everything that depends neither on the KV heads nor on the queries of a pass."""
    if grad_output.stride(2) != 1:
        grad_output = grad_output.contiguous()
    tokens, heads, head_dim = query.shape
    statistics = torch.empty((tokens, heads, 2), dtype=torch.float32, device=query.device)
    width = max(16, triton.next_power_of_2(head_dim))
    rows = max(1, 4096 // width)
    statistics_kernel[(triton.cdiv(tokens * heads, rows),)](
        grad_output, output, lse.contiguous(), statistics, *grad_output.stride()[:2], *output.stride()[:2],
        tokens * heads, heads,
        HEAD_DIM=head_dim, WIDTH=width, ROWS=rows,
    )  # fmt: skip
    return Backward(
        query, key, value, grad_output, statistics, selected_blocks.contiguous(),
        layout.own_start, layout.key_row, layout.block_start, block_size, scale, settings,
    )  # fmt: skip


def past_block_keys(call: Backward, buckets, tokens, kv_heads, partials, sums, rows: int) -> None:
    """Sum the past blocks' part of dK and dV, and leave partial dQ where the settings say so (`fused`).

    buckets: of the queries `tokens` and the heads `kv_heads`. partials: [kv heads of the pass, len(tokens) · group ·
    slots, head_dim]. sums: int32 [kv heads of the pass, n_blocks] and two of float32 [kv heads of the pass, total_k,
    head_dim], unwritten before the first tokens: the kernel's since, dk and dv.
    rows: entries of a bucket that one program takes, at most.
    """
    tile, n_blocks = call.settings.past_keys, call.block_start.shape[0]
    since, dk, dv = sums
    for first, programs in ((True, n_blocks), (False, (buckets.most - 1) // rows)):
        if programs:
            past_block_keys_kernel[(programs * triton.cdiv(call.block_size, tile.keys), len(kv_heads))](
                *call.tensors(), buckets.entries, buckets.offsets, call.block_start, since, partials, dk, dv,
                *call.strides(), dk.stride(1), dk.stride(0), buckets.entries.stride(0),
                *buckets.offsets.stride(), partials.stride(0), tokens.start, kv_heads.start, call.key.shape[0],
                n_blocks, rows, call.query.shape[1],
                SLOTS=call.selected_blocks.shape[2], BLOCK_SIZE=call.block_size,
                WITH_DQ=call.settings.fused, FIRST=first, STORE=first and tokens.start == 0,
                **call.scales(), **call.shapes(tile),
            )  # fmt: skip


def own_block_keys(call: Backward, kv_heads: range, sums, grad_key: torch.Tensor, grad_value: torch.Tensor) -> None:
    """Write dK and dV of the heads `kv_heads`: own blocks plus `sums`, empty where there are no past blocks."""
    tile, total_k = call.settings.own_keys, call.key.shape[0]
    queries = own_queries(call.own_start, call.key_row, total_k, tile.keys)
    past = bool(sums)
    since, sum_k, sum_v = sums or (call.own_start, call.statistics, call.statistics)  # not read
    own_block_keys_kernel[(queries.shape[1], len(kv_heads))](
        *call.tensors(), call.own_start, call.key_row, *queries.unbind(), call.block_start, since, sum_k, sum_v,
        grad_key, grad_value,
        *call.strides(), sum_k.stride(-2), sum_k.stride(0), *grad_key.stride()[:2], *grad_value.stride()[:2],
        kv_heads.start, total_k, call.block_start.shape[0], call.block_size, call.query.shape[1],
        PAST=past, **call.scales(), **call.shapes(tile),
    )  # fmt: skip


def past_block_queries(call: Backward, buckets, tiles, tokens, kv_heads, partials) -> None:
    """Write the partial dQ of every entry; tiles: cut for `past_queries.rows`, the rest as in `past_block_keys`."""
    tile, max_tiles = call.settings.past_queries, tiles[0].shape[1]
    past_block_queries_kernel[(max_tiles, len(kv_heads))](
        *call.tensors(), buckets.entries, *tiles, call.block_start, partials,
        *call.strides(), buckets.entries.stride(0), partials.stride(0),
        tokens.start, kv_heads.start, max_tiles, call.query.shape[1],
        SLOTS=call.selected_blocks.shape[2], BLOCK_SIZE=call.block_size, **call.scales(), **call.shapes(tile),
    )  # fmt: skip


def own_block_queries(call: Backward, tokens, kv_heads, partials, grad_query) -> None:
    """Write dQ of the queries `tokens` and the heads of `kv_heads`: own blocks plus the partials."""
    tile, total_k, group = call.settings.own_queries, call.key.shape[0], call.query.shape[1] // call.key.shape[1]
    own_block_queries_kernel[(triton.cdiv(len(tokens) * group, tile.rows), len(kv_heads))](
        *call.tensors(), call.own_start, call.key_row, call.selected_blocks, partials, grad_query,
        *call.strides(), *grad_query.stride()[:2], partials.stride(0), tokens.start, tokens.stop, kv_heads.start,
        total_k, call.query.shape[1], inverse_scale=1 / call.scale if call.scale else 0.0,  # 0: so are the partials
        SLOTS=call.selected_blocks.shape[2], CHUNKS=call.query.shape[0] < total_k, **call.scales(), **call.shapes(tile),
    )  # fmt: skip


# ---- the whole backward --------------------------------------------------------------------------------------------


def backward_pass(
    grad_output, query, key, value, output, lse, selected_blocks, layout, block_size, scale, settings, deterministic
):
    """(grad_query, grad_key, grad_value) of the engine contract, in passes that keep the temporaries bounded.

    Passes go over KV heads, then over queries. The sums of dK and dV are float32 and live for one pass over heads; the
    partial dQ, in the query's dtype, for one pass over queries. `deterministic` gives every bucket one program.
    """
    call = prepare(grad_output, query, key, value, output, lse, selected_blocks, layout, block_size, scale, settings)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    kv_heads, head_dim = key.shape[1:]
    entries_per_token = query.shape[1] // kv_heads * selected_blocks.shape[2]
    sorting = sort_bytes(layout.block_start.shape[0], deterministic)
    token_bytes = entries_per_token * (head_dim * query.element_size() + sorting)
    for heads in head_passes(kv_heads, max(query.shape[0] * token_bytes, key.shape[0] * head_dim * 8)):
        _head_pass(call, layout, heads, len(heads) * token_bytes, grads, deterministic)
    return tuple(grads)


def _head_pass(call: Backward, layout, heads: range, token_bytes: int, grads, deterministic: bool) -> None:
    """Some KV heads, in passes over queries. Temporaries are local here and below, gone before the next are made."""
    total_k, _, head_dim = call.key.shape
    sums = ()
    if call.selected_blocks.numel() and call.block_start.numel():
        shape = (len(heads), total_k, head_dim)
        since = call.block_start.new_empty((len(heads), call.block_start.shape[0]))
        sums = since, *(torch.empty(shape, dtype=torch.float32, device=call.key.device) for _ in "kv")
    for tokens in token_passes(call.query.shape[0], token_bytes):
        _query_pass(call, layout, tokens, heads, sums, grads[0], deterministic)
    own_block_keys(call, heads, sums, *grads[1:])


def _query_pass(call: Backward, layout, tokens: range, heads: range, sums, grad_query, deterministic: bool) -> None:
    entries = len(tokens) * call.query.shape[1] // call.key.shape[1] * call.selected_blocks.shape[2]
    partials = call.query.new_empty((len(heads), entries, call.query.shape[2]))
    if sums:
        _past_blocks(call, layout, tokens, heads, partials, sums, deterministic)
    own_block_queries(call, tokens, heads, partials, grad_query)


def _past_blocks(call: Backward, layout, tokens, kv_heads, partials, sums, deterministic: bool) -> None:
    settings, n_blocks = call.settings, call.block_start.shape[0]
    buckets = sort_by_block(
        call.selected_blocks, layout, tokens, kv_heads, call.key.shape[1], n_blocks, deterministic
    )  # fmt: skip
    rows = buckets.most if deterministic else settings.rows_per_program
    past_block_keys(call, buckets, tokens, kv_heads, partials, sums, rows)
    if not settings.fused:
        tiles = bucket_tiles(buckets, settings.past_queries.rows)
        past_block_queries(call, buckets, tiles, tokens, kv_heads, partials)
