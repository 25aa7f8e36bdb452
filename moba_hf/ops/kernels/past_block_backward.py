"""Backward of the past blocks: sums of dK and dV, and one partial dQ per entry; see `attention_backward`."""

import triton
import triton.language as tl

from .backward_call import Backward, load_queries
from .primitives import dot_minus, token_and_head

_LOOKED_AT = tl.constexpr(128)  # buckets at a time, in the search for a portion's


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
    if not used:
        return
    kv_head = (first_kv_head + tl.program_id(1)).to(tl.int64)  # head strides reach past 2³¹
    d = tl.arange(0, WIDTH)
    within = (tl.program_id(0) % key_tiles) * KEYS + tl.arange(0, KEYS)
    key = (block_start + within)[:, None].to(tl.int64)
    key_mask = (within < BLOCK_SIZE)[:, None] & (d < HEAD_DIM)[None, :]
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
        q, do, lse, delta = load_queries(
            q_ptr, do_ptr, statistics_ptr, token, head, q_token, q_head, do_token, do_head, heads, taken,
            HEAD_DIM, WIDTH,
        )  # fmt: skip
        scores = dot_minus(k, tl.trans(q), lse)
        p = tl.math.exp2(scores * scale_log2)
        if BLOCK_SIZE % KEYS != 0:
            p = tl.where((within < BLOCK_SIZE)[:, None], p, 0.0)
        dp = dot_minus(v, tl.trans(do), delta)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = (p * dp).to(q.dtype)
        if WITH_DQ:  # before dK: the last product of a step need not be waited for, and dQ is stored
            dq = tl.dot(tl.trans(ds), k, input_precision="ieee") * scale  # here: float16 has no range to spare
            out = entry[:, None].to(tl.int64) * HEAD_DIM + d[None, :]
            dq_mask = taken[:, None] & (d < HEAD_DIM)[None, :]
            tl.store(dq_ptr + out, dq.to(dq_ptr.dtype.element_ty), mask=dq_mask)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
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
    q, do, lse, delta = load_queries(
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
        p = tl.math.exp2((tl.dot(q, tl.trans(k), input_precision="ieee") - lse[:, None]) * scale_log2)
        if BLOCK_SIZE % KEYS != 0:
            p = tl.where(tl.trans(key) < BLOCK_SIZE, p, 0.0)
        ds = (p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])).to(q.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    out = slice_head * partial_head + entry[:, None].to(tl.int64) * HEAD_DIM + d[None, :]
    tl.store(dq_ptr + out, (dq * scale).to(dq_ptr.dtype.element_ty), mask=taken[:, None] & (d < HEAD_DIM)[None, :])


# ---- launchers -----------------------------------------------------------------------------------------------------


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


def past_block_queries(call: Backward, buckets, tiles, tokens, kv_heads, partials) -> None:
    """Write the partial dQ of every entry; tiles: cut for `past_queries.rows`, the rest as in `past_block_keys`."""
    tile, max_tiles = call.settings.past_queries, tiles[0].shape[1]
    past_block_queries_kernel[(max_tiles, len(kv_heads))](
        *call.tensors(), buckets.entries, *tiles, call.block_start, partials,
        *call.strides(), buckets.entries.stride(0), partials.stride(0),
        tokens.start, kv_heads.start, max_tiles, call.query.shape[1],
        SLOTS=call.selected_blocks.shape[2], BLOCK_SIZE=call.block_size, **call.scales(), **call.shapes(tile),
    )  # fmt: skip
