"""scripts/sft.py end to end on a tiny random Llama: masked prompts, packing, hybrid layers, LoRA, resume, refusals."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import SCRIPTS, byte_tokenizer, load_script
from models import tiny_model
from processes import run_together
from training_runs import CHAT, run_without_offload
from transformers import AutoConfig, AutoModelForCausalLM

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def script():
    yield load_script("sft")
    del sys.modules["sft"]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a random model, its tokenizer (one token per byte) and conversations of 40 to 120 tokens."""
    folder = tmp_path_factory.mktemp("material")
    model = tiny_model(
        vocab_size=257, num_hidden_layers=3, max_position_embeddings=256, pad_token_id=None, bos_token_id=None,
        eos_token_id=0,
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    byte_tokenizer(CHAT).save_pretrained(folder / "model")
    turns = [(f"count to {n}", "12345 " * (n % 9 + 1)) for n in range(60)]
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in turns
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture
def config_file(material, tmp_path):
    """A function that writes a config with changes and returns its path as text."""

    def write(**changes):
        values = dict(
            model_name_or_path=str(material / "model"), moba={"block_size": 8, "top_k": 2}, last_layers_full=1,
            dataset=str(material / "rows.jsonl"), sequence_length=128, held_out_share=0.2, held_out_sequences=2,
            sample_tokens=4, output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=2,
            learning_rate=1e-3, lr_scheduler_type="linear", logging_steps=1, save_strategy="steps", save_steps=2,
            report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
        ) | changes  # fmt: skip
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    return write


def losses(report, when="after"):
    return {name: report[f"{name}_{when}"] for name in ("full_loss", "moba_loss", "gap")}


WATCHED = """
import json, os, sys
from pathlib import Path
folder, scripts = map(Path, sys.argv[1:3])
sys.path.insert(0, str(scripts))
import sft, torch
lengths = {"training": set(), "measuring": set()}
forward = torch.nn.Embedding.forward
def watched(self, ids):
    lengths["training" if self.training else "measuring"].add(ids.shape[-1])
    return forward(self, ids)
torch.nn.Embedding.forward = watched
sft.main([*sys.argv[3:], "--sample_tokens", "0"])
told = {name: sorted(found) for name, found in lengths.items()}
(folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told), encoding="utf-8")
"""


def test_end_to_end(script, config_file, tmp_path, capsys):
    script.main(["--config", config_file()])
    run = tmp_path / "run"
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["steps"] == 4 and report["trained_tokens"] == 4 * 2 * 128
    assert report["moba_loss_after"] < report["moba_loss_before"]
    assert report["gap_after"] == pytest.approx(report["moba_loss_after"] - report["full_loss_after"]) != 0
    assert report["data"]["dropped"] == 0 and report["data"]["documents"] > 30
    assert not (run / "unfinished").exists() and list((run / "model").glob("*.safetensors"))

    model = AutoModelForCausalLM.from_pretrained(run / "model", attn_implementation="moba")
    assert model.config.moba["full_attention_layers"] == [-1] and model.config.moba_trained_tokens == 4 * 2 * 128
    code = f'model = AutoModelForCausalLM.from_pretrained("{run / "model"}", attn_implementation="moba")'
    assert code in (run / "model" / "README.md").read_text(encoding="utf-8") and code in capsys.readouterr().out


def test_interrupted_run_resumes_to_the_same_end(script, config_file, tmp_path, monkeypatch):
    """Streaming: the order is made again, not kept. The third step fails once."""
    expected = script.main(["--config", config_file(streaming=True), "--output_dir", str(tmp_path / "straight")])
    original, steps = script.MobaSFTTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if steps == [0, 1, 2]:
            raise RuntimeError("the power failed")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(script.MobaSFTTrainer, "training_step", training_step)
    with pytest.raises(RuntimeError, match="power"):
        script.main(["--config", config_file(streaming=True)])
    assert not (tmp_path / "run" / "report.json").exists()
    resumed = script.main(["--config", config_file(streaming=True)])
    assert steps == [0, 1, 2, 2, 3]
    assert losses(resumed) == losses(expected)


def test_lora_trains_adapters_alone_and_reloads(script, config_file, material, tmp_path):
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    report = script.main(["--config", config_file(lora=lora, gradient_checkpointing=True)])
    folder = tmp_path / "run" / "model"
    assert report["moba_loss_after"] < report["moba_loss_before"]
    assert [p.name for p in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
    scope = {}
    card = (folder / "README.md").read_text(encoding="utf-8")
    exec(card.split("```python\n")[1].split("```")[0], scope)
    model = scope["model"]
    assert model.config.moba["block_size"] == 8 and model.config._attn_implementation == "moba"
    assert model.config.moba_trained_tokens == 4 * 2 * 128
    base = AutoModelForCausalLM.from_pretrained(material / "model", config=AutoConfig.from_pretrained(folder))
    ids = torch.arange(3, 63)[None]
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, base(ids).logits)
        with model.disable_adapter():
            base.set_attn_implementation("moba")
            torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=0, atol=0)


def test_attention_is_kept_where_asked_for(script, config_file, monkeypatch):
    """Two sparse layers, one full: each training step runs each of them once, or once more to recompute it."""
    from moba_hf.ops.engines import blockwise

    inside, calls = [], []
    forward, training_step = blockwise.forward, script.MobaSFTTrainer.training_step

    def counted(*args):
        calls.extend(inside)
        return forward(*args)

    def watched(self, *args, **kwargs):
        inside.append(1)
        try:
            return training_step(self, *args, **kwargs)
        finally:
            inside.clear()

    monkeypatch.setattr(blockwise, "forward", counted)
    monkeypatch.setattr(script.MobaSFTTrainer, "training_step", watched)
    for settings, expected in ((None, 4), ({"selective": True}, 2)):
        calls.clear()
        changes = dict(
            gradient_checkpointing=True, gradient_checkpointing_kwargs=settings, max_steps=1, sample_tokens=0
        )
        script.main(["--config", config_file(**changes)])
        assert len(calls) == expected


def test_pretraining_with_lora_tiled_loss_and_a_mixture(material, tmp_path):
    """The other script: the same adapters, a loss in tiles, attention kept; its card loads what it saved."""
    script = load_script("continue_pretrain")
    for name, letter in (("one", "a"), ("two", "b")):
        rows = [json.dumps({"text": f"{letter}{i} " * 60}) for i in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    mixture = [{"dataset": str(tmp_path / "one.jsonl"), "weight": 3}, {"dataset": str(tmp_path / "two.jsonl")}]
    values = dict(
        model_name_or_path=str(material / "model"), moba={"block_size": 8, "top_k": 2}, lora={"r": 4}, tiled_loss=True,
        dataset=mixture, sequence_length=64, held_out_share=0.3, held_out_sequences=2, meter_sequences=1,
        trailing_tokens=8, sample_tokens=2, output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=1e-2,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"selective": True}, report_to="none", use_cpu=True,
        disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    report = script.main(["--config", str(tmp_path / "config.yaml")])
    assert report["moba_after"] != report["moba_before"]
    shares = [reading["characters"] for reading in report["data"]["sources"].values()]
    assert shares[0] == pytest.approx(3 * shares[1], rel=0.05)
    card = (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    assert "one.jsonl (75.0%)" in card and "continued pretraining, LoRA adapters alone" in card
    scope = {}
    exec(card.split("```python\n")[1].split("```")[0], scope)
    assert scope["model"].peft_config["default"].r == 4 and scope["model"].config.moba["block_size"] == 8


def test_two_processes_share_sequences(script, config_file, tmp_path):
    """Ulysses over gloo, packed conversations: the losses are those of one process, and no rank runs a whole row."""
    pytest.importorskip("deepspeed")
    expected = script.main(["--config", config_file(), "--output_dir", str(tmp_path / "one")])
    shared = config_file(sequence_parallel_size=2)
    run_together([sys.executable, "-c", WATCHED, str(tmp_path), str(SCRIPTS), "--config", shared], 2)
    seen = [json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    assert seen == [{"training": [64], "measuring": [64]}] * 2
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert report["trained_tokens"] == expected["trained_tokens"]
    for when in ("before", "after"):
        assert losses(report, when) == pytest.approx(losses(expected, when), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dataset": None}, ValueError, "dataset is missing"),
        ({"dataset": "nowhere.jsonl"}, FileNotFoundError, "no such file or folder: nowhere.jsonl"),
        ({"dataset": [{"dataset": "pydoc", "wait": 1}]}, ValueError, "a data set of a mixture has the keys"),
        ({"sequence_length": 512}, ValueError, "sequence_length=512 is above the model's 256 positions"),
        ({"sequence_length": 16}, ValueError, "held-out conversations are empty"),
        ({"packing": True}, ValueError, "packing=True is not read here; instead of it, use sequence_length"),
        ({"trust_remote_code": True}, ValueError, "code that comes with a model is not run"),
        ({"eos_token": "<|nowhere|>"}, ValueError, "is no token of this tokenizer"),
        ({"assistant_only_loss": True}, ValueError, "assistant_only_loss=True is not read here"),
        ({"last_layers_full": 4}, ValueError, "full_attention_layers must lie in -3 … 2"),
        ({"moba": {"full_attention_layers": [0]}}, ValueError, "say the same thing twice"),
        ({"lora": {"rank": 8}}, ValueError, "'rank' is no field of peft.LoraConfig"),
        ({"use_liger_kernel": True}, ValueError, "use_liger_kernel"),
        ({"streaming": True, "max_steps": -1}, ValueError, "streaming needs max_steps"),
        ({"gradient_checkpointing_kwargs": {"offload": True}}, ValueError, "needs gradient_checkpointing: true"),
    ],
)
def test_bad_input_is_refused_before_any_work(script, config_file, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        script.main(["--config", config_file(**changes)])
    assert not list((tmp_path / "run").glob("unfinished/checkpoint-*"))


SFT = sorted((CONFIGS).rglob("sft*.yaml"))


@pytest.mark.parametrize("path", SFT, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_config_makes_one_step(script, path, material, tmp_path):
    """As it is, but for the model, the data, the lengths (to a 1024th) and what needs a GPU."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    moba = {**values.get("moba", {}), "block_size": 8, "top_k": 2}
    assert values["last_layers_full"] == 3
    values |= dict(
        model_name_or_path=str(material / "model"), gguf_file=None, dataset=str(material / "rows.jsonl"), moba=moba,
        dataset_split="train", sequence_length=128, held_out_share=0.2, held_out_sequences=1, sample_tokens=0,
        output_dir=str(tmp_path), max_steps=1, gradient_accumulation_steps=1, chat_template_path=None, eos_token=None,
        use_cpu=True, bf16=False, dtype="float32", report_to="none", disable_tqdm=True, last_layers_full=2,
        sequence_parallel_size=1,
    )  # fmt: skip
    assert run_without_offload(script, values, tmp_path / "tiny.yaml")["steps"] == 1
