"""Data sets of the hub, through the real `datasets` and `huggingface_hub`, from a hub on this machine (hub.py)."""

import io
import json
import os
import subprocess
import sys

import pyarrow
import pytest
from checkpoints import SCRIPTS
from hub import COMMIT, hub
from pyarrow import parquet
from training_runs import config_file, make_material

CARD = b"""---
configs:
- {config_name: short, default: true, data_files: [{split: train, path: short/*.parquet}]}
- {config_name: long, data_files: [{split: train, path: long/a.parquet}, {split: validation, path: long/b.parquet}]}
---
"""


def jsonl(texts) -> bytes:
    return "\n".join(json.dumps({"text": text}) for text in texts).encode()


def table(**columns) -> bytes:
    written = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), written)
    return written.getvalue()


STORIES = {
    "README.md": CARD,
    "short/1.parquet": table(text=["one", "two"]),
    "short/2.parquet": table(text=["three"]),
    "long/a.parquet": table(words=["four " * 9, "five " * 9]),
    "long/b.parquet": table(words=["six"]),
}
TEXTS = [" ".join(f"{n}-{i}" for i in range(40)) for n in range(24)]
PLAIN = {"data/train-1.jsonl": jsonl(TEXTS[:20]), "data/train-2.jsonl": jsonl(TEXTS[20:])}


@pytest.fixture
def run(tmp_path):
    """A function that runs Python in a process of its own, whose hub is ours; (what it printed, what was asked)."""
    with hub({"ours/stories": STORIES, "ours/plain": PLAIN}) as (address, asked):
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}

        def run(*command: str):
            environment = {**os.environ, **settings}
            done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout, asked

        yield run


READ = """
import json
from moba_hf.training.sources import Reading, read_documents
readings = {}
stories = {"dataset": "ours/stories", "config": "long", "text_column": "words", "weight": 3}
mixture = [stories, {"dataset": "ours/plain"}]
found = {
    "default": list(read_documents("ours/stories")),
    "long": list(read_documents("ours/stories", config="long", text_column="words")),
    "validation": list(read_documents("ours/stories", config="long", split="validation", text_column="words")),
    "plain": list(read_documents("ours/plain")),
    "mixture": len(list(read_documents(mixture, readings=readings))),
}
found["readings"] = {name: [reading.rows, reading.characters] for name, reading in readings.items()}
for name, how in (("nobody/nothing", {}), ("ours/stories", {"config": "none"}), ("ours/plain", {"split": "none"})):
    try:
        list(read_documents(name, **how))
    except Exception as error:
        found[f"{name} {how}"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def test_configs_splits_columns_and_mixtures(run):
    """Parquet files in configs and splits, JSON lines in two files, another column, a mixture; what is not there."""
    printed, asked = run("-c", READ)
    found = json.loads(printed)
    assert found["default"] == ["one", "two", "three"] and found["plain"] == TEXTS
    assert found["long"] == ["four " * 9, "five " * 9] and found["validation"] == ["six"]
    (long_rows, long), (plain_rows, plain) = found["readings"].values()
    assert found["mixture"] == long_rows + plain_rows and plain_rows >= len(TEXTS)
    assert long == pytest.approx(3 * plain, abs=3 * max(map(len, TEXTS)))
    assert "'nobody/nothing' doesn't exist on the Hub" in found["nobody/nothing {}"]
    assert "'none' not found" in found["ours/stories {'config': 'none'}"]
    assert "Bad split: none" in found["ours/plain {'split': 'none'}"]
    assert f"GET /datasets/ours/stories/resolve/{COMMIT}/long/b.parquet" in asked


@pytest.mark.parametrize("streaming", [True, False])
def test_training_reads_the_hub(run, tmp_path, streaming):
    """scripts/continue_pretrain.py itself."""
    config = config_file(make_material(tmp_path), tmp_path, dataset="ours/plain", streaming=streaming, max_steps=2)
    _, asked = run(str(SCRIPTS / "continue_pretrain.py"), "--config", config)
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert report["steps"] == 2 and report["data"]["sources"]["ours/plain"]["rows"] > 0
    assert report["moba_after"]["mean"] < report["moba_before"]["mean"]
    assert f"GET /datasets/ours/plain/resolve/{COMMIT}/data/train-1.jsonl" in asked
