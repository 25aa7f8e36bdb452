"""Each config of continued pretraining makes one step, and each stage starts from the model of the one before.

As they are, but for the data, what needs a GPU, and the sizes: a Llama of two layers and everything that counts tokens
divided by one number, so that lengths, blocks and positions keep their ratios. SFT's configs: test_sft.py.
"""

import sys
from pathlib import Path

import pytest
import yaml
from checkpoints import load_script
from training_runs import make_material, run_without_offload
from transformers import AutoConfig

CONFIGS = Path(__file__).parent.parent / "configs"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CHAINS = {  # stages in order, tokens that become one, positions of the model that the first starts from, its RoPE
    "llama": (
        ["llama-3.1-8b/128k", "llama-3.1-8b/256k", "llama-3.1-8b/512k", "llama-3.1-8b/1m", "llama-3.1-8b/1m-moba"],
        1024, 131_072, LLAMA3 | {"original_max_position_embeddings": 8},
    ),
    "rehearsal": (["smollm2-135m/1k", "smollm2-135m/2k", "smollm2-135m/2k-moba"], 16, 8192, None),
    "demo": (["smollm2-135m-demo"], 16, 8192, None),
    "quality": (["smollm2-135m/quality"], 16, 8192, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def script():
    yield load_script("continue_pretrain")
    del sys.modules["continue_pretrain"]


def made_small(path: Path, scale: int, folder: Path, first: bool) -> dict:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    moba = values["moba"] | {"block_size": values["moba"]["block_size"] // scale, "full_attention_layers": [-1]}
    for name in ("sequence_length", "trailing_tokens"):
        values[name] //= scale
    values.pop("gguf_file", None)
    return values | dict(
        model_name_or_path=str(folder / "model") if first else values["model_name_or_path"],
        moba=moba, dataset=str(folder / "text"), held_out_share=0.3,
        held_out_sequences=1, meter_sequences=1, sample_tokens=0, max_steps=1, gradient_accumulation_steps=1,
        sequence_parallel_size=1, use_cpu=True, bf16=False, dtype="float32", use_liger_kernel=False, report_to="none",
        disable_tqdm=True, logging_steps=1,
    )  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_stages_make_a_step(script, name, tmp_path, monkeypatch):
    stages, scale, positions, rope = CHAINS[name]
    monkeypatch.chdir(tmp_path)  # where the output of a stage is the model of the next
    changes = dict(num_hidden_layers=2, max_position_embeddings=positions // scale)
    make_material(tmp_path, words=250, **changes | ({"rope_parameters": rope} if rope else {}))
    for number, stage in enumerate(stages):
        values = made_small(CONFIGS / f"{stage}.yaml", scale, tmp_path, first=number == 0)
        report = run_without_offload(script, values, tmp_path / "tiny.yaml")
        sparse = values.get("schedule", [{"mode": "moba"}])[0]["mode"] == "moba"
        assert report["steps"] == 1 and report["history"]["moba_layers"] == [int(sparse)]
        assert report["moba_before"] != report["full_before"], "nothing was left out"
        positions *= (values.get("rope") or {}).get("factor", 1)
        config = AutoConfig.from_pretrained(Path(values["output_dir"]) / "model")
        assert config.max_position_embeddings == positions // scale >= values["sequence_length"]
        assert config.moba["top_k"] == values["moba"]["top_k"]


def test_no_config_is_left_out():
    """Files without steps are those of evaluation and accelerate."""
    found = set()
    for path in CONFIGS.rglob("*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "max_steps" in values and "last_layers_full" not in values:
            found.add(path.relative_to(CONFIGS).with_suffix("").as_posix())
    assert found == {stage for stages, *_ in CHAINS.values() for stage in stages}
