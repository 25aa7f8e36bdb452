"""MobaConfig, `configure` and `config.moba`: validation, merging, saving."""

import json

import pytest
from models import tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import moba_hf
from moba_hf import MobaConfig


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (dict(block_size=0), ValueError, ["block_size", "0", "at least 1"]),
        (dict(top_k=-3), ValueError, ["top_k", "-3", "at least 1"]),
        (dict(block_size=4.0), TypeError, ["block_size", "4.0", "int"]),
        (dict(top_k=True), TypeError, ["top_k", "True", "int"]),
        (dict(decode="sparse"), ValueError, ["decode", "sparse", "full", "moba"]),
        (dict(engine="cuda"), ValueError, ["engine", "cuda", "blockwise"]),
        (dict(full_attention_layers=3), TypeError, ["full_attention_layers", "3"]),
        (dict(full_attention_layers=["1"]), TypeError, ["full_attention_layers", "'1'"]),
    ],
)
def test_bad_values_name_field_value_and_range(settings, error, words):
    with pytest.raises(error) as caught:
        MobaConfig(**settings)
    assert all(word in str(caught.value) for word in words)


def test_round_trip_through_json():
    config = MobaConfig(block_size=64, top_k=4, full_attention_layers=[-1, 0], decode="moba", engine="blockwise")
    assert MobaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.full_attention_layers == (-1, 0)


def test_other_names_are_accepted():
    assert MobaConfig.from_dict({"moba_chunk_size": 128, "moba_topk": 5}) == MobaConfig(block_size=128, top_k=5)
    with pytest.raises(ValueError, match="twice"):
        MobaConfig.from_dict({"moba_topk": 5, "top_k": 5})


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="blocksize.*block_size"):
        MobaConfig.from_dict({"blocksize": 128})
    with pytest.raises(ValueError, match="blocksize"):
        moba_hf.configure(tiny_config(), blocksize=128)


def test_layers_must_exist():
    with pytest.raises(ValueError, match=r"full_attention_layers .*-2 … 1 .*\[2, -3\]"):
        moba_hf.configure(tiny_config(), full_attention_layers=[0, 2, -3])
    with pytest.raises(ValueError, match="full_attention_layers"):
        LlamaConfig(num_hidden_layers=2).moba = {"full_attention_layers": [5]}
    assert MobaConfig(full_attention_layers=[-1, 0]).full_layers(4) == {0, 3}


def test_configure_merges_and_a_failure_changes_nothing():
    model = tiny_model()
    assert moba_hf.configure(model, top_k=7) == MobaConfig(block_size=4, top_k=7)
    before = dict(model.config.moba)
    with pytest.raises(ValueError, match="top_k"):
        moba_hf.configure(model, block_size=8, top_k=0)
    assert model.config.moba == before == MobaConfig(block_size=4, top_k=7).to_dict()


def test_unset_is_none_and_not_written(tmp_path):
    config = LlamaConfig()
    assert config.moba is None
    assert "moba" not in json.loads(config.to_json_string())


def test_from_pretrained_takes_a_dict_and_validates_before_loading(tmp_path):
    tiny_model(moba=None).save_pretrained(tmp_path)
    load = AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, attn_implementation="moba", moba={"block_size": 8})
    assert model.config.moba == MobaConfig(block_size=8).to_dict()
    (tmp_path / "model.safetensors").unlink()  # were weights read first, this would be the error
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        load(tmp_path, attn_implementation="moba", moba={"top_k": 0})


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, LlamaForCausalLM])
def test_from_pretrained_takes_a_dict_beside_a_config(cls, tmp_path):
    """Transformers hands the keywords beside a config to the model's class; settings go into a copy of the config."""
    tiny_model().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    given = config.to_dict()
    model = cls.from_pretrained(tmp_path, config=config, attn_implementation="moba", moba={"block_size": 8})
    assert model.config.moba == MobaConfig(block_size=8).to_dict()
    assert config.to_dict() == given
    assert cls.from_pretrained(tmp_path, config=config, attn_implementation="sdpa", moba=None).config.moba is None
    with pytest.raises(TypeError, match="another_keyword"):  # what is not ours is left to Transformers
        cls.from_pretrained(tmp_path, config=config, another_keyword=1)
    (tmp_path / "model.safetensors").unlink()  # were weights read first, this would be the error
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        cls.from_pretrained(tmp_path, config=config, attn_implementation="moba", moba={"top_k": 0})


def test_settings_are_saved_with_the_model(tmp_path):
    model = tiny_model()
    moba_hf.configure(model, top_k=5, full_attention_layers=[-1], decode="moba")
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).moba == model.config.moba
    replaced = AutoConfig.from_pretrained(tmp_path, moba={"block_size": 16})
    assert replaced.moba == MobaConfig(block_size=16).to_dict()  # the keyword replaces the whole dict


def test_two_models_keep_their_own_settings():
    one, two = tiny_model(), tiny_model()
    moba_hf.configure(one, top_k=9)
    assert (one.config.moba["top_k"], two.config.moba["top_k"]) == (9, 3)
