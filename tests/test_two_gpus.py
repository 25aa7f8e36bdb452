"""Both scripts over two GPUs, as docs/distributed.md starts them (accelerate, FSDP2, Ulysses on NCCL), beside one GPU.

One GPU trains in bfloat16 under autocast, and once in float32: what bfloat16 changes there is what two GPUs may differ.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from checkpoints import SCRIPTS, byte_tokenizer
from models import tiny_config
from tolerance import OUTPUT_SLACK
from training_runs import CHAT, make_material, weights
from transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
FSDP2 = Path(__file__).parent.parent / "configs" / "accelerate" / "fsdp2-8gpu.yaml"
SHAPE = dict(
    vocab_size=257, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=None, bos_token_id=None, eos_token_id=0,
    moba=None,
)  # fmt: skip
RUN = dict(
    sequence_length=1024, held_out_sequences=2, sample_tokens=0, max_steps=8, save_strategy="steps", save_steps=2,
    per_device_train_batch_size=1, learning_rate=1e-3, lr_scheduler_type="linear", logging_steps=1, bf16=True,
    gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, report_to="none",
    disable_tqdm=True, moba={"block_size": 64, "top_k": 3},
)  # fmt: skip
PRETRAINING = dict(
    RUN, moba={"block_size": 64, "top_k": 3, "full_attention_layers": [-1]}, held_out_share=0.3, meter_sequences=1,
    trailing_tokens=256, eval_strategy="steps", eval_steps=2, recall_steps=4,
)  # fmt: skip
SFT = dict(RUN, last_layers_full=1, held_out_share=0.2)
# One GPU in bfloat16 and in float32, and two that share every sequence.
WAYS = {"one": (1, {}), "exact": (1, {"bf16": False}), "two": (2, {"sequence_parallel_size": 2})}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Text of 2000 tokens a document, conversations of 200 to 600, and a random Llama that attends smoothly."""
    folder = make_material(tmp_path_factory.mktemp("material"), words=400)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(**SHAPE)).save_pretrained(folder / "model")
    byte_tokenizer(CHAT).save_pretrained(folder / "model")
    turns = [("user", "count to {n}"), ("assistant", "12345 " * 100)]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for n in range(60):
            said = [{"role": role, "content": text.format(n=n)[: 200 + 12 * n]} for role, text in turns]
            file.write(json.dumps({"messages": said}) + "\n")
    return folder


def write_config(folder: Path, material: Path, dataset: str, **values) -> str:
    folder.mkdir(exist_ok=True)
    where = dict(model_name_or_path=material / "model", dataset=material / dataset, output_dir=folder / "run")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({name: str(x) for name, x in where.items()} | values), encoding="utf-8")
    return str(path)


def start(script: str, config: str, gpus: int) -> subprocess.Popen:
    """The script as a user starts it; on one GPU the other is hidden, or Trainer would take both."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(FSDP2), "--num_processes", str(gpus)]
    command = [sys.executable, *(launch if gpus > 1 else []), str(SCRIPTS / f"{script}.py"), "--config", config]
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    if gpus == 1:
        environment["CUDA_VISIBLE_DEVICES"] = "0"
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen, folder: Path) -> dict:
    """The report, and the weights as `weights`."""
    told = process.communicate(timeout=300)[0]
    assert process.returncode == 0, told[-4000:]
    report = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    return {**report, "weights": {name: x.cuda().double() for name, x in weights(folder / "run").items()}}


def all_ways(script: str, folder: Path, material: Path, dataset: str, values: dict) -> dict[str, dict]:
    """What each of `WAYS` gave; they run beside one another."""
    started = {
        name: start(script, write_config(folder / name, material, dataset, **values | changes), gpus)
        for name, (gpus, changes) in WAYS.items()
    }
    return {name: finished(process, folder / name) for name, process in started.items()}


@torch.no_grad()
def change(found: dict, expected: dict, material: Path) -> float:
    """Difference of what was learned, relative to what was learned."""
    model = AutoModelForCausalLM.from_pretrained(material / "model").cuda().double()
    names = [name for name, _ in model.named_parameters() if name in expected["weights"]]
    assert found["weights"].keys() == expected["weights"].keys() and len(names) > 30
    other = sum((found["weights"][n] - expected["weights"][n]).square().sum() for n in names)
    learned = sum((expected["weights"][n] - model.get_parameter(n)).square().sum() for n in names)
    return float((other / learned).sqrt())


def assert_equals_one_gpu(two: dict, one: dict, exact: dict, material: Path) -> None:
    allowed = OUTPUT_SLACK * change(one, exact, material)
    assert change(two, one, material) <= allowed < 0.5
    assert two["steps"] == one["steps"] and two["trained_tokens"] == one["trained_tokens"]


@pytest.fixture(scope="module")
def pretrained(material, tmp_path_factory):
    return all_ways("continue_pretrain", tmp_path_factory.mktemp("pretraining"), material, "text", PRETRAINING)


def test_pretraining_equals_one_gpu(pretrained, material):
    """Full and MoBA loss before and after, weights, and the tokens that were counted; the finished model is whole."""
    assert_equals_one_gpu(*(pretrained[name] for name in ("two", "one", "exact")), material)
    two, one = pretrained["two"], pretrained["one"]
    for name in ("full_before", "moba_before", "full_after", "moba_after"):
        assert two[name]["mean"] == pytest.approx(one[name]["mean"], rel=0.01)
    assert one["moba_after"]["mean"] < 0.9 * one["moba_before"]["mean"]
    assert two["history"]["moba_layers"] == one["history"]["moba_layers"] == 8 * [3]


def test_killed_and_resumed(pretrained, material, tmp_path):
    """SIGKILL to every process after the second checkpoint; then the same command again."""
    config = write_config(tmp_path, material, "text", **PRETRAINING, sequence_parallel_size=2)
    process = start("continue_pretrain", config, 2)
    saved = tmp_path / "run" / "unfinished" / "checkpoint-4" / "trainer_state.json"
    limit = time.monotonic() + 200
    while not saved.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    assert saved.exists(), process.communicate()[0][-4000:]
    assert not (tmp_path / "run" / "report.json").exists()
    resumed = finished(start("continue_pretrain", config, 2), tmp_path)
    assert_equals_one_gpu(resumed, pretrained["one"], pretrained["exact"], material)
    assert resumed["full_before"] == pytest.approx(pretrained["two"]["full_before"], rel=1e-3)
    assert resumed["history"]["step"] == pretrained["two"]["history"]["step"] == list(range(1, 9))


def test_sft_equals_one_gpu(material, tmp_path):
    found = all_ways("sft", tmp_path, material, "rows.jsonl", SFT)
    assert_equals_one_gpu(*(found[name] for name in ("two", "one", "exact")), material)
    for name in ("full_loss_before", "moba_loss_before", "full_loss_after", "moba_loss_after"):
        assert found["two"][name] == pytest.approx(found["one"][name], rel=0.01)
