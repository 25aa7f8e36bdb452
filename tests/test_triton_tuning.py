"""Opt-in tuning: `scripts/tune_kernels.py` with a clock of the test's, and the file it writes, read back.

The tuner runs the kernels in Triton's interpreter, in a process of its own like the other tests of the kernels.
"""

import json
from pathlib import Path

import pytest
import torch
from interpreter import INTERPRETED, run_in_the_interpreter

from moba_hf import cli

pytest.importorskip("triton")
inside = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, in a process of its own")
SCRIPTS = Path(__file__).parents[1] / "scripts"
SHAPE = ((9, 0), torch.bfloat16, 128, 512)
TILE = {"rows": 32, "keys": 128, "warps": 16, "stages": 4}
RECORD = {"capability": [9, 0], "dtype": "bfloat16", "head_dim": 128, "block_size": 512}


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.timeout(600)
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def write(path: Path, *records: dict) -> str:
    path.write_text(json.dumps(records))
    return str(path)


def settings(shape=SHAPE):
    from moba_hf.ops.kernels.backward_settings import backward_settings
    from moba_hf.ops.kernels.forward_settings import forward_settings

    return forward_settings(*shape), backward_settings(*shape)


def test_a_file_that_is_named_replaces_the_tiles_it_has(monkeypatch, tmp_path, capsys):
    table = settings()
    path = write(tmp_path / "one.json", RECORD | {"forward": {"past": TILE}, "backward": {"own_keys": TILE}})
    assert settings() == table  # not named, not read
    monkeypatch.setenv("MOBA_HF_LAUNCH_SETTINGS", path)
    forward, backward = settings()
    assert vars(forward.past) == vars(backward.own_keys) == TILE
    assert forward.rows_per_program == 32 and forward.gate == table[0].gate and forward.own == table[0].own
    assert backward.past_keys == table[1].past_keys
    for other in (((8, 0), *SHAPE[1:]), (SHAPE[0], torch.float16, 128, 512), (*SHAPE[:2], 64, 512), (*SHAPE[:3], 256)):
        found = settings(other)
        monkeypatch.delenv("MOBA_HF_LAUNCH_SETTINGS")
        assert found == settings(other)
        monkeypatch.setenv("MOBA_HF_LAUNCH_SETTINGS", path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # the doctor then speaks of an H100
    assert cli.main(["doctor", "--block-size", "512"]) == 0
    out = capsys.readouterr().out
    assert f"launch settings: {path}: past, own_keys" in out
    assert "forward past: rows 32 keys 128 warps 16 stages 4" in out
    cli.main(["doctor", "--block-size", "256"])
    assert f"launch settings: the fixed table; {path} has none for this shape" in capsys.readouterr().out


def test_a_block_that_fits_a_tuned_tile_stays_on_chip(monkeypatch, tmp_path):
    shape = (*SHAPE[:3], 64)
    tiles = {"rows": 64, "keys": 32, "warps": 4, "stages": 1}
    changed = RECORD | {"block_size": 64, "forward": {"past": tiles}, "backward": {"past_keys": tiles}}
    assert settings(shape)[0].stationary and settings(shape)[1].fused
    monkeypatch.setenv("MOBA_HF_LAUNCH_SETTINGS", write(tmp_path / "few_keys.json", changed))
    assert not settings(shape)[0].stationary and not settings(shape)[1].fused


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "Expecting"),
        (json.dumps([{"dtype": "bfloat16"}]), "no 'capability'"),
        (json.dumps([RECORD | {"forward": {"gait": TILE}}]), "no kernel 'gait' beside gate, past, own"),
        (json.dumps([RECORD | {"forward": {"gate": TILE | {"rows": 48}}}]), "gate: rows must be one of .* but was 48"),
        (json.dumps([RECORD | {"backward": {"own_keys": {"rows": 64}}}]), "own_keys must have rows, keys"),
    ],
)
def test_a_file_that_is_something_else(monkeypatch, tmp_path, content, says):
    path = tmp_path / "other.json"
    path.write_text(content)
    monkeypatch.setenv("MOBA_HF_LAUNCH_SETTINGS", str(path))
    with pytest.raises(ValueError, match=f"MOBA_HF_LAUNCH_SETTINGS=.*other.json.*{says}"):
        settings()
    monkeypatch.setenv("MOBA_HF_LAUNCH_SETTINGS", str(tmp_path / "none.json"))
    with pytest.raises(FileNotFoundError):
        settings()


@inside
def test_the_tuner_keeps_what_its_clock_says_is_fastest(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS)
    import tune_kernels

    from moba_hf.ops.kernels.tuned_tiles import ROLES, Tile

    tried = [Tile(16, 16, 4, 1), Tile(16, 32, 4, 2), Tile(32, 16, 4, 1)]
    monkeypatch.setattr(tune_kernels, "GATE", tried)
    monkeypatch.setattr(tune_kernels, "ATTENTION", tried)
    asked = []

    def clock(run):
        """The table's tile 10, then 9, 5 and 4.95: the third wins, the last gains too little."""
        run()
        asked.append(run)
        return (10, 9, 5, 4.95)[(len(asked) - 1) % 4]

    path = tmp_path / "tuned.json"
    write(path, RECORD, RECORD | {"capability": [8, 6], "dtype": "float32", "head_dim": 16, "block_size": 20})
    shape = ["--length", "70", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--block-size", "20",
             "--top-k", "3", "--dtype", "float32", "--out", str(path)]  # fmt: skip
    assert tune_kernels.main(shape, clock) == 0
    former, new = json.loads(path.read_text())
    assert former == RECORD and len(asked) == 4 * 6  # seven kernels, of which dQ of past blocks is part of dK's
    monkeypatch.setenv("MOBA_HF_LAUNCH_SETTINGS", str(path))
    forward, backward = settings(((8, 6), torch.float32, 16, 20))
    table = {role: tile for found in (new["forward"], new["backward"]) for role, tile in found.items()}
    assert set(table) == {role for roles in ROLES.values() for role in roles}
    assert all(table[role] == vars(tried[1]) for role in table if role != "past_queries")
    assert forward.own == backward.own_queries == tried[1]


@inside
def test_what_the_tuner_passes_over(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import tune_kernels
    from triton.runtime.errors import OutOfResources

    from moba_hf.ops.kernels.tuned_tiles import Tile

    large, empty, fine = Tile(256, 256, 4, 1), Tile(128, 128, 4, 1), Tile(16, 16, 4, 1)
    monkeypatch.setattr(tune_kernels, "ATTENTION", [large, empty, fine])
    said = []

    def stage(tiles):
        if tiles["own"] == large:
            raise OutOfResources(300000, 232448, "shared memory")
        return torch.full((3,), float("nan") if tiles["own"] == empty else 1.0)

    times = iter([10.0, 3.0])
    start = {"own": Tile(64, 64, 4, 2)}
    best = tune_kernels.fastest(stage, start, "own", lambda run: next(times), said.append)
    assert best == {"own": fine}
    assert "passed over" in said[0] and "shared memory" in said[0]
    assert "passed over, results differ" in said[1]
    blocks = torch.arange(10, dtype=torch.int32)
    assert tune_kernels.wrong(lambda: blocks, blocks) is None
    assert tune_kernels.wrong(lambda: blocks.flip(0), blocks) == "other blocks are selected"
