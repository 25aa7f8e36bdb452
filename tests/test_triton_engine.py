"""The Triton engine in Triton's interpreter, on a CPU: selection, outputs, log-sum-exp and the three gradients.

The interpreter is chosen by an environment variable before triton is imported, for the whole process; so this file runs
itself in a process of its own (`test_in_the_interpreter`), and the other tests stay as they are.

The grid is the foundation's, scaled down: the interpreter takes about a second a case. Block sizes: a power of two and
multiples of 8 (masked key tiles), one that divides nothing, one above the size whose keys stay on chip. Lengths: empty,
1, B − 1, B, B + 1, long with a tail; queries at the end of longer keys, starting inside a block. Slots: none, one, more
than there are blocks. float32 and float16; bfloat16 cannot be tested here (the interpreter multiplies its raw bits) and
has its tests in test_gpu.py.
"""

from dataclasses import fields

import pytest
import torch
from interpreter import INTERPRETED, run_in_the_interpreter
from test_engines import around, cu, states
from tolerance import check_engine
from torch.utils._python_dispatch import TorchDispatchMode

from moba_hf.ops import cached_attention, engines, moba_attention, routing
from moba_hf.ops.blocks import BlockLayout
from moba_hf.ops.operator import attention_forward

pytest.importorskip("triton")
inside = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, in a process of its own")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.timeout(900)
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.mark.parametrize(
    ("triton", "numpy", "says"),
    [("3.6.0", "2.4.6", "triton>=3.7"), ("3.6.0", "2.3.5", None), ("3.7.1", "2.4.0", None), ("3.10.0", "2.10.1", None)],
)
def test_an_interpreter_that_cannot_run_the_kernels(monkeypatch, triton, numpy, says):
    """Triton 3.6 with NumPy 2.4 stops at a TypeError in every loop: said by the engine before it starts."""
    engine, installed = engines.load("triton"), {"triton": triton, "numpy": numpy}
    monkeypatch.setattr("importlib.metadata.version", installed.__getitem__)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engine.unavailable() is None if says is None else says in engine.unavailable()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "needs a CUDA device" in engine.unavailable()


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
@pytest.mark.parametrize("scale", [0, 1e-40, -0.3])
def test_scales_that_kernels_cannot_divide_by(scale):
    tensors = [x.requires_grad_() for x in states([50], [50], 2, 1, 16)]
    found = [
        _with_gradients(moba_attention(*tensors, block_size=16, top_k=3, scale=scale, engine=engine), tensors)
        for engine in ("triton", "reference")
    ]
    for actual, expected in zip(*found):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@inside
def test_few_queries_of_long_sequences(monkeypatch):
    """What lies between the queries' own blocks is not read, where a tile of rows spans sequences, nor scored."""
    from triton.runtime.interpreter import interpreter_builder

    lengths_q, lengths_k = [2, 0, 1, 3, 1], [150, 170, 400, 90, 7]
    query, key, value = states(lengths_q, lengths_k, 4, 2, 16)
    triton, where = engines.load("triton"), (cu(lengths_q), cu(lengths_k), 8)
    products, create_dot = [], interpreter_builder.create_dot
    with monkeypatch.context() as patch:
        patch.setattr(interpreter_builder, "create_dot", lambda *given: products.append(0) or create_dot(*given))
        selected = triton.select(query, key, *where, 2)
    assert torch.equal(selected, routing.select(query, key, *where, 2))
    # 18, 49 and 11 past blocks, 32 at a time, for two heads; from the first block to the last there are 99
    assert len(products) == 2 * (1 + 2 + 1)

    def results(key, value):
        output, lse = triton.forward(query, key, value, selected, *where, 0.25)
        return output, lse, *triton.backward(output, query, key, value, output, lse, selected, *where, 0.25)

    expected = results(key, value)
    unread = torch.ones(key.shape[:2], dtype=torch.bool)
    first_q = first_k = 0
    for queries, keys in zip(lengths_q, lengths_k):
        for token in range(first_q, first_q + queries):
            own = (keys - first_q - queries + token) // 8
            for head in range(4):
                for block in [own, *(b for b in selected[token, head].tolist() if b >= 0)]:
                    unread[first_k + block * 8 : first_k + min(block * 8 + 8, keys), head // 2] = False
        first_q, first_k = first_q + queries, first_k + keys
    assert unread.float().mean() > 0.5
    poisoned = [x.masked_fill(unread[..., None], float("nan")) for x in (key, value)]
    for ours, clean in zip(results(*poisoned), expected):
        assert torch.equal(ours, clean)


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
def test_selection_of_many_blocks():
    """Fewer rows at a time, so that the blocks kept stay in registers; beyond that a clear error."""
    query, key, _ = states([4], [310], 2, 1, 16)
    where = (query, key, cu([4]), cu([310]), 2)
    assert torch.equal(engines.load("triton").select(*where, 140), routing.select(*where, 140))
    with pytest.raises(ValueError, match="top_k must be at most 513 .* but was 514; engine='blockwise' takes it"):
        engines.load("triton").select(*where, 513)


@inside
def test_selection_where_a_tile_of_rows_spans_documents():
    """The second document has no past block, and shares a tile of rows with queries that have many."""
    lengths = [270, 4]
    query, key, _ = states(lengths, lengths, 1, 1, 16)
    where = (query, key, cu(lengths), cu(lengths), 4, 2)
    assert torch.equal(engines.load("triton").select(*where), routing.select(*where))


@inside
@pytest.mark.parametrize(("which", "kv_heads"), [("query", 3), ("query", 1), ("key", 3), ("value", 3)])
def test_a_head_beyond_2_to_the_31_elements(which, kv_heads):
    """[heads, tokens, head_dim] views, as a KV cache has them: 4 GB of address space, few pages touched.

    With one KV head, it is a head of a group that lies there.
    """
    tensors = dict(zip(("query", "key", "value"), states([40], [40], 3, kv_heads, 16, torch.float16)))
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


def last_two_tokens(monkeypatch, query, key, value, selected):
    """Output, lse, dQ, dK and dV of the last two queries of one sequence alone; blocks of 128, dK, dV in float32."""
    from moba_hf.ops.kernels import attention_backward, attention_forward
    from moba_hf.ops.kernels.backward_settings import backward_settings
    from moba_hf.ops.kernels.forward_settings import forward_settings

    total, shape = query.shape[0], ((8, 6), query.dtype, query.shape[2], 128)
    last = range(total - 2, total)
    monkeypatch.setattr(attention_forward, "token_passes", lambda *_: [last])
    layout = BlockLayout.build(cu([total]), cu([total]), total, total, 128)
    call = (selected, layout, 128, 0.25, forward_settings(*shape), False)
    output, lse = attention_forward.forward_pass(query, key, value, *call)
    where = (selected, layout.own_start, layout.key_row, layout.block_start, 128, 0.25, backward_settings(*shape))
    statistics = torch.stack((lse, lse), 2)
    backward = attention_backward.Backward(query, key, value, query, statistics, *where)
    dq = torch.empty_like(query)
    since = torch.full((key.shape[1], layout.block_start.shape[0]), -1, dtype=torch.int32)
    sums = [torch.zeros(key.shape[1], key.shape[0], query.shape[2]) for _ in "kv"]
    attention_backward._query_pass(backward, layout, last, range(key.shape[1]), (since, *sums), dq, False)
    return output[-2:], lse[-2:], dq[-2:], *sums


@inside
def test_tokens_beyond_2_to_the_31_elements(monkeypatch, tmp_path):
    """262K tokens in a buffer of 4 · 10⁹ elements, half of them queries, and 2 · 10⁹ selected blocks; sparse files.

    The two last tokens get what they get where the blocks they attend are all there is.
    """
    tokens, heads, slots, width = 2**18 + 16, 128, 64, 258
    blocks = torch.arange(slots) * 10 + 2**11 - 640
    attended = torch.cat([(blocks[:, None] * 128 + torch.arange(128)).flatten(), torch.arange(2**18, tokens)])
    small = torch.randn(len(attended), width, 64, generator=torch.Generator().manual_seed(0)).half()
    selected = torch.arange(slots, dtype=torch.int32).expand(len(attended), heads, slots).contiguous()
    split = lambda x: (x[:, :heads], x[:, 128:129], x[:, 129:130])  # noqa: E731
    expected = last_two_tokens(monkeypatch, *split(small), selected)

    def sparse(name, dtype, *shape):
        size = torch.Size(shape).numel()
        return torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=dtype).view(shape)

    large = sparse("states", torch.float16, tokens, width, 64)
    chosen = sparse("blocks", torch.int32, tokens, heads, slots)
    large[attended] = small
    chosen[-2:] = blocks
    *results, dk, dv = last_two_tokens(monkeypatch, *split(large), chosen)
    assert large.numel() > 2**32 and chosen.numel() > 2**31
    for ours, theirs in zip((*results, dk[:, attended], dv[:, attended]), expected):
        assert torch.equal(ours, theirs) and ours.abs().max() > 0


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
    "lengths",
    [
        ([5, 0, 7], [20, 3, 7]),
        ([0], [0]),
        ([40], [40]),
        ([1] * 30, [4] * 30),
        ([3, 2], [10, 2]),
        ([0, 1] * 900, [5, 1] * 900),
    ],
    ids=lambda lengths: f"{len(lengths[0])} sequences, {sum(lengths[0])} queries",
)
@pytest.mark.parametrize("beyond", [0, 6])
def test_block_layout(lengths, beyond):
    """The kernels' integers are those of the PyTorch version, also for rows past the last sequence."""
    from moba_hf.ops.kernels.block_layout import block_layout, own_queries

    where = (cu(lengths[0]), cu(lengths[1]), sum(lengths[0]) + beyond, sum(lengths[1]) + beyond, 4)
    ours, expected = block_layout(*where), BlockLayout.build(*where)
    for field in fields(BlockLayout):
        assert torch.equal(getattr(ours, field.name), getattr(expected, field.name)), field.name
    for keys in (1, 8):
        rows = torch.arange(0, where[3], keys, dtype=torch.int32)[:, None]
        meets = (ours.own_start < (rows + keys).clamp(max=where[3])) & (ours.key_row >= rows)
        first, end = own_queries(ours.own_start, ours.key_row, where[3], keys)
        assert torch.equal(end - first, meets.sum(1).int())
        assert all(hit[begin:stop].all() for hit, begin, stop in zip(meets, first, end))


@inside
def test_compiles_to_one_graph():
    """The kernels are opaque operators with shapes known beforehand: no graph break, equal results and gradients."""
    tensors = [x.requires_grad_() for x in states([60, 0, 5], [60, 0, 5], 4, 2, 16)]
    where = dict(block_size=16, top_k=2, cu_seqlens_q=cu([60, 0, 5]), cu_seqlens_k=cu([60, 0, 5]), engine="triton")
    compiled = torch.compile(moba_attention, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(
        *(_with_gradients(attend(*tensors, **where), tensors) for attend in (compiled, moba_attention))
    ):
        assert torch.equal(ours, eager)


def _with_gradients(output, tensors):
    return output, *torch.autograd.grad(output.sum(), tensors)


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
    """Routing, forward, backward and decoding never read a device value; on a GPU graphs are captured of them."""
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
            states_ = [x.transpose(0, 1)[None] for x in (query[-3:], key, value)]
            starts, means = torch.zeros(1, dtype=torch.int64), states_[1].unflatten(2, (7, 10)).mean(3)
            cached_attention(*states_, means, starts, block_size=10, top_k=2, engine="triton")
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
