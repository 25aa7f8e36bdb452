"""`generate` with every cache and search that keeps a key cache: the same text as a plain MoBA model."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from models import tiny_model, tokens, twin
from torch.nn.attention import SDPBackend, sdpa_kernel

import moba_hf
from moba_hf.integration import attention

LENGTH = 25


def generate(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0, **kwargs)


@pytest.fixture(params=["llama", "qwen2", "mistral"])
def pair(request):
    model = tiny_model(request.param)
    return model, twin(model, "moba_oracle")


def left_padded():
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    ids[1, :8] = 0
    mask[1, :8] = 0
    return ids, mask


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_greedy(pair, cache, padded):
    ids, mask = left_padded() if padded else (tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long))
    got = generate(pair[0], ids, attention_mask=mask, cache_implementation=cache, disable_compile=True)
    assert torch.equal(got, generate(pair[1], ids, attention_mask=mask))


@pytest.mark.parametrize("kwargs", [dict(num_beams=3), dict(prompt_lookup_num_tokens=3), dict(prefill_chunk_size=7)])
def test_searches(pair, kwargs):
    ids = tokens(1, LENGTH)
    ids[:, 12:] = ids[:, :13].clone()  # something to look up
    assert torch.equal(generate(pair[0], ids, **kwargs), generate(pair[1], ids, **kwargs))


def test_assisted(pair):
    ids, draft = tokens(1, LENGTH), tiny_model("llama", num_hidden_layers=1)
    moba_hf.configure(draft, top_k=2)
    oracle_draft = twin(draft, "moba_oracle")
    got, expected = generate(pair[0], ids, assistant_model=draft), generate(pair[1], ids, assistant_model=oracle_draft)
    assert torch.equal(got, expected)


def test_rows_of_a_padded_batch_equal_rows_alone(pair):
    ids, mask = left_padded()
    together = generate(pair[0], ids, attention_mask=mask)
    alone = generate(pair[0], ids[1:, 8:])
    assert torch.equal(together[1, 8:], alone[0])


def test_static_cache_compiled():
    """Decoding steps compile as one graph; the text is that of the dynamic cache."""
    torch._dynamo.reset()
    model = tiny_model()
    ids, mask = left_padded()
    expected = generate(model, ids, attention_mask=mask)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(generate(model, ids, attention_mask=mask, cache_implementation="static"), expected)


def test_decode_moba_prefill_chunks_and_tokens_agree(pair):
    """With decode="moba" a prompt in one piece, in chunks and token by token gives the same logits."""
    model = pair[0]
    moba_hf.configure(model, decode="moba")
    ids, mask = left_padded()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        for piece in (1, 6):
            cache, parts = None, []
            for start in range(0, LENGTH, piece):
                part = slice(start, start + piece)
                step = model(
                    ids[:, part], attention_mask=mask[:, : part.stop], position_ids=positions[:, part],
                    past_key_values=cache, use_cache=True,
                )  # fmt: skip
                cache = step.past_key_values
                parts.append(step.logits)
            torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


def test_decode_modes_differ():
    model, ids = tiny_model(), tokens(1, LENGTH)
    with torch.no_grad():
        cache = model(ids[:, :-1]).past_key_values
        full = model(ids[:, -1:], past_key_values=cache).logits
        moba_hf.configure(model, decode="moba")
        cache = model(ids[:, :-1]).past_key_values
        routed = model(ids[:, -1:], past_key_values=cache).logits
        assert (full - routed).abs().max() > 1e-3
        torch.testing.assert_close(routed[:, -1], model(ids).logits[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chosen", [None, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION])
def test_dense_decoding_leaves_pytorchs_kernels_as_they_were(chosen):
    """Flags alone, as on a GPU: what the user has enabled stays so, and PyTorch's order of kernels is there again."""

    def kernels():
        cuda = torch.backends.cuda
        enabled = cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled, cuda.math_sdp_enabled
        return [kernel() for kernel in enabled], torch._C._get_sdp_priority_order()

    before = kernels()
    with nullcontext() if chosen is None else sdpa_kernel(chosen):
        enabled, _ = kernels()
        with attention._kernels_without_plans(SimpleNamespace(is_cuda=True)):
            still, order = kernels()
            assert still == enabled and order[0] == int(SDPBackend.FLASH_ATTENTION)
    assert kernels() == before
