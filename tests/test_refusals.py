"""What cannot be computed correctly raises before any work is done, and says what was given and what to do."""

import pytest
import torch
from models import tiny_model, tokens
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.continuous_batching import ContinuousBatchingManager

import moba_hf
from moba_hf.integration.attention import moba_attention_forward


def qkv(heads=4, kv_heads=2, total=12, dim=8, **options):
    return [torch.randn(total, h, dim, **options) for h in (heads, kv_heads, kv_heads)]


def cu(*lengths, dtype=torch.int32):
    return torch.tensor(lengths, dtype=dtype)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (dict(block_size=0), ValueError, "block_size .*0"),
        (dict(top_k=0), ValueError, "top_k .*0"),
        (dict(block_size=2.5), TypeError, "block_size .*2.5"),
        (dict(engine="fast"), ValueError, "fast.*blockwise"),
        (dict(scale=float("nan")), ValueError, "scale .*nan"),
        (dict(cu_seqlens_q=cu(0, 12)), TypeError, "cu_seqlens_k .*both or neither"),
        (dict(cu_seqlens_q=cu(0, 5, 11), cu_seqlens_k=cu(0, 5, 12)), ValueError, "cu_seqlens_q .*12"),
        (dict(cu_seqlens_q=cu(0, 7, 5, 12), cu_seqlens_k=cu(0, 7, 5, 12)), ValueError, "cu_seqlens_q .*rise"),
        (dict(cu_seqlens_q=cu(0, 6, 12), cu_seqlens_k=cu(0, 4, 12)), ValueError, "more queries than keys"),
        (dict(cu_seqlens_q=cu(0, 12), cu_seqlens_k=cu(0, 4, 12)), ValueError, "equal lengths"),
        (dict(cu_seqlens_q=cu(0, 12, dtype=torch.int64), cu_seqlens_k=cu(0, 12)), TypeError, "cu_seqlens_q .*int32"),
    ],
)
def test_operator_arguments(settings, error, words):
    with pytest.raises(error, match=words):
        moba_hf.moba_attention(*qkv(), **{"block_size": 4, "top_k": 2, **settings})


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        (qkv(heads=3), ValueError, "multiple of kv heads.*3 and 2"),
        ([x.int() for x in qkv()], TypeError, "query .*int32"),
        ([*qkv()[:2], qkv(dtype=torch.float64)[2]], TypeError, "value .*float32.*float64"),
        ([*qkv()[:2], qkv(dim=16)[2]], ValueError, "key and value .*equal shapes"),
        ([qkv()[0][None], *qkv()[1:]], ValueError, "query .*shape"),
        ([qkv(dim=16)[0], *qkv()[1:]], ValueError, "head_dim .*16 and 8"),
        ([*qkv()[:2], qkv()[2].to("meta")], TypeError, "value .*cpu.*meta"),
        ([qkv(total=13)[0], *qkv()[1:]], ValueError, "13 queries.*12 keys"),
    ],
)
def test_operator_tensors(tensors, error, words):
    with pytest.raises(error, match=words):
        moba_hf.moba_attention(*tensors, block_size=4, top_k=2)


def test_an_engine_that_cannot_run_says_what_is_missing():
    # flash reports its GPU kernels; on CPU tensors it runs on a stand-in for tests, see test_flash_engine.py
    missing = [status for status in moba_hf.engines().values() if not status.available and status.name != "flash"]
    for status in missing:
        with pytest.raises(RuntimeError, match="cannot run"):
            moba_hf.moba_attention(*qkv(), block_size=4, top_k=2, engine=status.name)
        assert status.reason


def layer(**changes):
    module = tiny_model().model.layers[0].self_attn
    for name, value in changes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(softcap=30.0), "softcap"),
        (dict(s_aux=torch.zeros(4)), "s_aux"),
        (dict(position_bias=torch.zeros(1, 4, 20, 20)), "position_bias"),
        (dict(dropout=0.1), "dropout.*0.1"),
        (dict(is_causal=False), "is_causal=False"),
        (dict(output_attentions=True), "output_attentions"),
        (dict(cache=object()), "continuous batching"),
        (dict(cu_seq_lens_q=cu(0, 20)), "belong together"),
    ],
)
def test_adapter_arguments(given, words):
    states = [torch.randn(1, h, 20, 8) for h in (4, 2, 2)]
    with pytest.raises(ValueError, match=words):
        moba_attention_forward(layer(), *states, None, **given)


def test_unequal_head_dims():
    states = [torch.randn(1, h, 20, d) for h, d in ((4, 8), (2, 8), (2, 16))]
    with pytest.raises(ValueError, match="head dims.*8.*16"):
        moba_attention_forward(layer(), *states, None)


def test_model_with_softcap():
    config = AutoConfig.for_model(
        "gemma2", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, moba={"block_size": 4, "top_k": 2},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="moba").eval()
    with pytest.raises(ValueError, match="softcap"):
        model(tokens(1, 20))


def test_attention_dropout_in_training():
    model = tiny_model(attention_dropout=0.1)
    model(tokens(1, 20))  # no dropout in evaluation
    with pytest.raises(ValueError, match="dropout"):
        model.train()(tokens(1, 20))


def test_continuous_batching_never_turns_dense():
    model = tiny_model()
    manager = ContinuousBatchingManager.__new__(ContinuousBatchingManager)
    with pytest.raises(ValueError, match="continuous batching.*model.generate"):
        manager.switch_to_cb_friendly_attn(model)
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate_batch(inputs=[[3, 4, 5]], progress_bar=False)
    assert model.config._attn_implementation == "moba"


def test_ring_context_parallel():
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    original = torch.nn.functional.scaled_dot_product_attention
    ring._distribute_function(original, torch.nn.functional, None, None, None)
    try:
        with pytest.raises(ValueError, match="ring context parallel.*Ulysses"):
            tiny_model()(tokens(1, 20))
    finally:
        ring._restore_function(torch.nn.functional.scaled_dot_product_attention, torch.nn.functional)
    assert torch.nn.functional.scaled_dot_product_attention is original
    tiny_model()(tokens(1, 20))


def test_custom_mask_functions_are_refused():
    from transformers.masking_utils import create_causal_mask

    model = tiny_model()
    embeds = model.get_input_embeddings()(tokens(1, 20))
    mask = create_causal_mask(
        config=model.config, inputs_embeds=embeds, attention_mask=None, past_key_values=None,
        or_mask_function=lambda b, h, q, k: k < 3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="custom attention mask"):
        model(inputs_embeds=embeds, attention_mask=mask)
