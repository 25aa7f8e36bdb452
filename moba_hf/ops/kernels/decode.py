"""Decoding: few queries, each against the blocks it attends in a key cache, without gathering them first.

Split over blocks (and over pieces of large blocks), so that a single token keeps a whole GPU busy; each split leaves a
partial output and a log-sum-exp in base 2, and a second kernel merges them in slot order: bitwise reproducible.
"""

import torch
import triton
import triton.language as tl

from .primitives import LOG2_E, padded
from .workspace import token_passes

_PIECE = 512  # keys a program reads one after the other at most
_TILE = 8192  # elements of a tile of keys


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def decode_split_kernel(
    q_ptr, k_ptr, v_ptr, blocks_ptr, starts_ptr, partial_ptr, partial_lse_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, heads, q_len, kv_len, scale_log2,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One query (batch, head, token) against one piece of one block it attends.

    Program (r, s) owns row r = (batch · heads + head) · q_len + token and piece s % PIECES of slot s // PIECES; the
    last slot is the own block. q: [batch, heads, q_len, HEAD_DIM]; k, v: [batch, kv_heads, kv_len, HEAD_DIM], by
    strides; blocks: int64 [rows, SLOTS], −1 where there is none; starts: int64 [batch]; partial: float32 [rows,
    (SLOTS + 1) · PIECES, HEAD_DIM], written where there are keys; partial_lse: float32, base 2, −inf where there are
    none. Memory-bound: products of one row need no matrix instruction.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head, token = row // (heads * q_len), row // q_len % heads, row % q_len
    slot, piece = split // PIECES, split % PIECES
    start = tl.load(starts_ptr + batch)
    position = kv_len - q_len + token - start
    past = tl.load(blocks_ptr + row * SLOTS + slot, mask=slot < SLOTS, other=-1)
    block = tl.where(slot < SLOTS, past, position // BLOCK_SIZE)
    first = block * BLOCK_SIZE + piece * PIECE
    end = tl.minimum(tl.minimum(first + PIECE, (block + 1) * BLOCK_SIZE), position + 1)
    out = row * tl.num_programs(1) + split
    if (block < 0) | (first >= end):
        tl.store(partial_lse_ptr + out, float("-inf"))
        return
    d = tl.arange(0, WIDTH)
    q = tl.load(q_ptr + batch * q_batch + head * q_head + token * q_token + d, mask=d < HEAD_DIM, other=0.0)
    q = q.to(tl.float32) * scale_log2
    k_ptr += batch * k_batch + head // GROUP * k_head + start * k_token
    v_ptr += batch * v_batch + head // GROUP * v_head + start * v_token
    high = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    output = tl.zeros([WIDTH], tl.float32)
    for begin in tl.range(0, PIECE, KEYS, num_stages=2):  # by default Triton loads nothing ahead here
        key = first + begin + tl.arange(0, KEYS)
        inside = key < end
        mask = inside[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + key[:, None] * k_token + d[None, :], mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(inside, tl.sum(k * q[None, :], 1), float("-inf"))
        highest = tl.maximum(high, tl.max(scores, 0))  # finite: the first tile has a key
        p = tl.math.exp2(scores - highest)
        correction = tl.math.exp2(high - highest)
        v = tl.load(v_ptr + key[:, None] * v_token + d[None, :], mask=mask, other=0.0).to(tl.float32)
        output = output * correction + tl.sum(p[:, None] * v, 0)
        total = total * correction + tl.sum(p, 0)
        high = highest
    tl.store(partial_ptr + out * HEAD_DIM + d, output / total, mask=d < HEAD_DIM)
    tl.store(partial_lse_ptr + out, high + tl.math.log2(total))


@triton.jit(do_not_specialize=["q_len"])
def decode_merge_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, out_batch, heads, q_len,
    SPLITS: tl.constexpr, SPLITS_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The softmax over all splits of a row from those of each: Σ 2^(lse_i − lse) · partial_i.

    Program r owns row r as in `decode_split_kernel`, whose partial and partial_lse it reads, ROWS splits at a time.
    out: [batch, q_len, heads, HEAD_DIM]; 0 for a query before its row's first token, which sees nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, SPLITS_WIDTH)
    lse = tl.load(partial_lse_ptr + row * SPLITS + every, mask=every < SPLITS, other=float("-inf"))
    high = tl.max(lse, 0)
    high = tl.where(high == float("-inf"), 0.0, high)
    total = tl.sum(tl.math.exp2(lse - high), 0)
    total = tl.where(total == 0.0, 1.0, total)
    d = tl.arange(0, WIDTH)
    output = tl.zeros([WIDTH], tl.float32)
    for first in range(0, SPLITS, ROWS):
        split = first + tl.arange(0, ROWS)
        part = tl.load(partial_lse_ptr + row * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
        mask = (part > float("-inf"))[:, None] & (d < HEAD_DIM)[None, :]
        partial = tl.load(partial_ptr + (row * SPLITS + split)[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
        output += tl.sum(tl.math.exp2(part - high)[:, None] * partial, 0)
    batch, head, token = row // (heads * q_len), row // q_len % heads, row % q_len
    offset = batch * out_batch + (token * heads + head) * HEAD_DIM
    tl.store(out_ptr + offset + d, (output / total).to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)


def attend_blocks(query, key, value, past_blocks, starts, block_size: int, scale: float) -> torch.Tensor:
    """[batch, q_len, heads, head_dim]: each query over its past blocks and its own, as in `ops.decode`.

    query: [batch, heads, q_len, head_dim]; key, value: [batch, kv_heads, kv_len, head_dim]; last strides 1.
    past_blocks: int64 [batch, heads, q_len, slots], −1 for none; starts: int64 [batch]. Many queries are taken in
    passes that keep the partial results within the workspace.
    """
    batch, heads, q_len, head_dim = query.shape
    splits = (past_blocks.shape[3] + 1) * triton.cdiv(block_size, min(_PIECE, block_size))
    output = torch.empty((batch, q_len, heads, head_dim), dtype=query.dtype, device=query.device)
    for tokens in token_passes(q_len, batch * heads * splits * (head_dim + 1) * 4):
        seen = slice(0, key.shape[2] - q_len + tokens.stop)  # the last query of a pass sees its own key last
        new = slice(tokens.start, tokens.stop)
        _attend(
            query[:, :, new], key[:, :, seen], value[:, :, seen], past_blocks[:, :, new], starts, block_size, scale,
            output[:, new],
        )  # fmt: skip
    return output


def _attend(query, key, value, past_blocks, starts, block_size: int, scale: float, output) -> None:
    """`attend_blocks` for one pass, into output [batch, q_len, heads, head_dim], contiguous but for the batch."""
    batch, heads, q_len, head_dim = query.shape
    slots, piece = past_blocks.shape[3], min(_PIECE, block_size)
    pieces = triton.cdiv(block_size, piece)
    rows, splits = batch * heads * q_len, (slots + 1) * pieces
    width = padded(head_dim)
    partial = torch.empty((rows, splits, head_dim), dtype=torch.float32, device=query.device)
    partial_lse = torch.empty((rows, splits), dtype=torch.float32, device=query.device)
    decode_split_kernel[(rows, splits)](
        query, key, value, past_blocks.contiguous(), starts, partial, partial_lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], heads, q_len, key.shape[2], scale * LOG2_E.value,
        GROUP=heads // key.shape[1], SLOTS=slots, BLOCK_SIZE=block_size, PIECE=piece, PIECES=pieces,
        HEAD_DIM=head_dim, WIDTH=width, KEYS=min(_TILE // width, triton.next_power_of_2(piece)), num_warps=4,
    )  # fmt: skip
    decode_merge_kernel[(rows,)](
        partial, partial_lse, output, output.stride(0), heads, q_len,
        SPLITS=splits, SPLITS_WIDTH=max(2, triton.next_power_of_2(splits)), HEAD_DIM=head_dim, WIDTH=width,
        ROWS=16, num_warps=4,
    )  # fmt: skip
