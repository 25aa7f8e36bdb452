"""Attention over the selected blocks: steps 3 to 5 of the paper's Algorithm 1.

Past blocks leave one partial output and log-sum-exp per entry (row, slot), addressed by the entry: the result does not
depend on the order in which a bucket was filled, so the forward is bitwise reproducible in every mode. The last kernel
merges the partials of each row in slot order, and its own block into them. Rows and entries are those of
`bucket_sort`; log-sum-exps of partials are in base 2.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..blocks import BlockLayout
from .bucket_sort import bucket_tiles, sort_by_block, sort_bytes
from .forward_settings import ForwardSettings
from .primitives import LN_2, LOG2_E, launch_shapes, load_rows, token_and_head
from .tuned_tiles import Tile
from .workspace import head_passes, token_passes


@triton.jit(do_not_specialize=["entries_head", "first_token", "first_kv_head", "max_tiles"])
def past_block_kernel(
    q_ptr, k_ptr, v_ptr, entries_ptr, bucket_ptr, begin_ptr, end_ptr, block_start_ptr, partial_ptr, partial_lse_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, entries_head, partial_head, first_token, first_kv_head,
    max_tiles, scale_log2,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block that fits one tile of keys: K and V stay on chip while the rows that chose it pass by (step 3).

    Program (i, h) owns the entries begin … end − 1 of one bucket of KV head first_kv_head + h.
    q: [total_q, heads, HEAD_DIM]; k, v: [total_k, kv_heads, HEAD_DIM]; entries: int32 [kv heads of the pass,
    max_entries]; bucket, begin, end: int32 [kv heads of the pass, max_tiles], bucket −1 where unused; block_start:
    int32 [n_blocks]; partial: [kv heads of the pass, entries, HEAD_DIM] and partial_lse: float32 [kv heads of the pass,
    entries], written at each entry, once.
    """
    slice_head = tl.program_id(1).to(tl.int64)
    tile = slice_head * max_tiles + tl.program_id(0)
    bucket = tl.load(bucket_ptr + tile)
    if bucket < 0:
        return
    begin, end = tl.load(begin_ptr + tile), tl.load(end_ptr + tile)
    kv_head = (first_kv_head + tl.program_id(1)).to(tl.int64)  # head strides reach past 2³¹
    d = tl.arange(0, WIDTH)
    within = tl.arange(0, KEYS)
    key = (tl.load(block_start_ptr + bucket) + within)[:, None].to(tl.int64)
    key_mask = (within < BLOCK_SIZE)[:, None] & (d < HEAD_DIM)[None, :]
    k = tl.load(k_ptr + key * k_token + kv_head * k_head + d[None, :], mask=key_mask, other=0.0)
    v = tl.load(v_ptr + key * v_token + kv_head * v_head + d[None, :], mask=key_mask, other=0.0)
    q_ptr += kv_head * GROUP * q_head
    entries_ptr += slice_head * entries_head
    partial_ptr += slice_head * partial_head * HEAD_DIM
    partial_lse_ptr += slice_head * partial_head
    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        taken = first + tl.arange(0, ROWS) < end
        entry = tl.load(entries_ptr + first + tl.arange(0, ROWS), mask=taken, other=0)
        token, head = token_and_head(entry // SLOTS, first_token, GROUP)
        q = load_rows(q_ptr, token, head, q_token, q_head, taken, HEAD_DIM, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if BLOCK_SIZE < KEYS:
            scores = tl.where((within < BLOCK_SIZE)[None, :], scores, float("-inf"))
        high = tl.max(scores, 1) * scale_log2  # the scale is positive; scaled here, the rest is one multiply-add each
        p = tl.math.exp2(scores * scale_log2 - high[:, None])
        total = tl.sum(p, 1)
        output = tl.dot(p.to(v.dtype), v, input_precision="ieee") * (1.0 / total)[:, None]
        entry64 = entry.to(tl.int64)
        tl.store(
            partial_ptr + entry64[:, None] * HEAD_DIM + d[None, :],
            output.to(partial_ptr.dtype.element_ty),
            mask=taken[:, None] & (d < HEAD_DIM)[None, :],
        )
        tl.store(partial_lse_ptr + entry64, high + tl.math.log2(total), mask=taken)


@triton.jit(do_not_specialize=["entries_head", "first_token", "first_kv_head", "max_tiles"])
def large_past_block_kernel(
    q_ptr, k_ptr, v_ptr, entries_ptr, bucket_ptr, begin_ptr, end_ptr, block_start_ptr, partial_ptr, partial_lse_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, entries_head, partial_head, first_token, first_kv_head,
    max_tiles, scale_log2,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A larger block: ROWS rows stay on chip while its keys pass by (step 3).

    Program (i, h) owns the entries begin … end − 1, at most ROWS of one bucket; pointers as in `past_block_kernel`.
    """
    slice_head = tl.program_id(1).to(tl.int64)
    tile = slice_head * max_tiles + tl.program_id(0)
    bucket = tl.load(bucket_ptr + tile)
    if bucket < 0:
        return
    kv_head = (first_kv_head + tl.program_id(1)).to(tl.int64)
    d = tl.arange(0, WIDTH)
    position = tl.load(begin_ptr + tile) + tl.arange(0, ROWS)
    taken = position < tl.load(end_ptr + tile)
    entry = tl.load(entries_ptr + slice_head * entries_head + position, mask=taken, other=0)
    token, head = token_and_head(entry // SLOTS, first_token, GROUP)
    q = load_rows(q_ptr + kv_head * GROUP * q_head, token, head, q_token, q_head, taken, HEAD_DIM, WIDTH)
    block_start = tl.load(block_start_ptr + bucket).to(tl.int64)
    k_ptr += block_start * k_token + kv_head * k_head
    v_ptr += block_start * v_token + kv_head * v_head
    high = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in tl.range(0, BLOCK_SIZE, KEYS, num_stages=STAGES):
        key = first + tl.arange(0, KEYS)
        key_mask = (key < BLOCK_SIZE)[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + key[:, None] * k_token + d[None, :], mask=key_mask, other=0.0)
        v = tl.load(v_ptr + key[:, None] * v_token + d[None, :], mask=key_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if BLOCK_SIZE % KEYS != 0:
            scores = tl.where((key < BLOCK_SIZE)[None, :], scores, float("-inf"))
        higher = tl.maximum(high, tl.max(scores, 1) * scale_log2)
        p = tl.math.exp2(scores * scale_log2 - higher[:, None])
        shrink = tl.math.exp2(high - higher)
        total = total * shrink + tl.sum(p, 1)
        output = tl.dot(p.to(v.dtype), v, output * shrink[:, None], input_precision="ieee")
        high = higher
    output = output * (1.0 / total)[:, None]
    entry64 = slice_head * partial_head + entry.to(tl.int64)
    tl.store(
        partial_ptr + entry64[:, None] * HEAD_DIM + d[None, :],
        output.to(partial_ptr.dtype.element_ty),
        mask=taken[:, None] & (d < HEAD_DIM)[None, :],
    )
    tl.store(partial_lse_ptr + entry64, high + tl.math.log2(total), mask=taken)


@triton.jit(do_not_specialize=["first_token", "end_token", "first_kv_head", "total_k"])
def own_block_merge_kernel(
    q_ptr, k_ptr, v_ptr, own_start_ptr, key_row_ptr, selected_ptr, partial_ptr, partial_lse_ptr, output_ptr, lse_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, partial_head, first_token, end_token, first_kv_head, total_k,
    heads, scale_log2,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The partials of the selected blocks, and the own block, causal (step 3), merged into them (steps 4 and 5).

    Program (i, h) owns ROWS rows of KV head first_kv_head + h. q, output: [total_q, heads, HEAD_DIM], output
    contiguous; k, v: [total_k, kv_heads, HEAD_DIM]; own_start, key_row: int32 [total_q], `BlockLayout`'s; selected:
    int32 [total_q, heads, SLOTS], −1 where there is no block, whose partial was never written; partial, partial_lse: as
    in `past_block_kernel`; lse: float32 [total_q, heads], natural logarithm. Every row of the range is written once.
    CHUNKS: queries are fewer than keys, so rows of several sequences may lie far apart: one own block after the other,
    rather than all keys from first to last.
    """
    slice_head = tl.program_id(1).to(tl.int64)
    kv_head = (first_kv_head + tl.program_id(1)).to(tl.int64)
    first_row = tl.program_id(0) * ROWS
    within = tl.arange(0, ROWS)
    taken = within < (end_token - first_token) * GROUP - first_row
    first_token += first_row // GROUP
    place = first_row % GROUP + within  # the row, counted from head 0 of first_token
    token, head = token_and_head(place, first_token, GROUP)
    d = tl.arange(0, WIDTH)
    q = load_rows(q_ptr + kv_head * GROUP * q_head, token, head, q_token, q_head, taken, HEAD_DIM, WIDTH)
    own_start = tl.load(own_start_ptr + token, mask=taken, other=total_k)
    key_row = tl.load(key_row_ptr + token, mask=taken, other=-1)
    key_row = tl.where(own_start < total_k, key_row, -1)  # a row of no sequence reads no key
    k_ptr += kv_head * k_head
    v_ptr += kv_head * v_head
    high = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, WIDTH], tl.float32)
    # a row's place: the tile's in 64 bits, within the tile in 32; in 64 bits, those of all rows would spill
    out = place // GROUP * heads + place % GROUP
    first_out = first_token.to(tl.int64) * heads + kv_head * GROUP
    selected_ptr += first_out * SLOTS
    output_ptr += first_out * HEAD_DIM
    lse_ptr += first_out
    first_entry = slice_head * partial_head + first_row.to(tl.int64) * SLOTS
    partial_ptr += first_entry * HEAD_DIM
    partial_lse_ptr += first_entry
    entry = within * SLOTS
    for slot in tl.range(0, SLOTS, num_stages=3):  # unrolled, the loads of all slots would spill
        block = tl.load(selected_ptr + out * SLOTS + slot, mask=taken, other=-1)
        some = block >= 0
        partial_lse = tl.load(partial_lse_ptr + entry + slot, mask=some, other=float("-inf"))
        partial_mask = some[:, None] & (d < HEAD_DIM)[None, :]
        partial = tl.load(partial_ptr + (entry + slot)[:, None] * HEAD_DIM + d[None, :], mask=partial_mask, other=0.0)
        higher = tl.maximum(high, partial_lse)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weight = tl.math.exp2(high - finite), tl.math.exp2(partial_lse - finite)
        total = total * shrink + weight
        output = output * shrink[:, None] + partial.to(tl.float32) * weight[:, None]
        high = higher
    start, last = tl.min(own_start, 0), tl.max(key_row, 0)
    if CHUNKS:
        while start <= last:
            ends = tl.where(own_start == start, key_row, -1)  # rows of the other blocks see none of these keys
            high, total, output = _attend_range(
                q, k_ptr, v_ptr, k_token, v_token, start, tl.max(ends, 0), own_start, ends, scale_log2, high, total,
                output, HEAD_DIM, WIDTH, KEYS, STAGES,
            )  # fmt: skip
            start = tl.min(tl.where(own_start > start, own_start, total_k), 0)
    else:
        high, total, output = _attend_range(
            q, k_ptr, v_ptr, k_token, v_token, start, last, own_start, key_row, scale_log2, high, total, output,
            HEAD_DIM, WIDTH, KEYS, STAGES,
        )  # fmt: skip
    empty = total == 0.0
    output = output * (1.0 / tl.where(empty, 1.0, total))[:, None]
    lse = tl.where(empty, float("-inf"), high + tl.math.log2(tl.where(empty, 1.0, total)))
    out_mask = taken[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(output_ptr + out[:, None] * HEAD_DIM + d[None, :], output.to(output_ptr.dtype.element_ty), mask=out_mask)
    tl.store(lse_ptr + out, lse * LN_2, mask=taken)


@triton.jit
def _attend_range(
    q, k_ptr, v_ptr, k_token, v_token, start, last, own_start, key_row, scale_log2, high, total, output,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention over the keys start … last, of which a row sees own_start … key_row, added to the running softmax.

    Keys after the last may belong to no sequence and hold NaN, which a weight of 0 would keep: they are not read.
    """
    d = tl.arange(0, WIDTH)
    # disable_licm: masks of the keys recomputed rather than kept; the output leaves few registers for them
    for first in tl.range(start, last + 1, KEYS, num_stages=STAGES, disable_licm=True):
        key = first + tl.arange(0, KEYS)
        key_mask = (key <= last)[:, None] & (d < HEAD_DIM)[None, :]
        key64 = key[:, None].to(tl.int64)
        k = tl.load(k_ptr + key64 * k_token + d[None, :], mask=key_mask, other=0.0)
        v = tl.load(v_ptr + key64 * v_token + d[None, :], mask=key_mask, other=0.0)
        visible = (own_start[:, None] <= key[None, :]) & (key[None, :] <= key_row[:, None])
        scores = tl.where(visible, tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
        higher = tl.maximum(high, tl.max(scores, 1) * scale_log2)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.math.exp2(scores * scale_log2 - finite[:, None])
        shrink = tl.math.exp2(high - finite)
        total = total * shrink + tl.sum(p, 1)
        output = tl.dot(p.to(v.dtype), v, output * shrink[:, None], input_precision="ieee")
        high = higher
    return high, total, output


# ---- launchers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forward:
    """What every launch of one forward pass shares.

    query: [total_q, heads, head_dim]; key, value: [total_k, kv_heads, head_dim]; last stride 1. selected_blocks: int32
    [total_q, heads, slots], contiguous.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    selected_blocks: torch.Tensor
    layout: BlockLayout
    block_size: int
    scale: float
    settings: ForwardSettings

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.key, self.value

    def strides(self) -> tuple[int, ...]:
        return tuple(n for x in self.tensors() for n in x.stride()[:2])

    def shapes(self, tile: Tile) -> dict[str, int]:
        return {"SLOTS": self.selected_blocks.shape[2], **launch_shapes(self.query, self.key, tile)}


def past_blocks(call: Forward, buckets, tokens: range, kv_heads: range, partial, partial_lse) -> None:
    """Write the partial output [kv heads of the pass, entries, head_dim] and LSE of every entry of `buckets`."""
    tile = call.settings.past
    tiles = bucket_tiles(buckets, call.settings.rows_per_program)
    kernel = past_block_kernel if call.settings.stationary else large_past_block_kernel
    kernel[(tiles[0].shape[1], len(kv_heads))](
        *call.tensors(), buckets.entries, *tiles, call.layout.block_start, partial, partial_lse, *call.strides(),
        buckets.entries.stride(0), partial.shape[1], tokens.start, kv_heads.start, tiles[0].shape[1],
        call.scale * LOG2_E.value, BLOCK_SIZE=call.block_size, **call.shapes(tile),
    )  # fmt: skip


def own_block_merge(call: Forward, tokens: range, kv_heads: range, partial, partial_lse, output, lse) -> None:
    """Write output and lse of the queries `tokens` and the heads of `kv_heads`: own blocks merged with the partials."""
    tile, group = call.settings.own, call.query.shape[1] // call.key.shape[1]
    chunks = call.query.shape[0] < call.key.shape[0]
    own_block_merge_kernel[(triton.cdiv(len(tokens) * group, tile.rows), len(kv_heads))](
        *call.tensors(), call.layout.own_start, call.layout.key_row, call.selected_blocks, partial, partial_lse,
        output, lse, *call.strides(), partial.shape[1], tokens.start, tokens.stop, kv_heads.start, call.key.shape[0],
        call.query.shape[1], call.scale * LOG2_E.value, CHUNKS=chunks, **call.shapes(tile),
    )  # fmt: skip


# ---- the whole forward ---------------------------------------------------------------------------------------------


def forward_pass(query, key, value, selected_blocks, layout, block_size, scale, settings, deterministic):
    """(output, lse) of the engine contract, in passes over KV heads and queries that keep the partials bounded."""
    call = Forward(query, key, value, selected_blocks.contiguous(), layout, block_size, scale, settings)
    total_q, heads, head_dim = query.shape
    kv_heads, n_blocks = key.shape[1], layout.block_start.shape[0]
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((total_q, heads), dtype=torch.float32, device=query.device)
    entries_per_token = heads // kv_heads * selected_blocks.shape[2]
    token_bytes = entries_per_token * (head_dim * query.element_size() + 4 + sort_bytes(n_blocks, deterministic))
    for head_pass in head_passes(kv_heads, total_q * token_bytes):
        for tokens in token_passes(total_q, len(head_pass) * token_bytes):
            _pass(call, tokens, head_pass, output, lse, deterministic)
    return output, lse


def _pass(call: Forward, tokens: range, kv_heads: range, output, lse, deterministic: bool) -> None:
    """One pass. A function of its own, so that its temporaries are gone before those of the next one are made."""
    n_blocks, group = call.layout.block_start.shape[0], call.query.shape[1] // call.key.shape[1]
    entries = len(tokens) * group * call.selected_blocks.shape[2]
    partial = output.new_empty((len(kv_heads), entries, output.shape[2]))
    partial_lse = lse.new_empty((len(kv_heads), entries))
    if entries and n_blocks:
        buckets = sort_by_block(
            call.selected_blocks, call.layout, tokens, kv_heads, call.key.shape[1], n_blocks, deterministic
        )
        past_blocks(call, buckets, tokens, kv_heads, partial, partial_lse)
    own_block_merge(call, tokens, kv_heads, partial, partial_lse, output, lse)
