"""What the Triton engine allocates, counted from shapes: it runs on tensors without data, and its launches do nothing.

Everything counts that is alive at a time beyond inputs and results: partials, counters, entries, tiles, sums.
"""

import os
from unittest import mock

import pytest
import torch
from allocations import Allocations

from moba_hf.ops import engines

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="launches are not made here")


def peaks(tokens: int, heads: int, kv_heads: int, block_size: int, slots: int) -> dict[str, int]:
    """Most bytes alive at a time beyond inputs and results, for each stage; head_dim 128, bfloat16, one sequence."""
    from triton.runtime.jit import JITFunction

    make = lambda h: torch.empty(tokens, h, 128, dtype=torch.bfloat16, device="meta")  # noqa: E731
    query, key, value, grad = make(heads), make(kv_heads), make(kv_heads), make(heads)
    engine, ends = engines.load("triton"), torch.empty(2, dtype=torch.int32, device="meta")
    where, found = (ends, ends, block_size), {}
    with (
        mock.patch.object(JITFunction, "run", lambda *args, **kwargs: None),
        mock.patch.object(engine, "_capability", lambda _: (9, 0)),
    ):
        with Allocations() as count:
            selected = engine.select(query, key, *where, slots)
        found["select"] = count.peak - selected.nbytes
        with Allocations() as count:
            output, lse = engine.forward(query, key, value, selected, *where, 0.1)
        found["forward"] = count.peak - output.nbytes - lse.nbytes
        with Allocations() as count:
            grads = engine.backward(grad, query, key, value, output, lse, selected, *where, 0.1)
        found["backward"] = count.peak - sum(x.nbytes for x in grads)
    return found


def test_the_counter_counts():
    with Allocations() as count:
        kept = torch.empty(1000, dtype=torch.float32, device="meta")
        gone = kept + 1
        view = kept[:10]
        assert count.live == 8000 and view.shape == (10,)
        del gone
        kept.add_(1)
        assert (count.live, count.peak) == (4000, 8000)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("workspace_mb", [256, 1024])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "block_size", "slots"),
    [(1 << 20, 8, 2, 16, 7), (1 << 20, 8, 2, 4096, 11), (1 << 20, 2, 2, 128, 63), (1 << 17, 32, 8, 512, 7)],
)
def test_memory_is_bounded(monkeypatch, tokens, heads, kv_heads, block_size, slots, workspace_mb, deterministic):
    """Entries stay within the workspace; beside it are the float32 sums of dK and dV and what each token has once."""
    monkeypatch.setenv("MOBA_HF_WORKSPACE_MB", str(workspace_mb))
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = peaks(tokens, heads, kv_heads, block_size, slots)
    finally:
        torch.use_deterministic_algorithms(False)
    blocks, workspace = tokens // block_size, workspace_mb << 20
    means = blocks * kv_heads * 128 * 2
    per_token = 16 * 4 * tokens + 4 * tokens * heads  # layout and bounds of the own blocks; δ
    tiles = 16 * 8 * blocks * kv_heads  # every bucket may end in a tile that is not full
    sums = max(workspace, tokens * 128 * 8)  # of one head at least
    assert found["select"] <= means + per_token
    assert workspace / 3 < found["forward"] <= 1.02 * workspace + per_token + tiles
    assert workspace / 3 < found["backward"] <= 1.02 * workspace + per_token + tiles + sums
