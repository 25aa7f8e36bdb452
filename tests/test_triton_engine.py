"""The Triton engine in Triton's interpreter, on a CPU: selection, outputs, log-sum-exp and the three gradients.

The interpreter is chosen by an environment variable before triton is imported, for the whole process; so this file runs
itself in a process of its own (`test_in_the_interpreter`), and the other tests stay as they are.

The grid is the foundation's, scaled down: the interpreter takes about a second a case. Block sizes: a power of two and
multiples of 8 (masked key tiles), one that divides nothing, one above the size whose keys stay on chip. Lengths: empty,
1, B − 1, B, B + 1, long with a tail; queries at the end of longer keys, starting inside a block. Slots: none, one, more
than there are blocks. float32 and float16; bfloat16 cannot be tested here (the interpreter multiplies its raw bits) and
has its tests in test_gpu.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_engines import around, cu, states
from tolerance import check_engine
from torch.utils._python_dispatch import TorchDispatchMode

from moba_hf.ops import engines, routing
from moba_hf.ops.blocks import BlockLayout
from moba_hf.ops.operator import attention_forward

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, in a process of its own")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.timeout(900)
def test_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout[-3000:])
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("block_size", "top_k"), [(16, 3), (24, 2), (7, 2), (16, 1), (16, 50)])
def test_parity(dtype, block_size, top_k):
    lengths = around(block_size)
    check_engine("triton", states(lengths, lengths, 4, 2, 16, dtype), cu(lengths), cu(lengths), block_size, top_k)


@inside
@pytest.mark.parametrize("block_size", [16, 40])
def test_chunks_of_longer_keys(block_size):
    lengths_q, lengths_k = [5, 0, 20, 1], [60, 9, 95, 40]
    check_engine("triton", states(lengths_q, lengths_k, 3, 1, 20), cu(lengths_q), cu(lengths_k), block_size, 3)


@inside
def test_blocks_above_the_size_that_stays_on_chip():
    check_engine("triton", states([600], [600], 1, 1, 16), cu([600]), cu([600]), 272, 2)


@inside
@pytest.mark.parametrize("workspace_mb", ["0", "1"])
def test_small_workspace(monkeypatch, workspace_mb):
    """Passes over heads and queries, down to one token at a time, give the same result."""
    monkeypatch.setenv("MOBA_HF_WORKSPACE_MB", workspace_mb)
    check_engine("triton", states([8], [30], 4, 2, 16), cu([8]), cu([30]), 8, 3)


@inside
def test_all_queries_choose_one_block():
    query, key, value = states([260], [260], 4, 1, 16)
    key[:16] = 3.0
    check_engine("triton", (query.abs(), key, value), cu([260]), cu([260]), 16, 2)


@inside
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_selection(slots):
    """The blocks of the PyTorch routing; exact ties go to the most recent block inside and across tiles of blocks."""
    lengths = [0, 140, 17]
    query, key, _ = states(lengths, lengths, 2, 1, 16)
    tied = key.clone()
    tied[20:110] = 1.0
    for q, k in ((query, key), (torch.zeros_like(query), key), (query, tied)):
        where = (q, k, cu(lengths), cu(lengths), 4, slots)
        assert torch.equal(engines.load("triton").select(*where), routing.select(*where))


@inside
def test_selection_where_a_tile_of_rows_spans_documents():
    """The second document has no past block, and shares a tile of rows with queries that have many."""
    lengths = [270, 4]
    query, key, _ = states(lengths, lengths, 1, 1, 16)
    where = (query, key, cu(lengths), cu(lengths), 4, 2)
    assert torch.equal(engines.load("triton").select(*where), routing.select(*where))


@inside
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_a_head_beyond_2_to_the_31_elements(which):
    """[heads, tokens, head_dim] views, as a KV cache has them: 4 GB of address space, few pages touched."""
    tensors = dict(zip(("query", "key", "value"), states([40], [40], 3, 3, 16, torch.float16)))
    where = (cu([40]), cu([40]), 16)
    selected = routing.select(tensors["query"], tensors["key"], *where, 1)
    grad_output = torch.ones(40, 3, 16, dtype=torch.float16)

    def results(query, key, value):
        triton = engines.load("triton")
        output, lse = triton.forward(query, key, value, selected, *where, 0.25)
        grads = triton.backward(grad_output, query, key, value, output, lse, selected, *where, 0.25)
        return triton.select(query, key, *where, 1), output, lse, *grads

    expected = results(**tensors)
    stride = 2**30 + 1024  # head 2 begins above 2³¹
    far = torch.empty(2 * stride + 40 * 16, dtype=torch.float16).as_strided((40, 3, 16), (16, stride, 1))
    tensors[which] = far.copy_(tensors[which])
    assert all(torch.equal(one, two) for one, two in zip(results(**tensors), expected))


@inside
def test_rows_past_the_last_sequence():
    query, key, value = (torch.cat([x, torch.full_like(x[:9], float("nan"))]) for x in states([40], [40]))
    where = (cu([40]), cu([40]), 16)
    selected = engines.load("triton").select(query, key, *where, 1)
    assert (selected[40:] == -1).all()
    leaves = [x.requires_grad_() for x in (query, key, value)]
    output, lse = attention_forward(*leaves, selected, *where, 0.25, "triton")
    output[:40].sum().backward()
    assert (output[40:] == 0).all() and (lse[40:] == float("-inf")).all()
    assert all((x.grad[40:] == 0).all() and x.grad[:40].isfinite().all() for x in leaves)


@inside
@pytest.mark.parametrize("deterministic", [False, True])
def test_lse_and_determinism(deterministic):
    from moba_hf.ops.kernels.bucket_sort import sort_by_block

    query, key, value = states([150], [150], 2, 1, 16)
    where = (cu([150]), cu([150]), 16)
    selected = routing.select(query, key, *where, 2)
    ours, exact = (
        engines.load(name).forward(query, key, value, selected, *where, 0.25)[1] for name in ("triton", "blockwise")
    )
    torch.testing.assert_close(ours, exact)
    layout = BlockLayout.build(cu([150]), cu([150]), 150, 150, 16)
    buckets = sort_by_block(selected, layout, range(30, 150), range(1), 1, 9, deterministic)
    flat = selected[30:].flatten()
    for block in range(9):
        entries = buckets.entries[0, buckets.offsets[0, block] : buckets.offsets[0, block + 1]]
        assert torch.equal(entries.sort().values, (flat == block).nonzero()[:, 0].int())
        assert not deterministic or torch.equal(entries, entries.sort().values)


@inside
@pytest.mark.parametrize(
    "lengths", [([5, 0, 7], [20, 3, 7]), ([0], [0]), ([40], [40]), ([1] * 30, [4] * 30), ([3, 2], [10, 2])]
)
@pytest.mark.parametrize("beyond", [0, 6])
def test_block_layout(lengths, beyond):
    """The kernel's integers are those of the PyTorch version, also for rows past the last sequence."""
    from moba_hf.ops.kernels.block_layout import block_layout

    where = (cu(lengths[0]), cu(lengths[1]), sum(lengths[0]) + beyond, sum(lengths[1]) + beyond, 4)
    ours, expected = block_layout(*where), BlockLayout.build(*where)
    assert torch.equal(ours.query_position, expected.query_position)
    assert torch.equal(ours.block_start, expected.block_start)
    known = expected.query_position >= 0
    for name in ("key_start", "first_block"):
        assert torch.equal(getattr(ours, name)[known], getattr(expected, name)[known])


class _NoSync(TorchDispatchMode):
    """Raises where the host would wait for a device value."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "bincount")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if any(name.startswith(wait) for wait in self.WAITS):
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


@inside
@pytest.mark.parametrize("deterministic", [False, True])
def test_nothing_waits_for_the_device(deterministic):
    """Routing, forward and backward never read a device value; on a GPU test_gpu.py captures them in a graph."""
    lengths = [50, 0, 20]
    query, key, value = states(lengths, lengths, 2, 1, 16)
    triton, where = engines.load("triton"), (cu(lengths), cu(lengths), 16)
    torch.use_deterministic_algorithms(deterministic)
    try:
        with _NoSync():
            with pytest.raises(AssertionError, match="waits"):  # the mode can see a wait
                where[0][-1].item()
            selected = triton.select(query, key, *where, 2)
            output, lse = triton.forward(query, key, value, selected, *where, 0.25)
            triton.backward(output, query, key, value, output, lse, selected, *where, 0.25)
    finally:
        torch.use_deterministic_algorithms(False)


@inside
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float64, 64), (torch.bfloat16, 257)])
def test_what_the_kernels_cannot_hold(dtype, head_dim):
    """Refused when asked for, and not what "auto" takes."""
    with pytest.raises(RuntimeError, match="blockwise"):
        engines.choose("triton", "cuda", dtype, 512, head_dim)
    assert engines.choose("auto", "cuda", dtype, 512, head_dim) != "triton"
    assert engines.choose("auto", "cuda", torch.bfloat16, 512, 256) in ("triton", "flash")
