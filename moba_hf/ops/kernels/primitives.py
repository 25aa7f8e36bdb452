"""Tile operations that several kernels share."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def token_and_head(row, first_token, GROUP: tl.constexpr):
    """The token of each row and its head within the group of the KV head, int64; rows as in `bucket_sort`."""
    return (first_token + row // GROUP).to(tl.int64), (row % GROUP).to(tl.int64)


@triton.jit
def dot_minus(a, b, columns):
    """a b − columns: float32 [M, N]; a: [M, D], b: [D, N], columns: float32 [N].

    The product begins with them. Subtracted after, they would take registers of their own meanwhile: a thread holds
    few rows of a product, but a quarter of its columns.
    """
    begin = tl.broadcast_to(-columns[None, :], [a.shape[0], b.shape[1]])
    return tl.dot(a, b, begin, input_precision="ieee")


@triton.jit
def load_rows(ptr, token, head, token_stride, head_stride, taken, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH] of a tensor [tokens, heads, HEAD_DIM] whose rows are HEAD_DIM neighbours; 0 where not taken.

    ptr points to the head from which `head` counts: mostly the group's first, so that what all rows have in common is
    added once, not to every address.
    """
    d = tl.arange(0, WIDTH)
    offset = token * token_stride + head * head_stride
    return tl.load(ptr + offset[:, None] + d[None, :], mask=taken[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


# ---- launchers -----------------------------------------------------------------------------------------------------


def padded(size: int) -> int:
    """Elements that a tile takes for `size` of them, a head_dim or a block: a power of two, 16 for matrix products."""
    return max(16, triton.next_power_of_2(size))


def launch_shapes(query, key, tile) -> dict[str, int]:
    """The compile-time sizes of an attention kernel and its launch options.

    query: [tokens, heads, head_dim]; key: [tokens, kv_heads, head_dim]; tile: a `Tile`.
    """
    head_dim = query.shape[2]
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "HEAD_DIM": head_dim,
        "WIDTH": padded(head_dim),
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }
