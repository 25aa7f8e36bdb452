"""Ulysses on gloo processes equals one process; FSDP2 too; what cannot be shared is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sequence_parallel_worker as worker
import torch
from accelerate import ParallelismConfig
from models import tiny_config, tiny_model, tokens
from processes import ROOT, run_together
from tolerance import error
from transformers import Trainer, TrainingArguments

from moba_hf.training import sequence_parallel
from moba_hf.training.sequence_parallel import SharingRanks

pytest.importorskip("deepspeed")
EXACT = 1e-6  # relative Frobenius norm, float32: the order of sums differs, and nothing else


def processes(number: int, folder: Path) -> list[dict]:
    """What each of the worker's processes saved."""
    run_together([sys.executable, worker.__file__, str(folder)], number)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(number)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return processes(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return processes(4, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return worker.train(tmp_path_factory.mktemp("one"))


def assert_equal_tensors(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    wrong = {name: error(found[name], expected[name]) for name in expected}
    assert max(wrong.values()) <= EXACT, wrong


@pytest.mark.parametrize("documents", worker.DOCUMENTS)
@pytest.mark.parametrize("name", worker.MODELS)
def test_logits_and_gradients_equal_one_process(two, name, documents):
    expected = worker.forward_backward(name, documents)
    for rank in two:
        found = rank[name, documents]
        assert error(found["logits"], expected["logits"]) <= EXACT
        assert_equal_tensors(found["gradients"], expected["gradients"])


def assert_same_training(found: dict, expected: dict) -> None:
    for name in ("loss", "grad_norm", "sparsity"):
        assert found[name] == pytest.approx(expected[name], rel=EXACT)
    for name in ("moba_layers", "tokens"):
        assert found[name] == expected[name]
    assert_equal_tensors(found["weights"], expected["weights"])
    for name in ("meter", "whole sequences, moba", "whole sequences, eager"):
        assert error(found[name], expected[name]) <= EXACT


def test_trainer_equals_one_process(two, one):
    """Activation checkpointing, gradient accumulation, packed documents, full attention and then MoBA, the meter."""
    before = dict(tiny_model(**worker.MODELS["replicated"]).named_parameters())
    assert sum(error(one["weights"][name], before[name]) > 1e-3 for name in before) > len(before) / 2, "barely trained"
    assert one["moba_layers"] == [0, 0, 1, 1] and one["sparsity"][-1] > 0.1
    assert error(one["meter"][0], one["meter"][1]) > 1e-3, "full attention and MoBA are the same"
    for rank in two:
        assert_same_training(rank["train"], one)


def test_resumed_trainer_equals_one_process(two, one):
    for rank in two:
        assert_same_training(rank["resumed"], one)


def test_two_groups_equal_one_process(four, one):
    """Four processes, each sequence shared by two of them, the pairs read different ones."""
    for rank in four:
        assert_same_training(rank["train"], one)


def test_what_a_run_has_measured_is_known_to_every_process(two):
    """Where one process measured again and the other did not, they would wait for each other for ever."""
    for number, rank in enumerate(two):
        assert rank["once"] == [{"loss": 7.0}, number]


@pytest.mark.parametrize("mode", ["data", "ulysses"])
def test_fully_sharded_training_equals_one_process(two, mode):
    """torch's fully_shard itself: through accelerate, FSDP2 on CPUs silently becomes DDP."""
    expected = worker.fully_sharded("one")
    for rank in two:
        assert_equal_tensors(rank[mode]["weights"], expected["weights"])
        assert error(rank[mode]["losses"], expected["losses"]) <= EXACT


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("left padding", "ValueError: sequence parallelism takes no padding"),
        ("cu_seq_lens", "ValueError: sequence parallelism takes no cu_seq_lens"),
        ("position_ids of axes", "ValueError: sequence parallelism needs position_ids [rows, length / ranks]"),
        ("sliding window", "ValueError: sequence parallelism knows causal attention inside documents"),
        ("wide window", "ValueError: sequence parallelism runs causal attention without a window, but this layer has"),
        ("other rows", "RuntimeError: the ranks that share a sequence have read different ones"),
        ("processes", "ValueError: sequence_parallel_size=4 must divide the number of processes, which is 2"),
    ],
)
def test_refused_where_ranks_meet(two, name, message):
    for rank in two:
        assert rank["refusals"][name].startswith(message)


def test_second_size_in_one_process_is_refused(four):
    for rank in four:
        assert rank["refusals"]["processes"] == (
            "ValueError: sequence_parallel_size=4, but in this process it has been 2 before"
        )


RANKS = SharingRanks(size=2, rank=1, group=None)


def test_part_of_a_batch():
    """By hand: labels come from the successor, across the border too; positions are made where none are given."""
    part = RANKS.part({"input_ids": torch.arange(8)[None], "labels": 10 + torch.arange(8)[None], "name": "kept"})
    assert part["input_ids"].tolist() == [[4, 5, 6, 7]] and part["position_ids"].tolist() == [[4, 5, 6, 7]]
    assert part["shift_labels"].tolist() == part["labels"].tolist() == [[15, 16, 17, -100]]
    assert part["name"] == "kept"
    first = SharingRanks(size=2, rank=0, group=None).part(
        {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None], "attention_mask": torch.ones(1, 8)}
    )
    assert first["shift_labels"].tolist() == [[1, 2, 3, 4]] and "attention_mask" not in first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": tokens(1, 7)}, "sequence_parallel_size=2 must divide the sequence length, which is 7"),
        ({"attention_mask": torch.tensor([[0] + [1] * 7])}, "takes no padding"),
        ({"cu_seq_lens_q": torch.tensor([0, 8])}, "takes no cu_seq_lens"),
        ({"weights": torch.ones(8)}, r"weights must have the shape of input_ids, \(1, 8\), but had \(8,\)"),
    ],
)
def test_batches_that_cannot_be_shared(changes, message):
    with pytest.raises(ValueError, match=message):
        RANKS.part({"input_ids": tokens(1, 8), **changes})


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (1, {}, "must be an int of at least 2, but was 1"),
        (8, {}, "must divide the attention heads, which are 4"),
        (3, dict(num_attention_heads=6, hidden_size=48), "divide the key heads or be a multiple of them, which are 2"),
        (2, dict(layer_types=["sliding_attention", "full_attention"]), r"but the model has \['sliding_attention'\]"),
    ],
)
def test_models_that_cannot_be_shared(size, changes, message):
    family = "qwen3" if "layer_types" in changes else "llama"
    with pytest.raises(ValueError, match=message):
        sequence_parallel.check(tiny_config(family, **changes), size)


def test_length_that_cannot_be_shared():
    with pytest.raises(ValueError, match="must divide the sequence length, which is 9"):
        sequence_parallel.check(tiny_config(), 2, 9)


def test_one_process_is_refused():
    with pytest.raises(RuntimeError, match="needs 2 processes: start with accelerate launch or torchrun"):
        sequence_parallel.start(tiny_config(), 2)


def test_switching_the_attention_is_refused():
    """Full attention is a setting of "moba" there: under another name a rank would see its own part alone."""
    model = tiny_model(attention="sdpa")
    with pytest.raises(ValueError, match="needs attn_implementation='moba', but it was 'sdpa'"):
        with RANKS.sharing(model):
            pass


def make_trainer(tmp_path, **changes) -> Trainer:
    return Trainer(tiny_model(), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "needs label_smoothing_factor=0, but it was 0.1"),
        ({"average_tokens_across_devices": False}, "needs average_tokens_across_devices=True, but it was False"),
        ({"accelerator_config": {"dispatch_batches": True}}, "needs accelerator_config.dispatch_batches=False"),
    ],
)
def test_trainers_that_cannot_share(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        sequence_parallel.enable(make_trainer(tmp_path, **changes), 2)


def test_ring_context_parallel_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.accelerator.state.parallelism_config = ParallelismConfig(cp_size=2)
    try:
        with pytest.raises(ValueError, match="A ring cannot route over whole sequences"):
            sequence_parallel.enable(trainer, 2)
    finally:
        trainer.accelerator.state.parallelism_config = None


def test_benchmark_on_two_processes(tmp_path):
    """scripts/benchmark_distributed.py: both attentions, and two processes beside one."""
    report = tmp_path / "report.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(str(ROOT / "scripts" / "benchmark_distributed.py"), "--device", "cpu", "--preset", "tiny", "--check"),
        *("--lengths", "256", "--block-size", "32", "--top-k", "2", "--steps", "1", "--output", str(report)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(report.read_text())
    assert [(row["attention"], row["length"]) for row in found["rows"]] == [("full", 256), ("moba", 256)]
    assert all(row["tokens_per_second"] == pytest.approx(256 / row["seconds"]) for row in found["rows"])
    assert found["check"]["float32"] <= EXACT
    assert found["check"]["bfloat16"] <= found["check"]["eager attention, bfloat16 beside float32"]
