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
