"""Every supported family against a plain MoBA model: logits and gradients; full layers; sliding windows."""

import pytest
import torch
from models import FAMILIES, tiny_config, tiny_model, tokens, twin
from transformers import AutoModelForCausalLM

import moba_hf

LENGTH = 30


def loss_and_grads(model, ids, **kwargs):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(one, two, ids, **kwargs):
    (loss, grads), (expected_loss, expected) = (loss_and_grads(m, ids, **kwargs) for m in (one, two))
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        size = expected[name].abs().max().clamp(min=1e-3)
        assert (grad - expected[name]).abs().max() < 1e-3 * size, name


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family):
    model = tiny_model(family)
    ids = tokens(2, LENGTH)
    assert_same_training(model, twin(model, "moba_oracle"), ids)
    with torch.no_grad():
        assert (model(ids).logits - twin(model, "sdpa")(ids).logits).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_cover_everything_are_full_attention(family):
    model = tiny_model(family)
    moba_hf.configure(model, top_k=8)  # 32 keys ≥ 30 tokens
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, twin(model, "sdpa")(ids).logits, atol=0, rtol=0)


def test_full_attention_layers():
    model = tiny_model(num_hidden_layers=3)
    ids, dense = tokens(2, LENGTH), twin(tiny_model(num_hidden_layers=3), "sdpa")
    results = []
    for layers in ([], [-1], [0, 1], [0, 1, 2]):
        moba_hf.configure(model, full_attention_layers=layers)
        assert_same_training(model, twin(model, "moba_oracle"), ids)
        results.append(model(ids).logits)
    torch.testing.assert_close(results[-1], dense(ids).logits)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(results, results[1:]))


@pytest.mark.parametrize("packed", [False, True])
def test_full_layers_respect_padding_and_documents(packed):
    model = tiny_model()
    moba_hf.configure(model, full_attention_layers=[0, 1])
    dense, ids = twin(model, "sdpa"), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    given = dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    if packed:
        given = dict(position_ids=torch.cat([torch.arange(11), torch.arange(19)])[None], use_cache=False)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, **given).logits[mask.bool()], dense(ids, **given).logits[mask.bool()], atol=1e-4, rtol=1e-4
        )


def test_sliding_layers_keep_their_own_attention():
    changes = dict(sliding_window=6, use_sliding_window=True, layer_types=["sliding_attention", "full_attention"])
    model = tiny_model("qwen2", **changes)
    dense, ids = twin(model, "sdpa"), tokens(2, LENGTH)
    assert (model(ids).logits - dense(ids).logits).abs().max() > 0.01  # the full layer runs MoBA
    moba_hf.configure(model, full_attention_layers=[1])
    torch.testing.assert_close(model(ids).logits, dense(ids).logits)  # and the sliding layer does not
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, dense.generate(ids, max_new_tokens=8, do_sample=False))


def test_mistral_with_a_window_everywhere_is_untouched():
    model = tiny_model("mistral", sliding_window=6)
    ids = tokens(2, LENGTH)
    torch.testing.assert_close(model(ids).logits, twin(model, "sdpa")(ids).logits)


def test_bidirectional_modules_keep_their_own_attention():
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        "bert", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation="moba").eval()
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 15:] = 0
    got = model(tokens(2, 20), attention_mask=mask).last_hidden_state
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(got, model(tokens(2, 20), attention_mask=mask).last_hidden_state)


def test_switching_to_full_attention_and_back():
    model = tiny_model()
    ids = tokens(1, LENGTH)
    sparse = model(ids).logits
    model.set_attn_implementation("sdpa")
    assert (model(ids).logits - sparse).abs().max() > 0.01
    model.set_attn_implementation("moba")
    assert torch.equal(model(ids).logits, sparse)


@pytest.mark.parametrize("engine", ["reference", "blockwise"])
def test_engines_give_the_same_model(engine):
    model = tiny_model()
    moba_hf.configure(model, engine=engine)
    assert_same_training(model, twin(model, "moba_oracle"), tokens(2, LENGTH))


def test_autocast():
    """Under autocast query and key come in float32 and value in bfloat16; the output is bfloat16, near float32's."""
    model, ids = tiny_model(), tokens(2, LENGTH)
    moba_hf.configure(model, top_k=8, engine="blockwise")  # all blocks: rounding cannot change the selection
    exact = model(ids, labels=ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, labels=ids)
        model.set_attn_implementation("eager")
        eager = model(ids, labels=ids)
    allowed = 2 * (eager.logits - exact.logits).abs().max()
    assert (rounded.logits - exact.logits).abs().max() < allowed
    rounded.loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, ids = tiny_model().train(), tokens(2, LENGTH)
    loss, expected = loss_and_grads(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, grads = loss_and_grads(model, ids)
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


@pytest.mark.parametrize("signal", ["plain", "padding", "packing"])
def test_compile_fullgraph_trains(signal):
    torch._dynamo.reset()
    model, ids = tiny_model().train(), tokens(2, LENGTH)
    given = {"use_cache": False}
    if signal == "padding":
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][0, :7] = 0
    if signal == "packing":
        given["position_ids"] = torch.cat([torch.arange(11), torch.arange(19)])[None]
    loss, expected = loss_and_grads(model, ids, **given)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again = compiled(input_ids=ids, labels=ids, **given).loss
    model.zero_grad()
    again.backward()
    torch.testing.assert_close(again, loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


def test_vision_language_settings_reach_the_language_model():
    from transformers import LlavaConfig

    config = LlavaConfig(text_config=tiny_config(moba=None).to_dict() | {"model_type": "llama"})
    config.moba = {"block_size": 8}
    assert config.text_config.moba["block_size"] == 8
    assert moba_hf.configure(config, top_k=2).block_size == 8


def test_save_and_reload(tmp_path):
    model = tiny_model()
    moba_hf.configure(model, full_attention_layers=[-1])
    model.config.moba_trained_tokens = 1000
    model.save_pretrained(tmp_path)
    ids = tokens(1, LENGTH)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba").eval()
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert again.config.moba_trained_tokens == 1000
