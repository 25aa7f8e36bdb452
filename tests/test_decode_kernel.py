"""The Triton decode kernel: in Triton's interpreter on a CPU, and on a GPU where there is one.

The interpreter is chosen before triton is imported, for the whole process: this file runs itself in one of its own. The
grid: one piece a block and several with a short last one (the piece is made small), blocks of a power of two and of
none, more slots than blocks, one and several new tokens, rows that start at different places, GQA and none.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_model, tokens
from tolerance import assert_close_as_eager

import moba_hf
from moba_hf import MobaCache, moba_attention, ops
from moba_hf.integration.cache import MobaLayer

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
inside = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="run by test_in_the_interpreter")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # not in the interpreter: raw bits


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.timeout(600)
def test_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


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
@pytest.mark.parametrize("offloading", [False, True])
def test_generate_on_a_gpu(offloading):
    """The text of every other cache, also with keys and values offloaded between the layers."""
    model = tiny_model(num_hidden_layers=3).to(DEVICE)
    moba_hf.configure(model, decode="moba", engine="triton")
    ids = tokens(2, 40).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    where = dict(attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **where)
    cache = MobaCache(model.config, offloading=offloading)
    assert torch.equal(model.generate(ids, past_key_values=cache, **where), expected)
