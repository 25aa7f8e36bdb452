"""What the flash engine's backward holds beyond inputs and results, counted from shapes: its kernels only allocate.

Tensors have no data, so what the engine measures is given: the worst, an attention sink that every row selects.
"""

import pytest
import torch
from allocations import Allocations

from moba_hf.ops.engines import flash_plan, flash_providers, flash_varlen


class AllocatesAs(flash_providers.Provider):
    """A backward that allocates what FlashAttention-2 (also PyTorch's) or -3 does, as read in their sources.

    Both sum dQ in float32, with 128 rows more for each segment. For query heads that share keys, FlashAttention-2 makes
    dK and dV of each head first, FlashAttention-3 float32 sums of those, with 128 keys more for each segment.
    """

    launches_by_max_seqlen = True

    def __init__(self, name: str):
        self.name = name

    def backward(self, grad_output, query, key, value, output, lse, segments, scale):
        assert {len(x) for x in (grad_output, query, output, lse.contiguous().T)} == {len(query)}
        (rows, heads, width), (keys, kv_heads, _), pad = query.shape, key.shape, 128 * (len(segments.cu_seqlens_q) - 1)
        held = [query.new_empty(rows + pad, heads, width + 2, dtype=torch.float32)]
        for _ in "kv" if heads > kv_heads else "":
            if self.name == "fa2":
                held.append(key.new_empty(keys, heads, width))
            else:
                held.append(key.new_empty(keys + pad, kv_heads, width, dtype=torch.float32))
        return tuple(x.new_empty(x.shape) for x in (query, key, value))


def sink(provider, blocks, selected, kv_heads, ranges, tile_blocks):
    """flash_plan._rows where all rows select the same blocks, the first: as many entries in a tile as can be."""
    group, slots = selected.shape[1] // kv_heads, selected.shape[2]
    tiles = range(0, blocks.count, tile_blocks)

    def entries(tokens):
        rows, past = (tokens.stop - tokens.start) * group, (tokens.stop - 1) // blocks.longest  # blocks of one sequence
        lists = [max(0, min(slots - first, past - first, tile_blocks)) for first in tiles]
        return [(rows * n, max(2, rows)) for n in lists]

    return [[entries(tokens)] * kv_heads for tokens in ranges]


def backward_peak(monkeypatch, package, tokens, heads, kv_heads, block_size, slots) -> int:
    """Most bytes alive at a time beyond inputs and gradients; head_dim 128, bfloat16, one sequence."""
    monkeypatch.setattr(flash_providers, "choose", lambda *_: AllocatesAs(package))
    monkeypatch.setattr(flash_plan, "_keys_ahead", lambda *_: 0)
    monkeypatch.setattr(flash_plan, "_rows", sink)
    bounds = lambda blocks, tile: [*range(0, tokens, tile * block_size), tokens]  # noqa: E731
    monkeypatch.setattr(flash_plan, "_key_bounds", bounds)
    pieces_of = flash_plan.Work.pieces_of  # two at either end of each head: those between are like them
    ends_of = lambda *x: (lambda all_: all_[:2] + all_[2:][-2:])(list(pieces_of(*x)))  # noqa: E731
    monkeypatch.setattr(flash_plan.Work, "pieces_of", ends_of)
    make = lambda *shape, dtype=torch.bfloat16: torch.empty(tokens, *shape, dtype=dtype, device="meta")  # noqa: E731
    query, key, lse = make(heads, 128), make(kv_heads, 128), make(heads, dtype=torch.float32)
    selected, ends = make(heads, slots, dtype=torch.int32), torch.empty(2, dtype=torch.int32, device="meta")
    with Allocations() as count:
        grads = flash_varlen.backward(query, query, key, key, query, lse, selected, ends, ends, block_size, 0.1)
    return count.peak - sum(x.nbytes for x in grads)


M = 1 << 20
WORKSPACE = 1 << 30


@pytest.mark.parametrize("package", ["fa2", "fa3"])
@pytest.mark.parametrize(
    ("tokens", "heads", "block_size", "slots"),
    [
        *((M, heads, *blocks) for heads in ((8, 1), (32, 8), (8, 8)) for blocks in ((128, 63), (512, 7), (4096, 11))),
        *(
            (10 * M, heads, *blocks)
            for heads in ((8, 1), (16, 8), (8, 8), (2, 2))
            for blocks in ((256, 63), (4096, 11), (32768, 3))
        ),
        *((M // n, (32, 8), 512, 7) for n in (2, 4, 8)),
    ],
    ids=str,
)
def test_backward_stays_within_the_workspace(monkeypatch, package, tokens, heads, block_size, slots):
    """Of 1 GiB, which the float32 sums of dK and dV of one KV head alone fill at 1M tokens."""
    peak = backward_peak(monkeypatch, package, tokens, *heads, block_size, slots)
    assert WORKSPACE / 3 < peak <= WORKSPACE
