"""scripts/continue_pretrain.py end to end on a tiny random Llama: what it writes, that it resumes, what it refuses."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ProgressCallback,
)

from moba_hf.training import arguments

SCRIPT = Path(__file__).parent.parent / "scripts" / "continue_pretrain.py"
REPORT_KEYS = {
    "steps", "full_before", "moba_before", "full_after", "moba_after", "gap_before", "gap_after", "tokens_per_second",
    "config",
}  # fmt: skip
MOBA = {"block_size": 8, "top_k": 2, "full_attention_layers": [-1]}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("continue_pretrain", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a random model, its tokenizer (one token per byte) and some text."""
    folder = tmp_path_factory.mktemp("material")
    symbols = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(symbols), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words, draw = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split(), random.Random(0)
    (folder / "text").mkdir()
    for i in range(24):
        text = " ".join(draw.choice(words) for _ in range(40))
        (folder / "text" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def config_file(material, tmp_path):
    """A function that writes a config with changes and returns its path as text."""

    def write(**changes):
        values = dict(
            model_name_or_path=str(material / "model"), moba=MOBA, dataset=str(material / "text"), sequence_length=64,
            held_out_share=0.3, held_out_sequences=3, meter_sequences=2, trailing_tokens=16, sample_tokens=4,
            output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3,
            lr_scheduler_type="linear", logging_steps=1, eval_strategy="steps", eval_steps=2, save_strategy="steps",
            save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
        ) | changes  # fmt: skip
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    return write


def losses(report):
    return {key: report[key] for key in ("full_before", "moba_before", "full_after", "moba_after")}


def interrupt_at(monkeypatch, script, step):
    """Make training die in the given optimizer step."""
    original = script.MeteredTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            raise RuntimeError("the power failed")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(script.MeteredTrainer, "training_step", training_step)


def test_two_steps_end_to_end(script, config_file, tmp_path, capsys):
    script.main(["--config", config_file(), "--max_steps", "2"])
    run = tmp_path / "run"
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report.keys() >= REPORT_KEYS
    assert report["steps"] == 2 and report["tokens_per_second"] > 0
    assert report["gap_after"] == pytest.approx(report["moba_after"]["trailing"] - report["full_after"]["trailing"])
    assert report["config"]["moba"].items() >= MOBA.items()
    assert report["moba_before"] != report["full_before"]
    for picture in ("loss.png", "routing.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert not (run / "unfinished").exists()

    assert list((run / "model").glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(run / "model", attn_implementation="moba")
    assert model.config.moba.items() >= MOBA.items()
    assert model.config.moba_trained_tokens == 2 * 2 * 64
    assert f'from_pretrained("{run / "model"}", attn_implementation="moba")' in capsys.readouterr().out


def test_before_is_measured_on_the_wrapped_model(script, config_file, monkeypatch):
    """FSDP puts the model on its devices when accelerate prepares it, not earlier. The progress bar begins after it."""
    order = []

    def noted(cls, name):
        original = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda *args, **kw: (order.append(name), original(*args, **kw))[1])

    for cls, name in (
        (script.MeteredTrainer, "_wrap_model"),
        (script.MeteredTrainer, "measure"),
        (script.MeteredTrainer, "training_step"),
        (ProgressCallback, "on_train_begin"),
    ):
        noted(cls, name)
    script.main(["--config", config_file(eval_strategy="no", disable_tqdm=False), "--max_steps", "1"])
    assert order == ["_wrap_model", "measure", "on_train_begin", "training_step", "measure"]


def test_interrupted_run_resumes_to_the_same_end(script, config_file, tmp_path, monkeypatch):
    expected = script.main(["--config", config_file(), "--output_dir", str(tmp_path / "straight")])
    with monkeypatch.context() as patch:
        interrupt_at(patch, script, step=4)
        with pytest.raises(RuntimeError, match="power"):
            script.main(["--config", config_file()])
    assert not (tmp_path / "run" / "report.json").exists()
    with pytest.raises(ValueError, match=r"interrupted run with other settings \(training\)"):
        script.main(["--config", config_file(learning_rate=2e-3)])

    # Saving was interrupted too: an incomplete checkpoint is no checkpoint.
    (tmp_path / "run" / "unfinished" / "checkpoint-3").mkdir()
    steps = []
    original = script.MeteredTrainer.training_step
    monkeypatch.setattr(
        script.MeteredTrainer,
        "training_step",
        lambda self, *args, **kwargs: steps.append(self.state.global_step) or original(self, *args, **kwargs),
    )
    resumed = script.main(["--config", config_file()])
    assert steps == [2, 3]
    assert losses(resumed) == losses(expected) and resumed["steps"] == expected["steps"] == 4


def test_failing_run_overwrites_nothing(script, config_file, tmp_path, monkeypatch):
    script.main(["--config", config_file(max_steps=1)])
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    before = {p: p.read_bytes() for p in files}
    interrupt_at(monkeypatch, script, step=2)
    with pytest.raises(RuntimeError, match="power"):
        script.main(["--config", config_file(max_steps=2)])
    assert {p: p.read_bytes() for p in files} == before
    monkeypatch.undo()
    assert script.main(["--config", config_file(max_steps=3)])["steps"] == 3
    assert json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))["steps"] == 3


def test_the_meter_reaches_tensorboard_and_stays_there(script, config_file, tmp_path):
    """Losses of both attentions, gap, recall by layer and mode, at the steps where they were measured."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script.main(["--config", config_file(report_to="tensorboard", recall_steps=2)])
    (folder,) = (tmp_path / "run" / "logs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert steps["train/moba_layers"] == steps["train/sparsity"] == [1, 2, 3, 4]
    for name in ("full_mean", "full_trailing", "moba_mean", "moba_trailing", "gap", "recall", "recall_layer_00"):
        assert steps[f"eval/{name}"] == [2, 4], name


def test_streaming(script, config_file):
    report = script.main(["--config", config_file(streaming=True, max_steps=2)])
    assert report["steps"] == 2 and report["data"]["sequences"] > 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"learning_rat": 1e-3}, ValueError, "unknown key 'learning_rat'; did you mean learning_rate"),
        ({"dataset": "nowhere.jsonl"}, FileNotFoundError, "no such file or folder: nowhere.jsonl"),
        ({"dataset": None}, ValueError, "dataset is missing"),
        ({"model_name_or_path": "./nowhere"}, FileNotFoundError, "no such folder: ./nowhere"),
        ({"model_name_or_path": "package:no-such-package"}, FileNotFoundError, "no-such-package is not installed"),
        ({"sequence_length": 256}, ValueError, "sequence_length=256 is above the model's 128 positions"),
        ({"sequence_length": 64.5}, TypeError, "sequence_length must be an int, but was 64.5"),
        ({"trailing_tokens": 64}, ValueError, r"trailing_tokens must be 1 … 63, but was 64"),
        ({"held_out_share": 1e-9}, ValueError, "held-out text is empty"),
        ({"held_out_share": 0}, ValueError, "held_out_share must lie between 0 and 1"),
        ({"moba": {"block_size": 0}}, ValueError, "block_size must be at least 1"),
        ({"moba": {"blocksize": 8}}, ValueError, "unknown moba setting 'blocksize'"),
        ({"moba": {"full_attention_layers": [7]}}, ValueError, "full_attention_layers must lie in"),
        (
            {"moba": '{"top_k": 4'},
            ValueError,
            r"moba must be JSON, as in '\{.*\}', but was '\{\"top_k\": 4' \(.*column 12",
        ),
        ({"lora": "r=8"}, ValueError, r"lora must be JSON, as in '\{\"r\": 8\}', but was 'r=8'"),
        ({"rope": "yarn"}, ValueError, "rope must be JSON, as in .*, but was 'yarn'"),
        ({"schedule": "[moba]"}, ValueError, r"schedule must be JSON, as in .*, but was '\[moba\]'"),
        ({"streaming": True, "max_steps": -1}, ValueError, "streaming needs max_steps"),
    ],
)
def test_bad_input_is_refused_before_any_work(script, config_file, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        script.main(["--config", config_file(**changes)])
    assert not list((tmp_path / "run").glob("unfinished/checkpoint-*"))


def test_the_json_of_the_messages_is_accepted():
    examples = dict(arguments._JSON_EXAMPLES)
    model = arguments.ModelArguments("x", moba=examples.pop("moba"), lora=examples.pop("lora"))
    assert model.moba["block_size"] == 64 and model.lora == {"r": 8}
    stage = arguments.StageArguments(**examples)
    assert stage.rope["factor"] == 2 and len(stage.schedule) == 2


def test_missing_config_file(script):
    with pytest.raises(FileNotFoundError, match=r"no such config file: nowhere.yaml"):
        script.main(["--config", "nowhere.yaml"])


CONFIGS = (SCRIPT.parent.parent / "configs").rglob("*.yaml")
SETTINGS = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in CONFIGS}
# runs, but not those of the SFT script: evaluation and accelerate's files have no steps
TRAINING = [p for p, settings in SETTINGS.items() if "max_steps" in settings and "last_layers_full" not in settings]


@pytest.mark.parametrize("path", sorted(TRAINING), ids=lambda p: p.name)
def test_every_config_parses(script, path):
    cpu = ["--use_cpu", "true", "--bf16", "false", "--use_liger_kernel", "false", "--report_to", "none"]
    kinds = (script.ModelArguments, script.DataArguments, script.StageArguments, script.TrainingArguments)
    model, data, _, training, _ = script.parse((*kinds, script.PlanArguments), ["--config", str(path), *cpu])
    assert model.moba["full_attention_layers"] == [-3, -2, -1]
    assert model.moba["block_size"] * model.moba["top_k"] < data.sequence_length
    assert training.max_steps > 0 and not training.bf16
