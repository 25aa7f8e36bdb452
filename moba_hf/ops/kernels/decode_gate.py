"""Routing of few queries by the block means kept beside a key cache: two launches, where PyTorch takes twenty."""

import torch
import triton
import triton.language as tl

from .primitives import padded

MOST_BLOCKS = 16384  # scores that one program holds in registers while it takes the best
_TILE = 8192  # elements of a tile of means


@triton.jit(do_not_specialize=["q_len", "blocks"])
def decode_scores_kernel(
    q_ptr, means_ptr, scores_ptr, q_batch, q_head, q_token, m_batch, m_head, m_block, heads, q_len, blocks,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Gate scores ⟨q, mean⟩ of one query (batch, head, token) with BLOCKS blocks, in float32 (step 1).

    Program (r, i) owns row r = (batch · heads + head) · q_len + token and the blocks from i · BLOCKS on. q: [batch,
    heads, q_len, HEAD_DIM], means: [batch, kv_heads, blocks, HEAD_DIM], by strides; scores: float32 [rows, blocks],
    each written once. Memory-bound: products of one row need no matrix instruction.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head, token = row // (heads * q_len), row // q_len % heads, row % q_len
    block, d = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, WIDTH)
    q = tl.load(q_ptr + batch * q_batch + head * q_head + token * q_token + d, mask=d < HEAD_DIM, other=0.0)
    means_ptr += batch * m_batch + head // GROUP * m_head
    mask = (block < blocks)[:, None] & (d < HEAD_DIM)[None, :]
    means = tl.load(means_ptr + block[:, None].to(tl.int64) * m_block + d[None, :], mask=mask, other=0.0)
    scores = tl.sum(means.to(tl.float32) * q.to(tl.float32)[None, :], 1)
    tl.store(scores_ptr + row * blocks + block, scores, mask=block < blocks)


@triton.jit(do_not_specialize=["q_len", "kv_len", "blocks"])
def decode_select_kernel(
    scores_ptr, starts_ptr, selected_ptr, heads, q_len, kv_len, blocks,
    BLOCK_SIZE: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The SLOTS past blocks of one query with the highest scores; of equal scores the most recent block (step 1).

    Program r owns row r as in `decode_scores_kernel` and holds its scores, BLOCKS ≥ blocks, in registers. starts: int64
    [batch], place of a row's first token; selected: int64 [rows, SLOTS], each written: best first, then −1.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // (heads * q_len), row % q_len
    position = kv_len - q_len + token - tl.load(starts_ptr + batch)
    number = tl.arange(0, BLOCKS)
    left = number < tl.minimum(tl.maximum(position, 0) // BLOCK_SIZE, blocks)
    scores = tl.load(scores_ptr + row * blocks + number, mask=left, other=float("-inf"))
    for slot in range(SLOTS):
        high = tl.max(tl.where(left, scores, float("-inf")), 0)
        best = tl.max(tl.where(left & (scores == high), number, -1), 0)
        tl.store(selected_ptr + row * SLOTS + slot, best.to(tl.int64))
        left = left & (number != best)


def select_cached(query, means, starts, kv_len: int, block_size: int, slots: int) -> torch.Tensor:
    """Selected past blocks: int64 [batch, heads, q_len, slots], best first, then −1.

    query: [batch, heads, q_len, head_dim]; means: [batch, kv_heads, blocks ≤ MOST_BLOCKS, head_dim]; last strides 1.
    starts: int64 [batch]. The queries are the last q_len of kv_len places.
    """
    batch, heads, q_len, head_dim = query.shape
    rows, blocks = batch * heads * q_len, means.shape[2]
    selected = torch.empty((batch, heads, q_len, slots), dtype=torch.int64, device=query.device)
    if slots == 0:
        return selected
    scores = torch.empty((rows, blocks), dtype=torch.float32, device=query.device)
    width = padded(head_dim)
    tile = min(_TILE // width, max(2, triton.next_power_of_2(blocks)))
    decode_scores_kernel[(rows, triton.cdiv(blocks, tile))](
        query, means, scores, *query.stride()[:3], *means.stride()[:3], heads, q_len, blocks,
        GROUP=heads // means.shape[1], HEAD_DIM=head_dim, WIDTH=width, BLOCKS=tile, num_warps=4,
    )  # fmt: skip
    held = max(2, triton.next_power_of_2(blocks))
    decode_select_kernel[(rows,)](
        scores, starts, selected, heads, q_len, kv_len, blocks,
        BLOCK_SIZE=block_size, SLOTS=slots, BLOCKS=held, num_warps=min(16, max(1, held // 512)),
    )  # fmt: skip
    return selected
