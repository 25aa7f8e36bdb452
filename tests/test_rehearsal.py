"""`make rehearse`: its stages are chained, and the summary says what the reports say."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from checkpoints import load_script

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs" / "smollm2-135m"
summarize_rehearsal = load_script("summarize_rehearsal")
STAGES = summarize_rehearsal.STAGES


def commands_of_the_target(folder: Path, finished: tuple[str, ...] = ()) -> list[str]:
    """What `make rehearse` would run in a checkout where everything is installed and some stages have finished."""
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copytree(CONFIGS, folder / "configs" / "smollm2-135m")
    reports = [folder / "runs" / "rehearsal" / stage / "report.json" for stage in finished]
    for file in (folder / "pyproject.toml", folder / "constraints.txt", folder / ".venv" / "installed", *reports):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    ran = subprocess.run(["make", "-n", "rehearse"], cwd=folder, capture_output=True, text=True, check=True)
    return [line for line in ran.stdout.splitlines() if "scripts/" in line]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("finished", [0, 2, 4])
def test_a_finished_stage_is_left_as_it_is(tmp_path, finished):
    names = ["1k.yaml", "2k.yaml", "2k-moba.yaml", "sft-2k.yaml"]
    commands = commands_of_the_target(tmp_path, STAGES[:finished])
    assert [Path(line.split()[-1]).name for line in commands] == [*names[finished:], "rehearsal"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_each_stage_starts_from_the_one_before(tmp_path):
    commands = commands_of_the_target(tmp_path)
    assert [line.split()[1] for line in commands] == [
        *3 * ["scripts/continue_pretrain.py"], "scripts/sft.py", "scripts/summarize_rehearsal.py"
    ]  # fmt: skip
    stages = [yaml.safe_load((ROOT / line.split()[-1]).read_text(encoding="utf-8")) for line in commands[:-1]]
    assert stages[0]["model_name_or_path"].startswith("package:")
    for former, stage in zip(stages, stages[1:]):
        assert stage["model_name_or_path"] == former["output_dir"] + "/model"
    assert [Path(stage["output_dir"]).name for stage in stages] == list(STAGES)
    assert {str(Path(stage["output_dir"]).parent) for stage in stages} == {commands[-1].split()[-1]}
    assert stages[1]["sequence_length"] == 2 * stages[0]["sequence_length"] and stages[1]["rope"]["factor"] == 2
    assert [phase["mode"] for phase in stages[2]["schedule"]] == ["moba", "full"]


def report(steps: int, layers: list[int], offset: float) -> dict:
    losses = [2.0 - 0.01 * i for i in range(steps)]
    return {
        "steps": steps,
        "full_before": {"mean": 2.5}, "full_after": {"mean": 2.25},
        "moba_before": {"mean": 3.0 + offset}, "moba_after": {"mean": 2.5},
        "history": {"loss": losses, "moba_layers": layers},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    reports = {
        "1k": report(3, [0, 0, 0], 0.0),
        "2k": report(3, [0, 0, 0], 0.125),
        "2k-moba": report(5, [27, 27, 27, 27, 0], 0.25),
        "sft": {"steps": 2, "full_loss_before": 1.5, "full_loss_after": 1.25, "moba_loss_before": 1.75,
                "moba_loss_after": 1.375},
    }  # fmt: skip
    for name, content in reports.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(content))
    return tmp_path


def test_summary(folder, capsys):
    text = summarize_rehearsal.main([str(folder)])
    assert "| 2k-moba | 5 | 2.500 → 2.250 | 3.250 → 2.500 | 0.750 → 0.250 |" in text
    assert "| sft | 2 | 1.500 → 1.250 | 1.750 → 1.375 | 0.250 → 0.125 |" in text
    assert "2k-moba, moba to full after step 4: training loss 1.990, 1.980, 1.970 | 1.960" in text
    assert text in capsys.readouterr().out and (folder / "stages.png").stat().st_size > 5000


def test_a_stage_that_did_not_run(folder, capsys):
    (folder / "2k" / "report.json").unlink()
    with pytest.raises(SystemExit):
        summarize_rehearsal.main([str(folder)])
    assert "no report.json of the stages 2k: run make rehearse first" in capsys.readouterr().err
