"""What attention and the rest of a model cost: FLOPs, bytes, and the selections made. Arithmetic alone.

With d = head_dim, Hq query heads, Hk KV heads, N tokens, n = N / B blocks, w bytes an element (design: kernels.md):

    selections  P = Σ_i tokens_i · min(top_k − 1, i) · Hq over the blocks i: the first blocks have fewer past blocks
    means       reads K: N · Hk · d · w bytes
    gate        d · Hq · N · n FLOP (2 d a score, half of the scores are of the past); reads Q
    forward     4 d · B · P  +  4 d · Hq · Σ_i tokens_i² / 2 (own blocks, causal): two products, 2 FLOP each
    backward    2.5 times that: five products
    least bytes Q, K, V, O forward;  Q, O, dO, dQ, K, V, dK, dV backward
    selection   3 d · w + 12 bytes forward: Q row gathered, partial output and log-sum-exp written and read, index;
                4 d · w + 12 backward: Q and dO gathered with log-sum-exp and δ, partial dQ written and read, index.
                780 and 1036 bytes at d = 128, bf16; sorting is not in it.

A FLOP is a multiplication or an addition.
"""

from dataclasses import dataclass

from .shapes import ModelShape, Work

BACKWARD = 2.5  # matrix products of attention's backward over those of its forward


@dataclass(frozen=True)
class AttentionCounts:
    """One attention layer, one sequence. FLOPs and bytes; `selections` are (query, head, past block).

    key_bytes: K alone, which the block means read. The gate reads Q: what forward_bytes / 2 has beyond K.
    """

    length: int
    selections: int
    gate_flops: float
    forward_flops: float
    key_bytes: float
    forward_bytes: float
    backward_bytes: float
    selection_forward_bytes: float = 0
    selection_backward_bytes: float = 0

    @property
    def gate_bytes(self) -> float:
        """K for the means and Q for the scores."""
        return self.forward_bytes / 2

    @property
    def backward_flops(self) -> float:
        return BACKWARD * self.forward_flops


def block_lengths(length: int, block_size: int) -> tuple[int, int]:
    """(complete blocks, tokens after them)."""
    return divmod(length, block_size)


def selections_per_head(length: int, block_size: int, top_k: int) -> int:
    """Σ over the queries of one head of min(top_k − 1, past blocks)."""
    full, rest = block_lengths(length, block_size)
    ramp = min(full, top_k - 1)  # blocks 0 … ramp − 1 have fewer than top_k − 1 past blocks
    slots = ramp * (ramp - 1) // 2 + (full - ramp) * (top_k - 1)
    return slots * block_size + rest * min(top_k - 1, full)


def moba_counts(heads: int, kv_heads: int, head_dim: int, work: Work) -> AttentionCounts:
    """MoBA over one sequence; full attention where the blocks cover all of it, as engine="auto" computes it then."""
    if not work.sparse:
        return dense_counts(heads, kv_heads, head_dim, work)
    length, size, item = work.length, work.block_size, work.item
    full, rest = block_lengths(length, size)
    selections = heads * selections_per_head(length, size, work.top_k)
    own = heads * (full * size**2 + rest**2) / 2
    rows, keys = (length * h * head_dim * item for h in (heads, kv_heads))
    return AttentionCounts(
        length,
        selections,
        head_dim * heads * length * (length / size),
        4 * head_dim * (size * selections + own),
        keys,
        2 * rows + 2 * keys,
        4 * rows + 4 * keys,
        selections * (3 * head_dim * item + 12),
        selections * (4 * head_dim * item + 12),
    )


def dense_counts(heads: int, kv_heads: int, head_dim: int, work: Work) -> AttentionCounts:
    """Full causal attention over one sequence: 4 d · Hq · N² / 2 FLOP forward."""
    rows, keys = (work.length * h * head_dim * work.item for h in (heads, kv_heads))
    flops = 4 * head_dim * heads * work.length**2 / 2
    return AttentionCounts(work.length, 0, 0, flops, keys, 2 * rows + 2 * keys, 4 * rows + 4 * keys)


def linear_flops(shape: ModelShape, tokens: int) -> float:
    """Matrix products of one layer outside attention, forward: 2 FLOP an element of the matrices and token."""
    return 2.0 * shape.matrix_elements * tokens


def head_flops(shape: ModelShape, tokens: int) -> float:
    """The output head, forward."""
    return 2.0 * shape.hidden * shape.vocabulary * tokens


def elementwise_bytes(shape: ModelShape, tokens: int, item: int) -> float:
    """What norms, rotary embedding, SiLU and residual sums of one layer read and write, forward.

    Counted in Transformers' modeling_llama, run op by op: two norms and two sums pass over the hidden state about 30
    times, the rotary embedding over query and key 10 times, SiLU and the product with `up` over the MLP's 5 times.
    """
    width = 30 * shape.hidden + 10 * (shape.heads + shape.kv_heads) * shape.head_dim + 5 * shape.intermediate
    return float(width * tokens * item)


@dataclass(frozen=True)
class DecodeCounts:
    """One new token of one sequence, all layers."""

    flops: float
    weight_bytes: float
    cache_bytes: float
    means_bytes: float


def decode_counts(shape: ModelShape, work: Work, full_layers: int) -> DecodeCounts:
    """Weights are read once; full layers read their whole cache, routed ones the block means and the blocks selected.

    Each query head selects for itself, so a group reads at most its heads' selections together.
    """
    group, row = shape.heads // shape.kv_heads, shape.kv_heads * shape.head_dim * work.item
    seen = min(work.length, work.block_size * work.top_k)
    routed = shape.layers - full_layers if work.decode == "moba" and work.sparse else 0
    full = shape.layers - routed
    blocks = work.length // work.block_size
    attention = 4 * shape.head_dim * shape.heads * (full * work.length + routed * seen)
    gate = 2 * shape.head_dim * shape.heads * routed * blocks
    matrices = shape.layers * shape.matrix_elements + shape.hidden * shape.vocabulary
    cache = 2 * row * (full * work.length + routed * min(work.length, group * seen))
    return DecodeCounts(
        2.0 * matrices + attention + gate, float(matrices * work.item), float(cache), float(routed * blocks * row)
    )
