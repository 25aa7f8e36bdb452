"""`moba-hf doctor` and `moba-hf plan`."""

import json

import pytest
import torch

from moba_hf import cli, planner
from moba_hf.ops import engine_status


def run(capsys, *arguments: str):
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_doctor_says_of_every_engine_whether_it_runs_and_why_not(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0  # blockwise runs everywhere
    for name, status in engine_status().items():
        line = next(line for line in out.splitlines() if line.startswith(f"engine        {name}"))
        assert ("runs" in line) if status.available else (status.reason in line)
    for name in ("torch", "transformers", "flash-attn"):
        assert any(line.startswith(name) for line in out.splitlines())


def test_doctors_report_for_scripts(capsys):
    code, out, _ = run(capsys, "doctor", "--json", "--device", "cpu", "--length", "4096", "--block-size", "128",
                       "--top-k", "4", "--dtype", "float32")  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert found["auto"]["engine"] == "blockwise"
    assert set(found["providers"]) == {"fa3", "fa4", "fa2", "torch"}
    assert found["packages"]["torch"] == torch.__version__.removesuffix("+cpu") or found["packages"]["torch"]
    assert found["devices"][0]["memory"] > 0


def test_doctor_knows_when_moba_is_full_attention(capsys):
    _, out, _ = run(capsys, "doctor", "--json", "--device", "cpu", "--length", "1024", "--top-k", "2")
    assert json.loads(out)["auto"]["engine"] == "dense"


def test_doctor_shows_launch_settings_of_the_shape(capsys):
    pytest.importorskip("triton")
    _, out, _ = run(capsys, "doctor", "--json", "--block-size", "128")
    settings = json.loads(out)["launch_settings"]
    assert {"gate", "past", "own"} <= set(settings["settings"]["forward"])
    assert {"past_keys", "past_queries"} <= set(settings["settings"]["backward"])
    assert settings["here"] == torch.cuda.is_available()


@pytest.mark.parametrize("name", engine_status())
def test_exit_code_says_whether_one_engine_runs(capsys, name):
    code, _, err = run(capsys, "doctor", "--engine", name)
    status = engine_status()[name]
    assert code == (0 if status.available else 1)
    assert status.reason in err


def test_doctor_without_a_gpu_or_with_wrong_heads(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    _, out, _ = run(capsys, "doctor", "--json", "--device", "cuda")
    assert json.loads(out)["auto"] | {"shape": None} == {
        "device": "cuda", "shape": None, "engine": None, "reason": "PyTorch sees no CUDA device here",
    }  # fmt: skip
    _, out, _ = run(capsys, "doctor", "--json", "--heads", "9", "--kv-heads", "2")
    assert "multiple" in json.loads(out)["auto"]["reason"]


def test_plan_as_a_table(capsys):
    code, out, _ = run(capsys, "plan", "--length", "1048576", "10485760", "--gpus", "64", "--full-layers", "3",
                       "--checkpointing", "offload", "--mlp-tiles", "16", "--prefill-chunk", "65536")  # fmt: skip
    assert code == 0
    assert out.count("predicted, not measured") == 2 * len(planner.MODES)
    for words in ("memory: kv cache", "memory: optimizer", "largest length that fits", "10,485,760 tokens", "H100"):
        assert words in out


def test_plan_for_scripts(capsys):
    _, out, _ = run(capsys, "plan", "--json", "--mode", "prefill", "--length", "131072", "--gpus", "8")
    (plan,) = json.loads(out)
    assert [column["attention"] for column in plan["columns"]] == ["dense", "moba"]
    for column in plan["columns"]:
        assert column["memory"]["total"] == pytest.approx(sum(column["memory"]["parts"].values()))
        assert column["seconds"]["total"] > 0


def test_plan_of_a_folder_on_this_machines_cpu(capsys, tmp_path):
    from transformers import LlamaConfig

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    LlamaConfig(**sizes).save_pretrained(tmp_path)
    code, out, _ = run(capsys, "plan", "--model", str(tmp_path), "--device", "cpu", "--rate", "memory=1e9",
                       "--dtype", "float32", "--length", "4096", "--block-size", "64", "--mode", "train",
                       "--pure")  # fmt: skip
    assert code == 0 and "measured here just now" in out and "given: memory" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--length", "0"], "length must be at least 1"),
        (["--device", "abacus"], "unknown device"),
        (["--rate", "speed=1"], "unknown rate"),
        (["--gpus", "0"], "gpus must be at least 1"),
        (["--full-layers", "40"], "has 32 layers"),
    ],
)
def test_plan_refuses_what_cannot_be(capsys, arguments, message):
    code, out, err = run(capsys, "plan", *arguments)
    assert code == 2 and not out and message in err
