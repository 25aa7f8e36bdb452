"""The counting sort of entries by block, and the buckets cut into tiles: the integers themselves, in the interpreter.

Like `test_triton_engine.py`, the file runs itself in a process of its own.
"""

import pytest
import torch
from interpreter import INTERPRETED, run_in_the_interpreter
from test_engines import cu

from moba_hf.ops.blocks import BlockLayout

pytest.importorskip("triton")
inside = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, in a process of its own")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.timeout(300)
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@inside
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kv_heads", [range(0, 3), range(1, 2), range(1, 3)], ids=str)
def test_sort(monkeypatch, kv_heads, deterministic):
    """Each head's buckets, of two sequences and several chunks, hold what chose the block, once."""
    from moba_hf.ops.kernels import bucket_sort

    monkeypatch.setattr(bucket_sort, "_TILE", 64)
    lengths, tokens, group, slots = [90, 60], range(20, 130), 2, 3
    layout = BlockLayout.build(cu(lengths), cu(lengths), 150, 150, 8)
    selected = torch.randint(-3, 7, (150, 6, slots), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    selected = selected.clamp(min=-1)
    selected[:, 2:4] = 4  # a head that chooses the same everywhere
    buckets = bucket_sort.sort_by_block(selected, layout, tokens, kv_heads, 3, 18, deterministic)
    assert buckets.most == len(tokens) * group * slots
    number = torch.where(selected >= 0, selected + layout.first_block[:, None, None], -1)[tokens.start : tokens.stop]
    for i, head in enumerate(kv_heads):
        flat = number[:, head * group : (head + 1) * group].flatten()
        for block in range(18):
            entries = buckets.entries[i, buckets.offsets[i, block] : buckets.offsets[i, block + 1]]
            assert torch.equal(entries.sort().values, (flat == block).nonzero()[:, 0].int())
            assert not deterministic or torch.equal(entries, entries.sort().values)


def cut(counts: list[int], rows_per_tile: int) -> list[tuple[int, int, int]]:
    """(bucket, begin, end) of every tile, in order, for one head whose entries begin at 0."""
    tiles, begin = [], 0
    for bucket, count in enumerate(counts):
        for first in range(begin, begin + count, rows_per_tile):
            tiles.append((bucket, first, min(first + rows_per_tile, begin + count)))
        begin += count
    return tiles


@inside
@pytest.mark.parametrize("rows_per_tile", [1, 3, 64, 10_000])
@pytest.mark.parametrize(
    "counts",
    [
        [[0, 7, 0, 0, 64, 65, 1], [130, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 12], [0] * 7],
        [[300]],
        [[5, 0, 0, 2] * 100],
    ],
    ids=["edges", "one block", "few entries"],
)
@pytest.mark.parametrize("shared", [False, True])
def test_tiles(counts, rows_per_tile, shared):
    """Every entry lies in one tile, tiles are in order and no more than shapes allow; heads in one row or their own."""
    check_tiles(counts, rows_per_tile, shared)


@inside
@pytest.mark.parametrize("last", [10, 200_000])
def test_tiles_of_many_blocks(last):
    check_tiles([[0, 1] * 35_000, [0] * 69_999 + [last]], 1000, True)


def check_tiles(counts: list[list[int]], rows_per_tile: int, shared: bool) -> None:
    from moba_hf.ops.kernels.bucket_sort import Buckets, bucket_tiles

    sizes = torch.tensor(counts)
    offsets = torch.nn.functional.pad(sizes.cumsum(1), (1, 0))
    origins = torch.zeros(len(counts), dtype=torch.int64)
    if shared:
        origins = sizes.sum(1).cumsum(0) - sizes.sum(1)
    most = int(sizes.sum(1).max()) + 20  # some chose no block
    buckets = Buckets(torch.empty(0), (offsets + origins[:, None]).int(), most)
    bucket, begin, end = bucket_tiles(buckets, rows_per_tile)
    assert bucket.dtype == begin.dtype == end.dtype == torch.int32
    assert bucket.shape[1] == min(most // rows_per_tile + len(counts[0]), most)
    for head, origin in enumerate(origins.tolist()):
        used = bucket[head] >= 0
        found = torch.stack([bucket[head, used], begin[head, used] - origin, end[head, used] - origin], 1)
        assert [tuple(tile) for tile in found.tolist()] == cut(counts[head], rows_per_tile)
