"""`scripts/count_kernels.py` against counts by hand, and the planner's cost model against what it counts.

It imports the interpreter, so it runs in a process of its own.
"""

from pathlib import Path
from unittest import mock

import pytest
import torch
from interpreter import INTERPRETED, run_in_the_interpreter
from test_engines import cu

from moba_hf import planner
from moba_hf.ops import routing

pytest.importorskip("triton")
SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.timeout(300)
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


in_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")


@pytest.fixture
def count_kernels(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import count_kernels

    return count_kernels


@in_the_interpreter
def test_counts_by_hand(count_kernels, capsys):
    length, heads, head_dim, block_size, slots = 700, 2, 64, 32, 2
    query, key, *_ = inputs = count_kernels.states(length, heads, 1, head_dim)
    found = count_kernels.count(*inputs, block_size, slots + 1)
    chosen = routing.select(query, key, cu([length]), cu([length]), block_size, slots)
    rows = chosen[chosen >= 0].bincount()
    tiles = int(((rows + 63) // 64).sum())  # of 64 rows, on sm_90
    assert rows.max() > 64 and tiles > len(rows)
    product = 2 * 64 * block_size * head_dim
    assert found["past_block_kernel"][0] == 2 * product * tiles
    assert found["past_block_keys_kernel"][0] == 5 * product * tiles
    blocks = length // block_size
    moved = blocks * (block_size * head_dim * 2 + head_dim * 2 + 4)  # keys read, means written, the block's start read
    assert found["block_means_kernel"] == [0, moved]
    count_kernels.main(["--length", "64", "--block-size", "16", "--top-k", "2"])
    out = capsys.readouterr().out
    for stage in ("gate", "forward", "backward"):
        assert f"| {stage} | **all** |" in out


LENGTH, HEADS, HEAD_DIM, BLOCK, ROW = 512, 2, 64, 64, 64 * 2  # one KV head; a row of a head in bytes


def no_padding(count_kernels, top_k: int) -> tuple[dict[str, list[int]], planner.AttentionCounts]:
    """(counted, the planner's) where tiles of 64 rows and keys hold nothing but work.

    A query of zeros selects the most recent blocks, so every row of a block selects the same ones, whatever the keys.
    """
    query, *others = count_kernels.states(LENGTH, HEADS, 1, HEAD_DIM)
    found = count_kernels.count(torch.zeros_like(query), *others, BLOCK, top_k)
    return found, planner.moba_counts(HEADS, 1, HEAD_DIM, planner.Work(LENGTH, BLOCK, top_k))


@in_the_interpreter
def test_the_planners_flops_are_those_of_the_kernels(count_kernels):
    """Past blocks to the last FLOP. In own blocks the kernels compute the masked half as well, and the backward's two
    kernels both rebuild scores and dP: 7 products of whole squares, where the planner has 5 of their causal halves."""
    found, model = no_padding(count_kernels, 3)
    flops = {name: counted for name, (counted, _) in found.items()}
    past = 4 * HEAD_DIM * BLOCK * model.selections
    own = model.forward_flops - past
    assert own == 4 * HEAD_DIM * HEADS * LENGTH * BLOCK / 2
    assert flops["past_block_kernel"] == past
    assert flops["own_block_merge_kernel"] == 2 * own
    assert flops["past_block_keys_kernel"] == model.backward_flops - 2.5 * own
    assert flops["own_block_keys_kernel"] + flops["own_block_queries_kernel"] == 7 * own


@in_the_interpreter
def test_the_planners_gate_is_that_of_the_kernel(count_kernels):
    """Rows of the first 32 blocks take one tile of 32 means, the others two; the planner has the half that is past."""
    length, block_size = 1024, 16
    query, key, *_ = count_kernels.states(length, HEADS, 1, HEAD_DIM)
    ends = torch.tensor([0, length], dtype=torch.int32)
    with count_kernels.Counter() as found, mock.patch.object(count_kernels.engine, "_capability", lambda _: (9, 0)):
        count_kernels.engine.select(query, key, ends, ends, block_size, 2)
    model = planner.moba_counts(HEADS, 1, HEAD_DIM, planner.Work(length, block_size, 3))
    assert found["gate_kernel"][0] == 1.5 * model.gate_flops
    means = (length // block_size) * (ROW + 4)  # written, and the blocks' starts read
    assert found["block_means_kernel"][1] == model.key_bytes + means


@in_the_interpreter
def test_the_planners_bytes_are_those_of_the_kernels(count_kernels):
    """Q, K, V, O and every selection to the last byte; what else the forward addresses is listed here."""
    (fewer, few), (more, many) = (no_padding(count_kernels, top_k) for top_k in (2, 3))
    moved = lambda found, *kernels: sum(found[name][1] for name in kernels)  # noqa: E731
    rows, blocks = LENGTH * HEADS, LENGTH // BLOCK
    forward = ("past_block_kernel", "own_block_merge_kernel")
    for found, model, slots in ((fewer, few, 1), (more, many, 2)):
        again = (blocks - 1) * 2 * BLOCK * ROW  # K and V of the blocks that are selected
        again += blocks * 2 * BLOCK // 2 * ROW  # 64 rows hold half a block of tokens; the second reads all keys
        of_rows = 4 * rows * (3 + slots)  # the own block's first and last key, the LSE; which blocks are selected
        rest = moved(found, *forward) - model.forward_bytes - model.selection_forward_bytes - again - of_rows
        assert 0 <= rest <= 20 * blocks  # four numbers a program say what it works on, one that it has no work
    backward = ("past_block_keys_kernel", "own_block_queries_kernel")
    extra = moved(more, *backward) - moved(fewer, *backward) - 4 * rows
    assert extra == many.selection_backward_bytes - few.selection_backward_bytes
    assert moved(more, "statistics_kernel", "own_block_keys_kernel", *backward) > many.backward_bytes
