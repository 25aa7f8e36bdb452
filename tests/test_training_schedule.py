"""The schedule: where phases end, what a switch changes and what not; a killed run goes on as it would have gone."""

import sys
from fractions import Fraction

import pytest
import torch
from checkpoints import load_script
from training_runs import MOBA, config_file, make_material, run_and_kill, weights
from transformers import AutoConfig

from moba_hf.config import MobaConfig
from moba_hf.training.schedule import Phase, Schedule

NINETY_TEN = [{"mode": "moba", "share": 0.9}, {"mode": "full"}]


@pytest.fixture(scope="module")
def script():
    yield load_script("continue_pretrain")
    del sys.modules["continue_pretrain"]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


# ---- where phases end ------------------------------------------------------------------------------------------------


def modes(phases, steps=10, tokens_a_step=100):
    schedule = Schedule.from_list(phases)
    numbers = [schedule.at(step, steps, step * tokens_a_step) for step in range(steps)]
    return "".join(schedule.phases[number].mode[0] for number in numbers)


def test_phases_end_at_steps_and_tokens():
    assert modes(None) == "m" * 10
    assert modes([{"mode": "full"}]) == "f" * 10
    assert modes(NINETY_TEN) == "mmmmmmmmmf"
    assert modes([{"mode": "moba", "share": 0.9}, {"mode": "full", "share": 0.1}]) == "mmmmmmmmmf"
    assert modes([{"mode": "moba", "tokens": 900}, {"mode": "full"}]) == "mmmmmmmmmf"
    assert modes([{"mode": "moba", "tokens": 899}, {"mode": "full"}]) == "mmmmmmmmmf"  # within a step: after it
    assert modes([{"mode": "moba", "tokens": 901}, {"mode": "full"}]) == "m" * 10
    three = [{"mode": "full", "share": 0.1}, {"mode": "moba", "share": 0.2}, {"mode": "full"}]
    assert modes(three) == "fmmfffffff"  # 0.1 + 0.2 is 0.3, not 0.30000000000000004
    assert modes([{"mode": "full", "tokens": 5000}, {"mode": "moba"}]) == "f" * 10  # the run ends before the phase
    assert Schedule.from_list(NINETY_TEN).at(10, 10, 1000) == 1  # a finished run that is resumed


def test_what_a_phase_trains_with():
    moba = MobaConfig(block_size=8, top_k=2, full_attention_layers=[-1])
    assert Phase("moba").settings(moba, 4) == moba
    assert Phase("full").settings(moba, 4).full_layers(4) == frozenset(range(4))
    assert Phase("moba", full_attention_layers=(0, -1)).settings(moba, 4).full_layers(4) == {0, 3}
    assert Phase.from_mapping({"mode": "moba", "share": 0.9}, "here").share == Fraction(9, 10)


@pytest.mark.parametrize(
    ("phases", "error", "message"),
    [
        ("moba", TypeError, "schedule must be a list of phases, but was 'moba'"),
        ([], TypeError, "schedule must be a list of phases"),
        ({"mode": "moba"}, TypeError, "schedule must be a list of phases"),
        (["moba"], TypeError, "phase 1 must be a mapping, but was 'moba'"),
        ([{"mode": "sparse"}], ValueError, r"phase 1: mode must be one of \('moba', 'full'\), but was 'sparse'"),
        ([{"mode": "moba", "step": 3}], ValueError, "phase 1: unknown field 'step'"),
        ([{"mode": "moba", "tokens": 0}, {"mode": "full"}], ValueError, "tokens must be an int of at least 1"),
        ([{"mode": "moba", "tokens": 1e9}, {"mode": "full"}], ValueError, "tokens must be an int"),
        ([{"mode": "moba", "share": 90}, {"mode": "full"}], ValueError, "share must lie above 0 and be at most 1"),
        ([{"mode": "moba", "share": True}, {"mode": "full"}], ValueError, "share must lie above 0 and be at most 1"),
        ([{"mode": "moba"}, {"mode": "full"}], ValueError, "phase 1 needs tokens or share: only the last one"),
        ([{"mode": "moba", "share": 0.5}, {"mode": "full", "tokens": 9}], ValueError, "but not both"),
        ([{"mode": "moba", "tokens": 9}, {"mode": "full", "tokens": 9}], ValueError, "the last phase takes the rest"),
        ([{"mode": "moba", "share": 0.9}, {"mode": "full", "share": 0.2}], ValueError, r"the shares sum to 1\.1"),
        ([{"mode": "moba", "share": 0.9}, {"mode": "full", "share": 0.05}], ValueError, r"the shares sum to 0\.95"),
        ([{"mode": "full", "full_attention_layers": [1]}], ValueError, "no meaning in mode full"),
        ([{"mode": "moba", "full_attention_layers": "last"}], TypeError, "must be a list of ints"),
    ],
)  # fmt: skip
def test_bad_schedules(phases, error, message):
    with pytest.raises(error, match=message):
        Schedule.from_list(phases)


def test_layers_that_the_model_does_not_have(script, material, tmp_path):
    config = config_file(material, tmp_path, schedule=[{"mode": "moba", "full_attention_layers": [7]}])
    with pytest.raises(ValueError, match="full_attention_layers must lie in -3 … 2"):
        script.main(["--config", config])
    assert not (tmp_path / "run").exists()


# ---- what a switch does ----------------------------------------------------------------------------------------------


def test_a_switch_changes_the_mode_and_nothing_else(script, material, tmp_path, monkeypatch):
    seen = []
    train = script.MeteredTrainer.training_step

    def training_step(self, model, *args, **kwargs):
        pointers = [p.data_ptr() for p in model.parameters()]
        seen.append((self.model.config.moba["full_attention_layers"], pointers, id(self.optimizer.optimizer)))
        return train(self, model, *args, **kwargs)

    monkeypatch.setattr(script.MeteredTrainer, "training_step", training_step)
    schedule = [
        {"mode": "moba", "tokens": 256},  # 2 steps of 2 · 64 tokens
        {"mode": "full", "tokens": 256},
        {"mode": "moba", "tokens": 128, "full_attention_layers": []},
        {"mode": "full"},
    ]
    report = script.main(["--config", config_file(material, tmp_path, schedule=schedule)])
    assert [layers for layers, *_ in seen] == [[-1]] * 2 + [[0, 1, 2]] * 2 + [[]] + [[0, 1, 2]] * 3
    assert all(rest == seen[0][1:] for _, *rest in map(tuple, seen) for rest in [tuple(rest)])
    history = report["history"]
    assert history["moba_layers"] == [2, 2, 0, 0, 3, 0, 0, 0]
    assert [sparsity > 0 for sparsity in history["sparsity"]] == [True] * 2 + [False] * 2 + [True] + [False] * 3
    assert report["moba_tokens"] == 3 * 128 and report["trained_tokens"] == 8 * 128
    config = AutoConfig.from_pretrained(tmp_path / "run" / "model")
    assert config.moba_trained_tokens == 3 * 128
    assert config.moba["full_attention_layers"] == []  # of the latest MoBA phase


def test_mode_full_is_full_attention(script, material, tmp_path):
    """The same losses as MoBA whose blocks cover everything; other ones than sparse MoBA's."""

    def losses(name, **changes):
        (tmp_path / name).mkdir()
        changes = dict(max_steps=3, save_strategy="no") | changes
        return script.main(["--config", config_file(material, tmp_path / name, **changes)])["history"]["loss"]

    full = losses("full", schedule=[{"mode": "full"}])
    covered = losses("covered", moba={"block_size": 8, "top_k": 8})
    sparse = losses("sparse", moba={"block_size": 8, "top_k": 1})
    assert full == pytest.approx(covered, rel=1e-5)
    assert abs(full[0] - sparse[0]) > 1e-3


# ---- interruption ----------------------------------------------------------------------------------------------------


def test_killed_twice_and_resumed_across_switches(script, material, tmp_path):
    """SIGKILL in a full phase and again after the switch back: the same losses, mode, counts and weights."""
    phases = [{"mode": "moba", "share": 0.25}, {"mode": "full", "share": 0.5}, {"mode": "moba"}]
    (tmp_path / "straight").mkdir()
    common = dict(schedule=phases, gradient_accumulation_steps=2)
    straight = script.main(["--config", config_file(material, tmp_path / "straight", **common)])
    assert straight["history"]["moba_layers"] == [2, 2, 0, 0, 0, 0, 2, 2]

    config = config_file(material, tmp_path, **common)
    for step, checkpoint in ((6, "checkpoint-4"), (8, "checkpoint-6")):
        assert run_and_kill(config, step) == -9
        assert not (tmp_path / "run" / "report.json").exists()
        assert (tmp_path / "run" / "unfinished" / checkpoint / "trainer_state.json").is_file()
        saved = AutoConfig.from_pretrained(tmp_path / "run" / "unfinished" / checkpoint)
        assert saved.moba == MobaConfig.from_dict(MOBA).to_dict() and saved.moba_trained_tokens == 2 * 256
    resumed = script.main(["--config", config])
    for name in ("history", "moba_tokens", "trained_tokens", "sparsity", "full_after", "moba_after", "position_loss"):
        assert resumed[name] == straight[name], name
    assert resumed["moba_tokens"] == 4 * 256
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "straight" / "run")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
