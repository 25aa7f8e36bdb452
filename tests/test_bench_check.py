"""The regression guard: what it finds, and that it passes on what it has just stored."""

import json

import pytest
from checkpoints import load_script

bench_check = load_script("bench_check")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "stored.json"
    assert bench_check.main(["--stored", str(file), "--length", "1024", "--rounds", "1", "--update"]) == 0
    return file


def check(stored, folder, **changes) -> int:
    """The exit code against what was stored, with some of it changed."""
    record = json.loads(stored.read_text())
    record["counted"] |= changes.pop("counted", {})
    file = folder / "changed.json"
    file.write_text(json.dumps(record | changes))
    return bench_check.main(["--stored", str(file), "--length", "1024", "--rounds", "1"])


def test_what_was_just_stored_passes(stored, tmp_path):
    assert check(stored, tmp_path, cpu_ratio=1e-3) == 0  # whatever else this machine does just now


def test_losses_fail_and_are_named(stored, tmp_path, capsys):
    assert check(stored, tmp_path, cpu_ratio=1e3) == 1
    assert "cpu_ratio was 1000" in capsys.readouterr().err
    assert check(stored, tmp_path, cpu_ratio=1e-3, counted={"allocated bytes": 1e3}) == 1
    assert "allocated bytes was 1000" in capsys.readouterr().err


def test_another_length_is_refused(stored, tmp_path, capsys):
    assert check(stored, tmp_path, length=2048) == 2
    assert "holds length 2048" in capsys.readouterr().err


@pytest.mark.parametrize(("worse", "before", "after"), [("more", 100, 119), ("less", 100, 84), ("more", 100, 10)])
def test_small_changes_pass(worse, before, after):
    assert bench_check.losses({"x": before}, {"x": after}, worse) == []
    assert bench_check.losses({"x": 100}, {"x": 121 if worse == "more" else 79}, worse)


def test_the_stored_figures_are_those_of_the_planner():
    counted = json.loads(bench_check.STORED.read_text())["counted"]
    found = bench_check.counted(1024)
    assert {k: v for k, v in counted.items() if k != "allocated bytes"} == {
        k: v for k, v in found.items() if k != "allocated bytes"
    }
