"""The Triton decode kernel: in Triton's interpreter on a CPU, and on a GPU where there is one.

The interpreter is chosen before triton is imported, for the whole process: this file runs itself in one of its own. The
grid: one piece a block and several with a short last one (the piece is made small), blocks of a power of two and of
none, more slots than blocks, one and several new tokens, rows that start at different places, GQA and none.
"""

import pytest
import torch
from interpreter import INTERPRETED, run_in_the_interpreter
from models import tiny_model, tokens
from tolerance import assert_close_as_eager

import moba_hf
from moba_hf import MobaCache, moba_attention, ops
from moba_hf.integration.cache import MobaLayer

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
inside = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="run by test_in_the_interpreter")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # not in the interpreter: raw bits


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.timeout(600)
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def cached(starts, q_len: int, length: int, heads: int, kv_heads: int, width: int, block_size: int, dtype):
    """query [batch, heads, q_len, width], key and value as a MobaCache hands them out, means and starts."""
    generator = torch.Generator().manual_seed(length)
    make = lambda h, n: torch.randn(len(starts), h, n, width, generator=generator).to(DEVICE, dtype)  # noqa: E731
    layer = MobaLayer()
    with torch.no_grad():
        layer.update(make(kv_heads, length - q_len), make(kv_heads, length - q_len))
        key, value = layer.update(make(kv_heads, q_len), make(kv_heads, q_len))
        means = layer.block_means(key, starts, block_size)
    return make(heads, q_len), key, value, means, torch.tensor(starts, device=DEVICE)


@inside
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("piece", [16, 512])
@pytest.mark.parametrize(("block_size", "top_k"), [(16, 3), (24, 2), (40, 3), (7, 4), (16, 1), (16, 50)])
def test_equals_pytorch(monkeypatch, dtype, piece, block_size, top_k):
    from moba_hf.ops.kernels import decode

    monkeypatch.setattr(decode, "_PIECE", piece)
    for starts, q_len, heads, kv_heads, width in (((0, 9), 1, 4, 2, 16), ((3,), 3, 3, 3, 20)):
        tensors = cached(starts, q_len, 101, heads, kv_heads, width, block_size, dtype)
        where = dict(block_size=block_size, top_k=top_k, scale=0.3)
        got = ops.cached_attention(*tensors, **where, engine="triton")
        eager = ops.cached_attention(*tensors, **where, engine="blockwise")
        exact = ops.cached_attention(*(x.double() for x in tensors[:4]), tensors[4], **where, engine="blockwise")
        assert got.shape == exact.shape and got.dtype == dtype
        assert_close_as_eager(got, exact, eager)


@inside
@pytest.mark.parametrize(("block_size", "slots"), [(4, 2), (5, 7), (3, 40), (64, 3), (8, 0)])
def test_selects_what_pytorch_selects(block_size, slots):
    """Whole numbers, so that equal scores are many and exact: the most recent of them wins, as in PyTorch."""
    from moba_hf.ops import decode
    from moba_hf.ops.engines import triton as engine

    for starts, q_len in (((0, 9), 1), ((3, 97, 0), 3)):
        query, key, _, _, on_device = cached(starts, q_len, 101, 4, 2, 16, block_size, torch.float32)
        blocks = 101 // block_size
        means = key[:, :, :blocks].round().contiguous()
        query = query.round() * (torch.arange(4, device=DEVICE) > 0)[:, None, None]  # one head's query is zero
        position = 101 - q_len + torch.arange(q_len, device=DEVICE) - on_device[:, None]
        kept = min(slots, blocks)
        expected = decode.select_from_means(query, means, position // block_size, kept)
        assert torch.equal(engine.select_cached(query, means, on_device, 101, block_size, kept), expected)


@inside
def test_more_blocks_than_the_routing_kernel_takes(monkeypatch):
    from moba_hf.ops.kernels import decode_gate

    where = dict(block_size=8, top_k=3, engine="triton")
    tensors = cached((0, 5), 2, 60, 4, 2, 16, 8, torch.float32)
    expected = ops.cached_attention(*tensors, **where)
    monkeypatch.setattr(decode_gate, "MOST_BLOCKS", 4)
    monkeypatch.setattr(decode_gate, "select_cached", lambda *_: pytest.fail("too many blocks"))
    torch.testing.assert_close(ops.cached_attention(*tensors, **where), expected)


@inside
@pytest.mark.parametrize("workspace_mb", ["0", "1"])
def test_many_queries_in_passes(monkeypatch, workspace_mb):
    """Partial results stay within the workspace, down to one token at a time; the result is bitwise the same."""
    where = dict(block_size=8, top_k=3, engine="triton")
    tensors = cached((0, 5), 6, 60, 4, 2, 16, 8, torch.float32)
    expected = ops.cached_attention(*tensors, **where)
    monkeypatch.setenv("MOBA_HF_WORKSPACE_MB", workspace_mb)
    assert torch.equal(ops.cached_attention(*tensors, **where), expected)
    exact = ops.cached_attention(*tensors, **where | {"engine": "blockwise"})
    torch.testing.assert_close(expected, exact, atol=1e-5, rtol=1e-5)


@inside
def test_queries_that_are_padding():
    """Rows of unequal length, of which one begins with the second of three new tokens: what lies before gives 0."""
    tensors = cached((0, 38, 9), 3, 40, 4, 2, 16, 8, torch.float32)
    where = dict(block_size=8, top_k=3)
    got = ops.cached_attention(*tensors, **where, engine="triton")
    assert (got[1, 0] == 0).all() and got.isfinite().all()
    exact = ops.cached_attention(*tensors, **where, engine="blockwise")
    for row, first in ((0, 0), (1, 1), (2, 0)):
        torch.testing.assert_close(got[row, first:], exact[row, first:], atol=1e-5, rtol=1e-5)


@inside
def test_views_and_a_block_of_one_key():
    """Strides as a cache has them that is longer than what is used, and a query of [batch, q_len, heads, width]."""
    query, key, value, means, on_device = cached((0, 4), 2, 30, 4, 2, 20, 1, torch.float32)
    where = dict(block_size=1, top_k=6, engine="triton")
    expected = ops.cached_attention(query, key, value, means, on_device, **where)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    key, value = (torch.nn.functional.pad(x, (0, 0, 0, 9), value=float("nan"))[:, :, :30] for x in (key, value))
    assert not key.is_contiguous() and not query.is_contiguous()
    assert torch.equal(ops.cached_attention(query, key, value, means, on_device, **where), expected)


@inside
def test_reads_the_attended_blocks_alone():
    """NaN in what no head attends, before each row's start and behind the newest token changes nothing."""
    starts, length, block_size = (0, 5), 90, 8
    query, key, value, means, on_device = cached(starts, 1, length, 4, 2, 16, block_size, torch.float32)
    where = dict(block_size=block_size, top_k=3, engine="triton")
    expected = ops.cached_attention(query, key, value, means, on_device, **where)
    attended = torch.zeros(2, 2, length, dtype=torch.bool)
    for row, start in enumerate(starts):
        packed = (x[row].transpose(0, 1) for x in (query, key[:, :, start:]))
        chosen = ops.select_blocks(*packed, block_size=block_size, top_k=3)[0]
        for head in range(4):
            for block in [*chosen[head].tolist(), (length - 1 - start) // block_size]:
                first = start + block * block_size
                attended[row, head // 2, first : first + block_size] = True
    hidden = ~attended[..., None].to(DEVICE)
    key.masked_fill_(hidden, float("nan"))
    value.masked_fill_(hidden, float("nan"))
    assert hidden.sum() > hidden.numel() / 2
    assert torch.equal(ops.cached_attention(query, key, value, means, on_device, **where), expected)


@inside
def test_one_token_equals_the_operator():
    query, key, value, means, on_device = cached((0,), 1, 75, 4, 2, 16, 8, torch.float32)
    got = ops.cached_attention(query, key, value, means, on_device, block_size=8, top_k=3, engine="triton")
    packed = (x[0].transpose(0, 1).cpu() for x in (query, key, value))
    expected = moba_attention(*packed, block_size=8, top_k=3, engine="reference")
    torch.testing.assert_close(got[0].cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_in_a_cuda_graph():
    """Routing by the means and attention can be captured: nothing waits for the host."""
    tensors = cached((0, 9), 2, 301, 4, 2, 64, 16, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step = lambda: ops.cached_attention(*tensors, block_size=16, top_k=3, engine="triton")  # noqa: E731
        expected = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        captured.fill_(float("nan"))
        graph.replay()
    stream.synchronize()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("padded", [False, True])  # where it is, the first layer waits for the device
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("offloading", [False, True])
def test_generate_on_a_gpu(offloading, layers, padded):
    """The text of every other cache, also with keys and values offloaded between the layers, while the GPU is busy."""
    model = tiny_model(num_hidden_layers=layers).to(DEVICE)
    for layer in model.model.layers:  # some milliseconds: what other streams do not wait for, they overtake
        layer.register_forward_pre_hook(lambda *_: torch.cuda._sleep(10**7))
    moba_hf.configure(model, decode="moba", engine="triton")
    ids = tokens(2, 40).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, : 7 * padded] = 0
    where = dict(attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **where)
    for _ in range(3):
        cache = MobaCache(model.config, offloading=offloading)
        assert torch.equal(model.generate(ids, past_key_values=cache, **where), expected)
