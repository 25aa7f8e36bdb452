"""Backward of the own blocks, which takes up what the past blocks left and rounds once; see `attention_backward`."""

import torch
import triton
import triton.language as tl

from .backward_call import Backward, load_pair, load_queries
from .block_layout import own_queries
from .primitives import dot_minus, token_and_head


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
        q, do, lse, delta = load_queries(
            q_ptr, do_ptr, statistics_ptr, token, head, q_token, q_head, do_token, do_head, heads, taken,
            HEAD_DIM, WIDTH,
        )  # fmt: skip
        which = (tl.arange(0, 4) == 0)[None, :]
        where = tl.where(which, own_start_ptr + token[:, None], key_row_ptr + token[:, None])
        own_start, key_row = load_pair(where, taken, -1)
        visible = (own_start[None, :] <= key[:, None]) & (key[:, None] <= key_row[None, :])
        scores = dot_minus(k, tl.trans(q), lse)
        p = tl.where(visible, tl.math.exp2(scores * scale_log2), 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = dot_minus(v, tl.trans(do), delta)
        # the second `where` keeps a row of keys that belongs to no sequence, which may hold anything, out of dK
        ds = tl.where(visible, p * dp, 0.0).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    out = key64 * dk_token + kv_head * dk_head + d[None, :]
    tl.store(dk_ptr + out, (dk * scale).to(dk_ptr.dtype.element_ty), mask=key_mask)
    out = key64 * dv_token + kv_head * dv_head + d[None, :]
    tl.store(dv_ptr + out, dv.to(dv_ptr.dtype.element_ty), mask=key_mask)


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
    q, do, lse, delta = load_queries(
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
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") - lse[:, None]
        p = tl.where(visible, tl.math.exp2(scores * scale_log2), 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(q.dtype), k, dq, input_precision="ieee")
    return dq


# ---- launchers -----------------------------------------------------------------------------------------------------


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


def own_block_queries(call: Backward, tokens, kv_heads, partials, grad_query) -> None:
    """Write dQ of the queries `tokens` and the heads of `kv_heads`: own blocks plus the partials."""
    tile, total_k, group = call.settings.own_queries, call.key.shape[0], call.query.shape[1] // call.key.shape[1]
    own_block_queries_kernel[(triton.cdiv(len(tokens) * group, tile.rows), len(kv_heads))](
        *call.tensors(), call.own_start, call.key_row, call.selected_blocks, partials, grad_query,
        *call.strides(), *grad_query.stride()[:2], partials.stride(0), tokens.start, tokens.stop, kv_heads.start,
        total_k, call.query.shape[1], inverse_scale=1 / call.scale,
        SLOTS=call.selected_blocks.shape[2], CHUNKS=call.query.shape[0] < total_k, **call.scales(), **call.shapes(tile),
    )  # fmt: skip
