"""On a CUDA device: the engines that need no Triton against the float64 reference, and a whole model."""

import pytest
import torch
from models import tiny_model, tokens
from test_engines import around, cu, states
from tolerance import check_engine

import moba_hf
from moba_hf.ops.operator import attention_forward

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("top_k", [1, 3])
def test_blockwise(dtype, top_k):
    lengths = around(16)
    tensors = [x.cuda() for x in states(lengths, lengths, dim=64, dtype=dtype)]
    check_engine("blockwise", tensors, cu(lengths).cuda(), cu(lengths).cuda(), 16, top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunked", [False, True])
def test_dense(dtype, chunked):
    """One block that covers everything is full attention; the queries are the last ones when chunked."""
    lengths_k = around(16)
    lengths_q = [n // 3 for n in lengths_k] if chunked else lengths_k
    tensors = [x.cuda() for x in states(lengths_q, lengths_k, dim=64, dtype=dtype)]
    check_engine("dense", tensors, cu(lengths_q).cuda(), cu(lengths_k).cuda(), 1024, 1)


def test_dense_rows_past_the_last_sequence():
    query, key, value = (
        torch.cat([x, torch.full_like(x[:9], float("nan"))]).cuda().bfloat16().requires_grad_()
        for x in states([40], [40], dim=64)
    )
    slots = torch.empty(49, 6, 0, dtype=torch.int32, device="cuda")
    output, lse = attention_forward(query, key, value, slots, cu([40]).cuda(), cu([40]).cuda(), 16, 0.1, "dense")
    output[:40].sum().backward()
    assert (output[40:] == 0).all() and (lse[40:] == float("-inf")).all()
    assert all((x.grad[40:] == 0).all() and x.grad[:40].isfinite().all() for x in (query, key, value))


@pytest.mark.parametrize("full_layers", [[], [0, 1]])
def test_a_model_gives_what_it_gives_on_a_cpu(full_layers):
    model, ids = tiny_model(), tokens(2, 60)
    moba_hf.configure(model, full_attention_layers=full_layers)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    given = dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    with torch.no_grad():
        expected = model(ids, **given).logits
        got = model.cuda()(ids.cuda(), **{name: x.cuda() for name, x in given.items()}).logits.cpu()
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("block_size", "top_k"), [(16, 3), (24, 9), (7, 2), (128, 4), (256, 3), (64, 1)])
@pytest.mark.parametrize("dim", [64, 128])
def test_triton(dtype, block_size, top_k, dim):
    lengths = [*around(block_size), 11 * block_size]
    tensors = [x.cuda() for x in states(lengths, lengths, dim=dim, dtype=dtype)]
    check_engine("triton", tensors, cu(lengths).cuda(), cu(lengths).cuda(), block_size, top_k)


@pytest.mark.parametrize("heads", [(4, 4), (8, 1), (6, 2)])
@pytest.mark.parametrize("dim", [16, 80, 192, 256])
@pytest.mark.parametrize("block_size", [32, 512])
def test_triton_heads_and_chunks(heads, dim, block_size):
    lengths_q, lengths_k = [300, 0, 17, 1], [1700, 5, 1040, 600]
    tensors = [x.cuda() for x in states(lengths_q, lengths_k, *heads, dim=dim, dtype=torch.bfloat16)]
    check_engine("triton", tensors, cu(lengths_q).cuda(), cu(lengths_k).cuda(), block_size, 3)


@pytest.mark.parametrize("top_k", [2, 5, 17])
def test_triton_routing(top_k):
    """The same blocks as the PyTorch routing, but for rows whose scores are nearer than rounding; ties exactly."""
    from moba_hf.ops import engines, routing

    lengths = [2000, 0, 333, 16]
    query, key, _ = (x.cuda() for x in states(lengths, lengths, dim=64, dtype=torch.bfloat16))
    for q, least in ((query, 0.999), (torch.zeros_like(query), 1.0)):
        where = (q, key, cu(lengths).cuda(), cu(lengths).cuda(), 16, top_k - 1)
        same = (engines.load("triton").select(*where) == routing.select(*where)).all(-1)
        assert same.double().mean() >= least


def test_triton_is_deterministic():
    """Outputs are bitwise equal from run to run in every mode, gradients when PyTorch asks for determinism."""
    lengths = [4000, 500]
    tensors = [x.cuda().requires_grad_() for x in states(lengths, lengths, dim=64, dtype=torch.bfloat16)]
    where = dict(
        block_size=64, top_k=4, cu_seqlens_q=cu(lengths).cuda(), cu_seqlens_k=cu(lengths).cuda(), engine="triton"
    )

    def run():
        output = moba_hf.moba_attention(*tensors, **where)
        return [output, *torch.autograd.grad(output.sin().sum(), tensors)]

    assert torch.equal(run()[0], run()[0])
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(one, two) for one, two in zip(run(), run()))
    finally:
        torch.use_deterministic_algorithms(False)


def test_triton_in_a_cuda_graph():
    """Forward and backward can be captured: nothing waits for the host."""
    lengths = [1000, 24]
    ends = cu(lengths).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # leaves and warm-up on the stream that is captured
        tensors = [x.cuda().requires_grad_() for x in states(lengths, lengths, dim=64, dtype=torch.bfloat16)]

        def step():
            output = moba_hf.moba_attention(
                *tensors, block_size=32, top_k=4, cu_seqlens_q=ends, cu_seqlens_k=ends, engine="triton"
            )
            return [output, *torch.autograd.grad(output.sum(), tensors)]

        expected = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        for x in captured:
            x.detach().fill_(float("nan"))
        graph.replay()
    stream.synchronize()
    torch.testing.assert_close(captured, expected)
