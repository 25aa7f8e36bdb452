"""scripts/benchmark_model.py and scripts/bench_check.py on tiny models and inputs."""

import json

import pytest
import torch
from checkpoints import load_script, save_checkpoint

TINY = ["--lengths", "96", "--block-size", "16", "--top-k", "2", "--rounds", "2", "--decode-tokens", "2",
        "--loss-tokens", "32"]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, positions=256, moba={"block_size": 32, "top_k": 2})
    return str(folder)


def test_every_mode_of_a_checkpoint(checkpoint, tmp_path, capsys):
    script = load_script("benchmark_model")
    rows = script.main(["--model", checkpoint, *TINY, "--checkpointing", "--output", str(tmp_path)])
    assert [(row.mode, row.attention) for row in rows] == [
        (mode, attention) for mode in ("prefill", "decode", "train") for attention in ("full", "moba")
    ]
    for row in rows:
        assert row.tokens_per_second == pytest.approx(row.tokens / row.seconds)
        assert row.peak_gib > 0 and row.ratio > 0
    written = json.loads((tmp_path / "model.json").read_text())
    assert len(written["rows"]) == 6 and written["options"]["block_size"] == 16
    assert "tokens/s" in capsys.readouterr().out


def test_a_preset_with_fewer_layers_and_what_does_not_fit(monkeypatch, capsys):
    script = load_script("benchmark_model")
    shape = script.planner.ModelShape("tiny", 4, 32, 4, 2, 8, 48, 64)
    monkeypatch.setitem(script.planner.PRESETS, "tiny", shape)
    monkeypatch.setitem(script.RUNS, "prefill", failing_in_moba(script.RUNS["prefill"]))
    rows = script.main(["--preset", "tiny", "--layers", "2", "--full-layers", "1", "--modes", "prefill", "--no-cache",
                        *TINY])  # fmt: skip
    full, moba = rows
    assert full.seconds > 0 and moba.seconds is None
    out = capsys.readouterr().out
    assert "2 layers" in out and "out of memory" in out


def failing_in_moba(run):
    def wrapper(model, *arguments):
        if model.config._attn_implementation == "moba":
            raise torch.OutOfMemoryError("no memory")
        run(model, *arguments)

    return wrapper


def test_the_guard_passes_on_what_it_stored_and_fails_on_a_loss(tmp_path, capsys):
    script = load_script("bench_check")
    stored = tmp_path / "stored.json"
    small = ["--stored", str(stored), "--length", "512", "--rounds", "1"]
    assert script.main([*small, "--update"]) == 0
    figures = json.loads(stored.read_text())
    assert script.losses(figures["counted"], figures["counted"], "more") == []
    worse = figures | {"counted": {name: value / 1.3 for name, value in figures["counted"].items()}}
    stored.write_text(json.dumps(worse | {"cpu_ratio": 0.01}))
    assert script.main(small) == 1
    assert "30 % more" in capsys.readouterr().err
    stored.write_text(json.dumps(figures | {"cpu_ratio": 1000.0}))
    assert script.main(small) == 1
    assert "cpu_ratio" in capsys.readouterr().err
    stored.write_text(json.dumps(figures | {"cpu_ratio": 0.001}))
    assert script.main(small) == 0
