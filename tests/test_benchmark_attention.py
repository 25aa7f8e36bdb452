"""scripts/benchmark_attention.py at small lengths: what it measures, counts, draws and says."""

import csv
import json

import pytest
import torch
from checkpoints import load_script

SMALL = ["--lengths", "512", "--block-size", "64", "--top-k", "2", "--rounds", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def script():
    return load_script("benchmark_attention")


def test_rows_files_and_figures(script, tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        rows = script.main([*SMALL, "--output", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert [(r["length"], r["contender"]) for r in rows] == [(512, "dense"), (512, "blockwise")]
    dense, moba = rows
    assert dense["forward_ratio"] == dense["both_ratio"] == 1
    assert 0 < moba["select_s"] and dense["select_s"] != dense["select_s"]  # NaN: dense attention routes nothing
    assert moba["both_s"] > 0 and moba["peak_mb"] >= 0
    assert "dense attention" in capsys.readouterr().out.splitlines()[-1]  # where it crosses
    with (tmp_path / "results.csv").open() as file:
        assert [row["contender"] for row in csv.DictReader(file)] == [r["contender"] for r in rows]
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["block_size"] == 64
    assert (tmp_path / "time.png").stat().st_size and (tmp_path / "memory.png").stat().st_size


def test_flop_bound_by_hand(script):
    # 10 tokens in blocks of 4, top-2: own blocks 10 + 10 + 3 pairs, past blocks 4 · 4 + 2 · 4
    options = script.parse(["--block-size", "4", "--top-k", "2"])
    assert script.flop_bound(options, 10) == 55 / (23 + 24)


def test_crossing(script):
    row = lambda length, ratio: {"contender": "blockwise", "length": length, "forward_ratio": ratio}  # noqa: E731
    assert "from 30 tokens on" in script.crossing([row(10, 1.2), row(20, 0.9), row(30, 1.1), row(40, 2)])
    assert "not faster" in script.crossing([row(10, 0.5)])


def test_dense_and_moba_agree_where_the_blocks_cover_all(script):
    options = script.parse(["--lengths", "96", "--batch", "2", "--block-size", "32", "--top-k", "3"])
    inputs = [x.detach() for x in script.states(options, 96, 0)[:3]]
    torch.testing.assert_close(*(script.attend(options, name, *inputs) for name in ("dense", "blockwise")))


@pytest.mark.parametrize("name", ["S1", "S2", "S3", "S4"])
def test_settings_and_what_overrides_them(script, name):
    options = script.parse(["--setting", name, "--device", "cpu", "--top-k", "5"])
    expected = script.SETTINGS[name] | {"device": "cpu", "top_k": 5}
    assert {key: getattr(options, key) for key in expected} == expected


def test_no_backend_of_dense_attention(script, monkeypatch):
    monkeypatch.setattr(script, "runs", lambda *_: False)
    with pytest.raises(SystemExit, match="no backend of PyTorch's dense attention"):
        script.main(SMALL[:2])


def test_a_backend_that_refuses_is_left_out_by_name(script, monkeypatch, capsys):
    monkeypatch.setitem(
        script.DENSE, "cpu", {"dense": None, "dense cudnn": torch.nn.attention.SDPBackend.CUDNN_ATTENTION}
    )
    options = script.parse(SMALL)
    inputs = script.states(options, 64, 0)
    assert script.runs(options, "dense", inputs) and not script.runs(options, "dense cudnn", inputs)
    assert "dense cudnn does not run: " in capsys.readouterr().err
