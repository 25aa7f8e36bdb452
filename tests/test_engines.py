"""Every engine against the float64 reference: outputs and the three gradients.

The grid: dtypes that round differently; group sizes 1, 3 and all-heads-one-kv; sequence lengths around the edges of a
block (empty, 1, B − 1, B, B + 1, a long one with a tail), as prefill and as queries at the end of longer keys, starting
inside a block; top_k 1 (no past block), 2 and more than there are; block sizes that divide nothing, a power of two
above the size at which own blocks are cut, and one larger than every sequence.
"""

import pytest
import torch
from tolerance import check_engine, run

import moba_hf
from moba_hf.ops import engines
from moba_hf.ops.operator import dense_attention

ENGINES = ["blockwise"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def states(lengths_q, lengths_k, heads=6, kv_heads=2, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((sum(lengths_q), heads), (sum(lengths_k), kv_heads), (sum(lengths_k), kv_heads))
    return [torch.randn(*shape, dim, generator=generator).to(dtype) for shape in shapes]


def around(block_size):
    return [0, 1, block_size - 1, block_size, block_size + 1, 5 * block_size + 3]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [7, 16, 24])
@pytest.mark.parametrize("top_k", [1, 2, 50])
@pytest.mark.parametrize("chunked", [False, True])
def test_lengths_and_budgets(engine, dtype, block_size, top_k, chunked):
    lengths_k = around(block_size)
    lengths_q = [min(n, block_size + 2) if i % 2 else n // 3 for i, n in enumerate(lengths_k)] if chunked else lengths_k
    check_engine(engine, states(lengths_q, lengths_k, dtype=dtype), cu(lengths_q), cu(lengths_k), block_size, top_k)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("dim", [8, 40, 128])
def test_heads(engine, heads, dim):
    lengths = [130, 45]
    check_engine(engine, states(lengths, lengths, *heads, dim=dim), cu(lengths), cu(lengths), 16, 3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("block_size", [100, 256, 512])
def test_cut_own_blocks(engine, block_size):
    lengths = [2 * block_size, 2 * block_size + 130, 60]
    check_engine(engine, states(lengths, lengths, 2, 1, 8), cu(lengths), cu(lengths), block_size, 2)


@pytest.mark.parametrize("engine", [*ENGINES, "dense"])
@pytest.mark.parametrize("scale", [1.7, 1e-3, -0.2, 0, 1e-40])
def test_scales(engine, scale):
    lengths = [70, 20]
    tensors = states(lengths, lengths, dtype=torch.float64)
    where = dict(cu_seqlens_q=cu(lengths), cu_seqlens_k=cu(lengths), scale=scale)
    moba = dict(block_size=16, top_k=2 if engine != "dense" else 9)
    if engine == "dense":
        actual = run(lambda *x: dense_attention(*x, **where), tensors)
    else:
        actual = run(lambda *x: moba_hf.moba_attention(*x, **moba, **where, engine=engine), tensors)
    expected = run(lambda *x: moba_hf.moba_attention(*x, **moba, **where, engine="reference"), tensors)
    for one, two in zip(actual, expected):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
def test_all_queries_choose_one_block(engine):
    """An attention sink: every row wants block 0, more rows than are gathered at a time."""
    lengths = [1200]
    query, key, value = states(lengths, lengths, 16, 1, 8)
    key[:16] = 3.0
    query = query.abs()
    check_engine(engine, (query, key, value), cu(lengths), cu(lengths), 16, 2)


@pytest.mark.parametrize("table_bytes", [1, 40_000])
@pytest.mark.parametrize("top_k", [1, 3])
def test_ranges_of_queries(table_bytes, top_k, monkeypatch):
    """Ranges end inside blocks and inside sequences; the smallest is one block long."""
    for name in ("_FORWARD_TABLE", "_BACKWARD_TABLE"):
        monkeypatch.setattr(engines.load("blockwise"), name, table_bytes)
    lengths_q, lengths_k = [50, 0, 3, 130, 20], [50, 5, 90, 130, 200]
    check_engine("blockwise", states(lengths_q, lengths_k), cu(lengths_q), cu(lengths_k), 24, top_k)


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_rows_shared_out_unevenly(threads):
    """The backward cuts a block's rows into one piece a thread and fills up the last; the filling counts nowhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pieces = engines.load("blockwise")._pieces(torch.arange(7, 7 + 64 * threads + 1))
        assert pieces.shape == (threads, 65)
        assert pieces.flatten()[64 * threads :].eq(7 + 64 * threads).all()
        check_engine("blockwise", states([700], [700], 3, 1, 8), cu([700]), cu([700]), 100, 3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("engine", ENGINES)
def test_strides(engine):
    """Views as Transformers hands them over, and the stride-0 gradient of sum()."""
    query, key, value = states([90], [90])
    views = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key, value)]
    where = dict(block_size=16, top_k=3, engine=engine)
    expected = run(lambda *x: moba_hf.moba_attention(*x, **where), (query, key, value))
    leaves = [x.requires_grad_() for x in views]
    output = moba_hf.moba_attention(*leaves, **where)
    output.sum().backward()
    for actual, wanted in zip((output, *(x.grad for x in leaves)), expected):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("engine", ["reference", *ENGINES])
def test_gradcheck(engine):
    """Against numerical differences in float64; the selection is piecewise constant, so it must not flip nearby."""
    lengths = [7, 1, 3]
    tensors = [x.double().requires_grad_() for x in states(lengths, lengths, 2, 1, 2)]
    where = dict(block_size=2, top_k=2, cu_seqlens_q=cu(lengths), cu_seqlens_k=cu(lengths), engine=engine)
    assert torch.autograd.gradcheck(lambda *x: moba_hf.moba_attention(*x, **where), tensors)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_at_all(engine):
    tensors = states([0, 0], [0, 0])
    where = dict(block_size=4, top_k=2, cu_seqlens_q=cu([0, 0]), cu_seqlens_k=cu([0, 0]), engine=engine)
    results = run(lambda *x: moba_hf.moba_attention(*x, **where), tensors)
    assert [x.shape for x in results] == [x.shape for x in (tensors[0], *tensors)]


@pytest.mark.parametrize("engine", ["dense", *ENGINES])
def test_rows_past_the_last_sequence(engine):
    """Compiled graphs keep padding at the end of the packed rows: zeros there, and no gradient."""
    query, key, value = states([40], [40])
    junk = [torch.cat([x, torch.full_like(x[:9], float("nan"))]) for x in (query, key, value)]
    from moba_hf.ops.operator import attention_forward

    slots = torch.full((49, 6, 1), -1, dtype=torch.int32)
    leaves = [x.requires_grad_() for x in junk]
    output, lse = attention_forward(*leaves, slots, cu([40]), cu([40]), 16, 0.25, engine)
    output[:40].sum().backward()
    assert (output[40:] == 0).all() and (lse[40:] == float("-inf")).all()
    assert all((x.grad[40:] == 0).all() and x.grad[:40].isfinite().all() for x in leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_attention_over_packed_sequences(dtype):
    lengths_q, lengths_k = [5, 0, 40, 1], [30, 0, 40, 9]
    tensors = states(lengths_q, lengths_k, dtype=dtype)
    where = dict(cu_seqlens_q=cu(lengths_q), cu_seqlens_k=cu(lengths_k))
    grad = torch.randn(tensors[0].shape).to(dtype)
    actual = run(lambda *x: dense_attention(*x, **where), tensors, grad)
    expected = run(
        lambda *x: moba_hf.moba_attention(*x, block_size=64, top_k=1, engine="reference", **where), tensors, grad
    )
    for one, two in zip(actual, expected):
        assert (one.double() - two.double()).norm() <= 3 * torch.finfo(dtype).eps * two.double().norm() + 1e-9


def test_auto_is_full_attention_where_the_blocks_cover_everything():
    lengths = [30, 16, 32]
    query, key, value = states(lengths, lengths)
    where = dict(cu_seqlens_q=cu(lengths), cu_seqlens_k=cu(lengths))
    auto = moba_hf.moba_attention(query, key, value, block_size=16, top_k=2, **where)
    assert torch.equal(auto, dense_attention(query, key, value, **where))
