"""--plan: memory by part for every Llama config, without a GPU, a network or the model; what cannot fit is refused."""

from pathlib import Path

import pytest
import yaml
from checkpoints import load_script
from models import tiny_model

from moba_hf import planner
from moba_hf.planner import PRESETS, Sharing, Work
from moba_hf.training.model import add_lora
from moba_hf.training.planning import lora_parameters, shape_of, training_moments

CONFIGS = Path(__file__).parent.parent / "configs" / "llama-3.1-8b"
RUNS = sorted(
    p for p in CONFIGS.glob("*.yaml") if "model_name_or_path" in yaml.safe_load(p.read_text(encoding="utf-8"))
)
PARTS = {"weights", "gathered", "optimizer", "gradients", "activations", "partials", "logits"}
LLAMA, H100 = PRESETS["llama-3.1-8b"], planner.device_named("h100", {})


def script_of(path: Path):
    return load_script("sft" if path.stem.startswith("sft") else "continue_pretrain")


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_every_llama_config_has_a_plan(path, capsys):
    """On 8 GPUs, or as many as the config says."""
    gpus = yaml.safe_load(path.read_text(encoding="utf-8")).get("plan_gpus", 8)
    flags = ["--plan_gpus", str(gpus), "--sequence_parallel_size", str(min(8, gpus))]
    made = script_of(path).main(["--config", str(path), "--plan", *flags])
    printed = capsys.readouterr().out
    assert made["gpus"] == gpus and all(parts.keys() == PARTS for parts in made["moments"].values())
    assert all(f"  {part} " in printed for part in PARTS) and "predicted, not measured" in printed
    assert 8 * 2**30 < made["peak"] == max(sum(parts.values()) for parts in made["moments"].values()) < H100.usable
    assert made["moments"]["loss"]["logits"] > 2**30
    assert made["moments"]["loss"]["optimizer"] == 8 * LLAMA.parameters / gpus, "two moments in float32"


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_one_gpu_is_too_few_for_any_of_them(path):
    """Weights, gradients and moments of 8B parameters in bfloat16 are 60 GiB."""
    with pytest.raises(ValueError, match=r"this run cannot fit: \d+\.\d GiB a GPU are needed, 75\.2 GiB of h100"):
        script_of(path).main(["--config", str(path), "--plan", "--plan_gpus", "1", "--sequence_parallel_size", "1"])


def test_gpus_that_cannot_be_shared_so():
    path = str(CONFIGS / "sft-1m.yaml")
    with pytest.raises(ValueError, match="8 GPUs cannot be split into groups of 3"):
        load_script("sft").main(["--config", path, "--plan", "--sequence_parallel_size", "3"])
    with pytest.raises(ValueError, match="plan_gpus must be at least 1, but was 0"):
        load_script("sft").main(["--config", path, "--plan", "--plan_gpus", "0"])


def memory(checkpointing="layer", **settings):
    work = Work(1 << 20, full_layers=3, mixed=False, checkpointing=checkpointing)
    return max(training_moments(LLAMA, work, Sharing(8), H100, **settings), key=lambda m: m.total)


def test_parts_add_up_to_what_the_planner_says():
    held = planner.train_memory(LLAMA, Work(1 << 20, full_layers=3, mixed=False), Sharing(8), H100, True)
    assert memory().total == pytest.approx(held.total) and memory().moment == held.moment


def test_partials_count_where_the_mlp_does_not_take_more():
    parts = [
        training_moments(LLAMA, Work(1 << 20, mixed=False, mlp_tiles=tiles), Sharing(8), H100)[1].parts["partials"]
        for tiles in (1, 1024)
    ]
    assert parts[0] == 0 < parts[1] <= 3.4 * H100.workspace


def test_what_checkpointing_adds():
    """Kept attention, a token and layer: 32 heads of 128 · 2 bytes of output, 4 of log-sum-exp, 11 · 4 of selection."""
    plain, kept = memory(), memory(settings={"selective": True})
    tokens = (1 << 20) // 8
    assert kept.total - plain.total == pytest.approx(32 * tokens * 32 * (256 + 4 + 44))
    every = [memory(settings={"every_n_layers": n}).total for n in (1, 2, 4)]
    assert plain.total == every[0] < every[1] < every[2] < memory("none").total


def test_lora_parameters_are_those_of_peft():
    model = tiny_model()
    shape = planner.ModelShape.from_config(model.config)
    for settings in ({}, {"r": 4, "target_modules": "all-linear"}, {"target_modules": ["o_proj", "down_proj"]}):
        adapted = add_lora(tiny_model(), settings)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert lora_parameters(shape, settings) == trained
    with pytest.raises(ValueError, match="not 'lm_head'"):
        lora_parameters(shape, {"target_modules": ["lm_head"]})
    assert memory(lora={"r": 16}).parts["optimizer"] < 0.01 * memory().parts["optimizer"]


def test_shapes_of_stages_that_are_not_there_yet(tmp_path):
    assert shape_of("runs/llama-3.1-8b/1m/model") == shape_of("meta-llama/Llama-3.1-8B") == LLAMA
    tiny_model().config.save_pretrained(tmp_path / "llama-3.1-8b")
    assert shape_of(str(tmp_path / "llama-3.1-8b")).hidden == 32
