"""What the launches of one backward pass share: its arguments, and what its kernels load of each row."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .backward_settings import BackwardSettings
from .primitives import LOG2_E, launch_shapes, load_rows, padded
from .tuned_tiles import Tile


@triton.jit(do_not_specialize=["rows"])
def statistics_kernel(
    do_ptr, o_ptr, lse_ptr, statistics_ptr, do_token, do_head, o_token, o_head, rows, heads, inverse_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What P and dS subtract in each row, side by side: LSE / scale, and δ = rowsum(dO · O).

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
    tl.store(statistics_ptr + row * 2, lse * inverse_scale, mask=row < rows)
    tl.store(statistics_ptr + row * 2 + 1, tl.sum(do.to(tl.float32) * o.to(tl.float32), 1), mask=row < rows)


@triton.jit
def load_queries(
    q_ptr, do_ptr, statistics_ptr, token, head, q_token, q_head, do_token, do_head, heads, taken,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Q, dO, LSE / scale and δ of each row (token, head); all 0 where not taken: so is what they add."""
    q = load_rows(q_ptr, token, head, q_token, q_head, taken, HEAD_DIM, WIDTH)
    do = load_rows(do_ptr, token, head, do_token, do_head, taken, HEAD_DIM, WIDTH)
    statistics_ptr += ((token * heads + head) * 2)[:, None] + tl.arange(0, 4)[None, :]
    lse, delta = load_pair(statistics_ptr, taken, 0.0)
    return q, do, lse, delta


@triton.jit
def load_pair(pointer, taken, other):
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
        return launch_shapes(self.query, self.key, tile)


def prepare(
    grad_output, query, key, value, output, lse, selected_blocks, layout, block_size, scale, settings
) -> Backward:
    """Everything that depends neither on the KV heads nor on the queries of a pass."""
    if grad_output.stride(2) != 1:
        grad_output = grad_output.contiguous()
    tokens, heads, head_dim = query.shape
    statistics = torch.empty((tokens, heads, 2), dtype=torch.float32, device=query.device)
    width = padded(head_dim)
    rows = max(1, 4096 // width)
    statistics_kernel[(triton.cdiv(tokens * heads, rows),)](
        grad_output, output, lse.contiguous(), statistics, *grad_output.stride()[:2], *output.stride()[:2],
        tokens * heads, heads, 1 / scale,
        HEAD_DIM=head_dim, WIDTH=width, ROWS=rows,
    )  # fmt: skip
    return Backward(
        query, key, value, grad_output, statistics, selected_blocks.contiguous(),
        layout.own_start, layout.key_row, layout.block_start, block_size, scale, settings,
    )  # fmt: skip
