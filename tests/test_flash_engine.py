"""The flash engine: on the CPU through the stand-in provider, on a GPU through every provider importable there.

The stand-in returns NaN for whatever the provider contract leaves undefined and refuses segments longer than announced.
The grid, scaled down from the foundation's: three dtypes; group sizes 1, 2, all-heads-one-kv; packed lengths around the
edges of a block (empty, 1, B − 1, B, B + 1, a long one with a tail), all of them queries or the last few only, so that
queries begin inside a block; top_k 1 (no past stream), 2, and more than there are blocks; odd block sizes.
"""

import statistics
from types import SimpleNamespace

import pytest
import torch
from tolerance import assert_close_as_eager, check_engine, eager_attention, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import moba_hf
from moba_hf.ops import engines, routing
from moba_hf.ops.engines import flash_plan, flash_providers, flash_varlen
from moba_hf.ops.engines.gradient_sums import HalvedSums, WholeSums
from moba_hf.ops.engines.softmax_merge import merge_weights
from moba_hf.ops.operator import attention_forward


def cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def states(lengths_q, lengths_k, heads=4, kv_heads=2, dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths_q), heads), (sum(lengths_k), kv_heads), (sum(lengths_k), kv_heads))
    return [torch.randn(*shape, dim, generator=generator).to(dtype) for shape in shapes]


def around(block_size):
    return [0, 1, block_size - 1, block_size, block_size + 1, 5 * block_size + 3, 0]


def last_queries(lengths, most):
    return [min(n, most) if i % 2 else n // 3 for i, n in enumerate(lengths)]


@pytest.fixture
def small_pieces(monkeypatch):
    """Ranges of 5 tokens, which begin and end inside blocks, and bounds measured rather than taken from shapes."""
    monkeypatch.setenv("MOBA_HF_WORKSPACE_MB", "0")
    monkeypatch.setattr(flash_plan, "_TILE", 5)
    monkeypatch.setattr(flash_providers.CpuFlashAttention, "launches_by_max_seqlen", True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("block_size", [3, 5, 8])
@pytest.mark.parametrize("top_k", [1, 2, 50])
def test_lengths_and_budgets(dtype, heads, block_size, top_k):
    lengths = around(block_size)
    check_engine("flash", states(lengths, lengths, *heads, dtype=dtype), cu(lengths), cu(lengths), block_size, top_k)


@pytest.mark.parametrize("block_size", [3, 5, 8])
@pytest.mark.parametrize("top_k", [1, 2, 3, 50])
@pytest.mark.parametrize("most", [1, 4, 11, 1000])
def test_queries_at_the_end_of_longer_keys(block_size, top_k, most):
    lengths_k = around(block_size)
    lengths_q = last_queries(lengths_k, most)
    check_engine("flash", states(lengths_q, lengths_k), cu(lengths_q), cu(lengths_k), block_size, top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [3, 5, 8])
@pytest.mark.parametrize("top_k", [1, 2, 50])
@pytest.mark.parametrize("most", [11, 1000])
def test_work_cut_into_pieces(small_pieces, dtype, block_size, top_k, most):
    lengths_k = around(block_size)
    lengths_q = last_queries(lengths_k, most)
    tensors = states(lengths_q, lengths_k, 32, 2, dtype=dtype)  # a group so large that bounds are worth measuring
    check_engine("flash", tensors, cu(lengths_q), cu(lengths_k), block_size, top_k)


@pytest.mark.parametrize("top_k", [2, 50])
def test_blocks_of_one_token(top_k):
    """With top_k 1 the output would be the value itself, and the gradients of query and key nothing but rounding."""
    check_engine("flash", states([1, 0, 17], [1, 0, 17]), cu([1, 0, 17]), cu([1, 0, 17]), 1, top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (6, 2)], ids=str)
def test_tiles_where_each_key_has_its_query(small_pieces, monkeypatch, dtype, heads):
    """Tiles of one and of two blocks; the lower halves of the sums lie in dQ, at 3/3 heads not both at a time."""
    lengths = around(5)
    tensors, where = states(lengths, lengths, *heads, dtype=dtype), (cu(lengths), cu(lengths), 5)
    selected, sizes = routing.select(*tensors[:2], *where, 2), flash_plan._backward_sizes
    for blocks in (1, 2):
        monkeypatch.setattr(flash_plan, "_backward_sizes", lambda *x, blocks=blocks: (sizes(*x)[0], blocks))
        work = flash_plan.Work.plan(*tensors[:2], selected, *where, 1.0, backward=True)
        assert work.tiled and work.spare_heads == min(2, work.group) and len(work.ranges) > 5
        check_engine("flash", tensors, *where, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halved_sums_are_float32_sums(dtype):
    """Bit for bit, also where a sum leaves float16's range for a while, and whatever the strides."""
    make = lambda: [x[:, 1] for x in torch.zeros(2, 9, 3, 4, dtype=dtype)]  # noqa: E731
    whole, halved = make(), make()
    lower = torch.zeros(9, 5, 4, dtype=dtype).unbind(1)[:2]
    both = WholeSums(whole), HalvedSums(halved, lower)
    generator = torch.Generator().manual_seed(0)
    for start in (4, 2, 0, 3):
        keys = slice(start, start + 5)
        parts = [(torch.randn(5, 4, generator=generator) * 6e4).to(dtype).clamp(-6e4, 6e4) for _ in "kv"]
        for sums in both:
            sums.add(keys, parts)
    for sums in both:
        sums.finish(slice(3, 9))
        sums.finish(slice(0, 3))
    for expected, actual in zip(whole, halved):
        assert torch.equal(expected, actual) and (expected != 0).all()


@pytest.mark.parametrize("backward", [False, True])
def test_measured_bounds_are_exact(small_pieces, backward):
    """What tiles say of their entries and of the longest list in them: compared with the ordered entries."""
    query, key, _ = states([43, 9], [43, 9], 32, 2)
    where = (cu([43, 9]), cu([43, 9]), 4)
    selected = routing.select(query, key, *where, 2)
    work = flash_plan.Work.plan(query, key, selected, *where, 1.0, backward=backward)
    seen = 0
    for piece in work.pieces():
        past = work.order_by_block(piece)
        for tile in piece.tiles:
            segments = past.segments(tile)
            assert tile.max_rows == max(2, segments.cu_seqlens_q.diff().max().item()) == segments.max_seqlen_q
            assert segments.cu_seqlens_q[0] == segments.cu_seqlens_k[0] == 0
            assert segments.cu_seqlens_q[-1] == tile.entries.stop - tile.entries.start > 0
            seen += segments.cu_seqlens_q[-1]
    assert seen == (selected >= 0).sum() and work.tiled == backward


def test_attention_sink():
    query, key, value = states([200], [200], 8, 1)
    key[:4] += 2.0
    check_engine("flash", (query.abs(), key, value), cu([200]), cu([200]), 4, 3)


def test_strides_and_expanded_gradient():
    query, key, value = states([30], [30])
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key, value)]
    fused = torch.cat([query, key, value], 1).split([4, 2, 2], 1)
    where = dict(block_size=4, top_k=3, engine="flash")
    expected = run(lambda *x: moba_hf.moba_attention(*x, **where), (query, key, value))
    for views in (heads_first, fused):
        leaves = [x.detach().requires_grad_() for x in views]
        output = moba_hf.moba_attention(*leaves, **where)
        output.sum().backward()
        for actual, wanted in zip((output, *(x.grad for x in leaves)), expected):
            torch.testing.assert_close(actual, wanted)


def test_gradcheck():
    tensors = [x.double().requires_grad_() for x in states([7, 0, 4], [7, 0, 4], 2, 1, 4)]
    where = dict(block_size=2, top_k=2, cu_seqlens_q=cu([7, 0, 4]), cu_seqlens_k=cu([7, 0, 4]), engine="flash")
    assert torch.autograd.gradcheck(lambda *x: moba_hf.moba_attention(*x, **where), tensors)


@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize(("more_rows", "more_keys"), [(9, 9), (60, 1), (1, 60)])
@pytest.mark.parametrize("lengths", [(21, 30), (30, 30)])
def test_rows_past_the_last_sequence(request, slots, pieces, more_rows, more_keys, lengths):
    """Zeros, lse −inf and no gradient, whatever the rows hold; also where queries lag behind keys, and in pieces."""
    if pieces:
        request.getfixturevalue("small_pieces")
    nothing, (rows, keys) = float("nan"), lengths
    query, *key_value = states([rows], [keys], dtype=torch.bfloat16)
    padded = [torch.nn.functional.pad(query, (0, 0, 0, 0, 0, more_rows), value=nothing)]
    padded += [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, more_keys), value=nothing) for x in key_value]
    where = (cu([rows]), cu([keys]), 8)
    selected = torch.full((rows + more_rows, 4, slots), -1, dtype=torch.int32)
    selected[:rows] = routing.select(query, key_value[0], *where, slots)
    leaves = [x.requires_grad_() for x in padded]
    output, lse = attention_forward(*leaves, selected, *where, 0.25, "flash")
    output[:rows].sum().backward()
    assert (output[rows:] == 0).all() and (lse[rows:] == float("-inf")).all()
    assert output[:rows].isfinite().all() and lse[:rows].isfinite().all()
    exact = run(lambda *x: engines.load("reference").attention(*x, selected[:rows], *where, 0.25),
                [query, *key_value])  # fmt: skip
    for leaf, end, expected in zip(leaves, (rows, keys, keys), exact[1:]):
        assert (leaf.grad[end:] == 0).all()
        torch.testing.assert_close(leaf.grad[:end], expected, atol=3e-2, rtol=3e-2)


def test_nothing_at_all():
    tensors = states([0], [7])
    where = dict(block_size=4, top_k=2, cu_seqlens_q=cu([0]), cu_seqlens_k=cu([7]), engine="flash")
    results = run(lambda *x: moba_hf.moba_attention(*x, **where), tensors)
    assert [x.shape for x in results] == [x.shape for x in (tensors[0], *tensors)]
    assert all((x == 0).all() for x in results[1:])


def test_too_many_blocks_and_scales_it_cannot_take():
    query, key, value = states([4], [4], dim=8)
    long = key[:1].expand(70_000, -1, -1)
    with pytest.raises(ValueError, match="at most 65535 blocks"):
        moba_hf.moba_attention(query, long, long, block_size=1, top_k=1, engine="flash")
    nothing = torch.empty(4, 4, 0, dtype=torch.int32)
    with pytest.raises(ValueError, match="scale above 0"):  # the operator folds such a scale into the query
        flash_varlen.forward(query, key, value, nothing, cu([4]), cu([4]), 4, -1.0)


def test_merge_weights():
    lse = torch.tensor([[0.0, 0.0], [float("-inf"), 3.0], [float("-inf"), float("-inf")]])
    weights, total = merge_weights(lse)
    assert weights.tolist() == [[0.5, 0.5], [0.0, 1.0], [0.0, 0.0]]
    torch.testing.assert_close(total, torch.tensor([0.6931472, 3.0, float("-inf")]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    attention = torch.compile(
        lambda *x: moba_hf.moba_attention(*x, block_size=4, top_k=2, engine="flash"),
        backend="aot_eager", fullgraph=True, dynamic=dynamic,
    )  # fmt: skip
    for tokens in (20, 23):
        tensors = states([tokens], [tokens])
        expected = run(lambda *x: moba_hf.moba_attention(*x, block_size=4, top_k=2, engine="reference"), tensors)
        for actual, wanted in zip(run(attention, tensors), expected):
            torch.testing.assert_close(actual, wanted)


# ---- the choice of "auto" ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "flash", "triton", "block_size", "engine"),
    [
        ("cpu", None, False, 4096, "blockwise"),
        ("mps", None, True, 4096, "blockwise"),
        ("cuda", "fa3", True, 16384, "flash"),
        ("cuda", "fa4", True, 8192, "flash"),
        ("cuda", "fa4", True, 8191, "triton"),
        ("cuda", "fa2", True, 4096, "triton"),
        ("cuda", "torch", True, 4096, "triton"),
        ("cuda", "torch", False, 128, "flash"),
        ("cuda", "fa3", False, 128, "flash"),
        ("cuda", None, True, 4096, "triton"),
        ("cuda", None, False, 4096, "blockwise"),
    ],
)
def test_automatic_choice(device, flash, triton, block_size, engine):
    assert engines.automatic(device, flash, triton, block_size) == engine


@pytest.mark.parametrize(
    ("device", "reason", "kernel"), [("cuda", None, True), ("cuda", "no", False), ("cpu", None, False)]
)
def test_routing_by_triton_where_it_runs(monkeypatch, device, reason, kernel):
    triton = SimpleNamespace(unavailable=lambda: reason, select=object())
    monkeypatch.setattr(engines, "load", lambda name: triton if name == "triton" else flash_varlen)
    assert engines.routing_kernel("flash", device) is (triton.select if kernel else None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_without_a_gpu():
    status = moba_hf.engines()["flash"]
    assert not status.available and "no CUDA device" in status.reason and "meant for tests" in status.reason
    with pytest.raises(RuntimeError, match="no CUDA device"):
        engines.choose("flash", "cuda", torch.bfloat16, 4096, 128)
    assert engines.choose("flash", "cpu", torch.float32, 4096, 128) == "flash"
    assert engines.choose("auto", "cpu", torch.float32, 4096, 128) == "blockwise"


# ---- on a GPU ------------------------------------------------------------------------------------------------------

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=[pytest.param(name, marks=gpu) for name in flash_providers.ORDER])
def provider(request, monkeypatch):
    monkeypatch.setenv("MOBA_HF_FLASH_PROVIDER", request.param)
    reason = flash_varlen.unavailable()
    return request.param if reason is None else pytest.skip(reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "dim"), [((4, 4), 64), ((6, 2), 128), ((8, 1), 40)], ids=str)
@pytest.mark.parametrize("block_size", [48, 256])
@pytest.mark.parametrize("top_k", [1, 3, 50])
@pytest.mark.parametrize("pieces", [False, True])
def test_parity_on_a_gpu(provider, monkeypatch, dtype, heads, dim, block_size, top_k, pieces):
    """Bounded by the error of eager attention in the same dtype on the same GPU."""
    reason = flash_varlen.unsupported("cuda", dtype, dim)
    if reason:
        pytest.skip(reason)
    if pieces:
        monkeypatch.setenv("MOBA_HF_WORKSPACE_MB", "0")  # ranges of 128 tokens
    lengths_k = around(block_size)
    lengths_q = last_queries(lengths_k, 2 * block_size + 5) if pieces else lengths_k
    tensors = [x.cuda() for x in states(lengths_q, lengths_k, *heads, dim=dim, dtype=dtype)]
    check_engine_on_gpu(tensors, cu(lengths_q).cuda(), cu(lengths_k).cuda(), block_size, top_k)


def check_engine_on_gpu(tensors, cu_q, cu_k, block_size, top_k):
    query, key, _ = tensors
    selected = routing.select(query, key, cu_q, cu_k, block_size, top_k - 1)
    where = (selected, cu_q, cu_k, block_size, query.shape[-1] ** -0.5)
    grad = torch.randn(query.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(5)).to(query.dtype)
    wide = [x.double() for x in tensors]
    exact = run(lambda *x: engines.load("reference").attention(*x, *where), wide, grad)
    eager = run(lambda *x: eager_attention(*x, *where), tensors, grad)
    actual = run(lambda *x: attention_forward(*x, *where, "flash")[0], tensors, grad)
    for name, *results in zip(("output", "grad_query", "grad_key", "grad_value"), actual, exact, eager):
        assert_close_as_eager(*results, what=f"flash {name}")


def test_padded_rows_on_a_gpu(provider):
    """What lies past the sequences never reaches a result, with the real kernels' idea of undefined."""
    if provider == "fa4":
        pytest.xfail("flash-attn-4 4.0.0b36 multiplies values past the last sequence by 0: NaN there spreads")
    tensors = [torch.cat([x, torch.full_like(x[:9], float("nan"))]).cuda() for x in states([210], [300], dim=64)]
    leaves = [x.bfloat16().requires_grad_() for x in tensors]
    where = (cu([210]).cuda(), cu([300]).cuda(), 32)
    selected = routing.select(leaves[0].detach(), leaves[1].detach(), *where, 2)
    output, lse = attention_forward(*leaves, selected, *where, 0.125, "flash")
    output[:210].float().sum().backward()
    assert (output[210:] == 0).all() and (lse[210:] == float("-inf")).all() and output.isfinite().all()
    for leaf, rows in zip(leaves, (210, 300, 300)):
        assert (leaf.grad[rows:] == 0).all() and leaf.grad[:rows].isfinite().all()


@pytest.mark.parametrize("workspace", [64, 256])
def test_memory_on_a_gpu(provider, monkeypatch, workspace):
    """Extra memory stays within the workspace, in the backward too."""
    monkeypatch.setenv("MOBA_HF_WORKSPACE_MB", str(workspace))
    tokens, heads, kv_heads, dim, block_size = 32_768, 8, 2, 128, 1024
    query, grad = (torch.randn(tokens, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    key, value = (torch.randn(tokens, kv_heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    where = (cu([tokens]).cuda(), cu([tokens]).cuda(), block_size)
    arguments = (query, key, value, routing.select(query, key, *where, 5), *where, 0.1)
    output, lse = measured(lambda: flash_varlen.forward(*arguments), workspace)
    measured(lambda: flash_varlen.backward(grad, *arguments[:3], output, lse, *arguments[3:]), workspace)


def measured(function, megabytes):
    """The function's results; asserts that it took no more than this much memory beyond them."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = function()
    kept = sum(x.numel() * x.element_size() for x in results)
    extra = (torch.cuda.max_memory_allocated() - before - kept) / 2**20
    assert extra <= megabytes, f"took {extra:.0f} MiB beyond its results, allowed {megabytes:.0f}"
    return results


# (tokens, block_size, top_k, backward) of 32 query and 8 kv heads, head_dim 128: the design's settings S2 and S4
SETTINGS = {"S2": (1 << 20, 4096, 12, False), "S4": (128 << 10, 512, 8, True)}


@pytest.mark.parametrize("setting", SETTINGS)
def test_faster_than_dense_on_a_gpu(provider, setting, record_property):
    """Medians of interleaved rounds, routing included, beside the fastest dense kernel of PyTorch."""
    tokens, block_size, top_k, backward = SETTINGS[setting]
    make = lambda heads: torch.randn(tokens, heads, 128, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    leaves, grad = [make(heads).requires_grad_(backward) for heads in (32, 8, 8)], make(32)

    def dense(query, key, value):
        rows = (x[None].transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            return scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    def moba(query, key, value):
        return moba_hf.moba_attention(query, key, value, block_size=block_size, top_k=top_k, engine="flash")

    times = {dense: [], moba: []}
    for attention in (*times, *(2 * list(times))):  # the first of each warms up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        output = attention(*leaves)
        if backward:
            torch.autograd.grad(output, leaves, grad)
        end.record()
        end.synchronize()
        del output
        times[attention].append(start.elapsed_time(end))
    medians = [statistics.median(milliseconds[1:]) for milliseconds in times.values()]
    record_property(f"{setting} {provider}", "dense {:.1f} ms, flash {:.1f} ms".format(*medians))
    assert medians[1] < medians[0]
