"""`scripts/count_kernels.py` against counts by hand. It imports the interpreter, so it runs in a process of its own."""

from pathlib import Path

import pytest
import torch
from interpreter import INTERPRETED, run_in_the_interpreter
from test_engines import cu

from moba_hf.ops import routing

pytest.importorskip("triton")
SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.timeout(300)
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, in a process of its own")
def test_counts_by_hand(monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPTS)
    import count_kernels

    length, heads, head_dim, block_size, slots = 700, 2, 64, 32, 2
    found = count_kernels.count(length, heads, 1, head_dim, block_size, slots + 1)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(length, h, head_dim, generator=generator).half() for h in (heads, 1))
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
