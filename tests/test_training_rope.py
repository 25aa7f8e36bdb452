"""More positions: stock Transformers loads what rope.py writes, and its tables are those of the base model at p / f."""

import copy
import math

import pytest
import torch
from models import tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from moba_hf.training.rope import extend_positions

LLAMA3 = dict(
    rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip
ROPES = {
    "llama3": (LLAMA3, 131_072),  # Llama 3.1's own; the longest angle is 1M rad
    "default": (dict(rope_type="default", rope_theta=100_000.0), 8192),  # SmolLM2's
    "linear": (dict(rope_type="linear", rope_theta=10_000.0, factor=4.0), 16_384),
    "yarn": (dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=8192), 32_768),
}

THETA = {"method": "theta", "rope_theta": 1e7, "max_position_embeddings": 2**20}


def config_of(rope: str, **changes) -> LlamaConfig:
    parameters, positions = ROPES[rope]
    return LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, rope_parameters=copy.deepcopy(parameters), max_position_embeddings=positions, **changes,
    )  # fmt: skip


def rotary_of(config):
    """The rotary embedding of a model as stock Transformers makes it; head_dim 128, as Llama 3.1's."""
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").model.rotary_emb


def reloaded(config, folder):
    """The rotary embedding after a save and a load with nothing of ours."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    assert model.config.max_position_embeddings == config.max_position_embeddings
    return model.model.rotary_emb


def tables(rotary, positions):
    """cos and sin, float32 [positions, head_dim]."""
    with torch.no_grad():
        return [x[0].double() for x in rotary(torch.zeros(1), positions[None])]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("factors", [(2,), (2, 2, 2), (1.5,)], ids=str)
def test_interpolated_tables_are_the_base_models_at_p_over_f(rope, factors, tmp_path):
    config = config_of(rope)
    base, before = rotary_of(config), config.max_position_embeddings
    for factor in factors:
        extend_positions(config, {"method": "interpolate", "factor": factor})
    total = math.prod(factors)
    assert config.max_position_embeddings == before * total
    assert config.rope_parameters["rope_type"] == "longrope"
    assert config.rope_parameters["rope_theta"] == ROPES[rope][0]["rope_theta"]
    new = reloaded(config, tmp_path)

    # Positions at the start, where Transformers takes its short factors, and at the very end, where the long ones.
    for positions in (torch.arange(0, before, 997), torch.arange(0, before * int(total), 9973)):
        angles = positions.double()[:, None] / total * base.inv_freq.double()
        angles = torch.cat([angles, angles], -1)
        # Float32 rounds a frequency twice at most (its quotient and its table entry), and the angle itself once.
        bound = 4 * torch.finfo(torch.float32).eps * (1 + angles) * base.attention_scaling
        for table, exact in zip(tables(new, positions), (angles.cos(), angles.sin()), strict=True):
            assert ((table - exact * base.attention_scaling).abs() <= bound).all()


def test_powers_of_two_are_exact_but_for_one_rounding(tmp_path):
    """The paper's chain 128K → 1M: the frequencies are Llama 3.1's divided by 8, bit by bit; one is a rounding off."""
    config = config_of("llama3")
    base = rotary_of(config)
    for _ in range(3):
        extend_positions(config, {"method": "interpolate", "factor": 2})
    new = reloaded(config, tmp_path)
    off = new.inv_freq != base.inv_freq / 8
    assert off.sum() <= 1
    torch.testing.assert_close(new.inv_freq, base.inv_freq / 8, rtol=torch.finfo(torch.float32).eps, atol=0)
    assert config.rope_parameters["short_factor"] == config.rope_parameters["long_factor"]
    assert config.rope_parameters["attention_factor"] == 1.0 and config.rope_parameters["factor"] == 8.0
    assert config.rope_parameters["original_max_position_embeddings"] == 131_072
    positions = torch.arange(0, 2**20, 4093)
    exact = [tables(new, positions), tables(base, positions.float() / 8)]  # p / 8 is exact in float32
    for ours, theirs in zip(*exact, strict=True):
        same = torch.cat([~off, ~off])
        assert torch.equal(ours[:, same], theirs[:, same])


def test_a_model_computes_the_same_at_interpolated_positions():
    """Logits of a real forward pass: positions 0, 2, 4, … of the interpolated model are 0, 1, 2, … of the base."""
    model = tiny_model(attention="sdpa").eval()
    config = copy.deepcopy(model.config)
    extend_positions(config, {"method": "interpolate", "factor": 2})
    longer = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    longer.load_state_dict(model.state_dict())
    ids, positions = torch.arange(3, 43)[None], torch.arange(40)[None]
    torch.testing.assert_close(
        longer(ids, position_ids=2 * positions).logits, model(ids, position_ids=positions).logits
    )
    assert (longer(ids, position_ids=positions).logits - model(ids, position_ids=positions).logits).abs().max() > 1e-3


def test_linear(tmp_path):
    config = config_of("default")
    extend_positions(config, {"method": "linear", "factor": 2})
    extend_positions(config, {"method": "linear", "factor": 3})
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 6.0}
    assert config.max_position_embeddings == 6 * 8192
    torch.testing.assert_close(reloaded(config, tmp_path).inv_freq, rotary_of(config_of("default")).inv_freq / 6)


@pytest.mark.parametrize("rope", ["default", "llama3", "linear"])
def test_theta(rope, tmp_path):
    config = config_of(rope)
    extend_positions(config, {"method": "theta", "rope_theta": 128e6, "max_position_embeddings": 524_288})
    assert config.rope_parameters == ROPES[rope][0] | {"rope_theta": 128e6}
    assert config.max_position_embeddings == 524_288
    inv_freq = reloaded(config, tmp_path).inv_freq
    scaling = ROPES[rope][0].get("factor", 1.0)
    assert inv_freq[0] == (1.0 if rope != "linear" else 1 / scaling)
    assert inv_freq[-1].item() == pytest.approx(128e6 ** (-126 / 128) / scaling, rel=1e-5)


def test_yarn(tmp_path):
    config = config_of("default")
    extend_positions(config, {"method": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1})
    rotary, plain = reloaded(config, tmp_path), rotary_of(config_of("default")).inv_freq
    assert (
        config.max_position_embeddings == 32_768 and config.rope_parameters["original_max_position_embeddings"] == 8192
    )
    assert rotary.inv_freq[0] == plain[0] and rotary.inv_freq[-1].item() == pytest.approx(
        plain[-1].item() / 4, rel=1e-5
    )
    assert rotary.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)


def test_yarn_in_place_of_llama3_is_said_aloud():
    """UltraLong's recipe: the factor counts from Llama's own 8192 positions."""
    config = config_of("llama3")
    extend_positions(config, {"method": "yarn", "factor": 128, "replace": "llama3"})
    assert config.rope_parameters["rope_type"] == "yarn" and config.max_position_embeddings == 2**20


@pytest.mark.parametrize(
    ("rope", "settings", "error", "message"),
    [
        ("llama3", {"method": "ntk", "factor": 2}, ValueError, "method must be one of .*interpolate.*, but was 'ntk'"),
        ("llama3", {"factor": 2}, ValueError, "method must be one of .* but was None"),
        ("llama3", "interpolate", TypeError, "rope must be a mapping, but was 'interpolate'"),
        ("llama3", {"method": "interpolate"}, ValueError, "'interpolate' needs 'factor'"),
        ("llama3", {"method": "interpolate", "factr": 2}, ValueError, "does not know 'factr'"),
        ("llama3", {"method": "interpolate", "factor": 1}, ValueError, "factor must be above 1, but was 1"),
        ("llama3", {"method": "interpolate", "factor": 0.5}, ValueError, "factor must be above 1, but was 0.5"),
        ("llama3", {"method": "interpolate", "factor": float("nan")}, ValueError, "above 1, but was nan"),
        ("llama3", {"method": "interpolate", "factor": "2"}, TypeError, "factor must be a number, but was '2'"),
        ("llama3", {"method": "interpolate", "factor": 1.0000001}, ValueError, "is no whole number"),
        ("llama3", {"method": "linear", "factor": 2}, ValueError, "would take the place of the model's llama3 scaling"),
        ("llama3", {"method": "yarn", "factor": 4, "replace": "linear"}, ValueError, "say `replace: llama3`"),
        ("llama3", {"method": "yarn", "factor": 16, "replace": "llama3"}, ValueError, "would be no more"),
        ("default", {"method": "yarn", "factor": 4, "replace": "llama3"}, ValueError, "the model has no scaling"),
        ("default", {"method": "yarn", "factor": 4, "beta_fast": "32"}, TypeError, "beta_fast must be a number"),
        ("default", {"method": "theta", "rope_theta": 1e6}, ValueError, "'theta' needs 'max_position_embeddings'"),
        ("default", THETA | {"rope_theta": 1e4}, ValueError, "above"),
        ("default", THETA | {"max_position_embeddings": 8192}, ValueError, "would be no more"),
        ("default", THETA | {"max_position_embeddings": 1e6}, TypeError, "must be an int"),
        ("yarn", THETA, ValueError, "cannot start from"),
    ],
)  # fmt: skip
def test_bad_settings_change_nothing(rope, settings, error, message):
    config = config_of(rope)
    before = config.to_dict()
    with pytest.raises(error, match=message):
        extend_positions(config, settings)
    assert config.to_dict() == before


def test_rotary_embeddings_that_depend_on_the_sequence_are_refused():
    config = config_of("default")
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="rope_type must be one of .*, but is 'dynamic'"):
        extend_positions(config, {"method": "interpolate", "factor": 2})
    short, long = [1.0] * 64, [2.0] * 64
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long}
    with pytest.raises(ValueError, match="other factors for short sequences than for long ones"):
        extend_positions(config, {"method": "interpolate", "factor": 2})
    config.rope_parameters = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(ValueError, match="another rotary embedding in each kind of layer"):
        extend_positions(config, {"method": "interpolate", "factor": 2})
