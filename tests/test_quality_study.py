"""The study of docs/quality.md on a tiny model: its text, its arms, what they leave."""

import gzip
import json

import pytest
import yaml
from checkpoints import SCRIPTS, load_script, save_checkpoint

WORDS = "every query picks the few blocks that matter to it "


def test_collects_articles_folders_and_texts(tmp_path):
    dump = (
        "<page><title>A &amp; B</title><text>first article</text></page>"
        "<page><title>Old</title><text>#REDIRECT [[A]]</text></page>"
    )
    (tmp_path / "wiki.gz").write_bytes(gzip.compress(dump.encode()))
    tree = tmp_path / "tree"
    for path, text in {"b.py": "b = 2", "a.py": "a = 1", "deep/c.rst": "C", "site-packages/d.py": "d"}.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    (tmp_path / "long.txt").write_text("x" * ((1 << 18) + 5))
    given = {"wikipedia": tmp_path / "wiki.gz", "folders": tree, "texts": tmp_path / "long.txt"}
    arguments = [word for name, path in given.items() for word in (f"--{name}", str(path))]
    load_script("collect_long_text").main([str(tmp_path / "text.jsonl"), *arguments])
    rows = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert sorted((row["source"], row["text"][:40]) for row in rows) == [
        ("long.txt", "x" * 5),
        ("long.txt", "x" * 40),
        ("tree", "a.py\n\na = 1\n\nb.py\n\nb = 2"),
        ("tree", "deep/c.rst\n\nC"),
        ("wiki.gz", "A & B\n\nfirst article"),
    ]


@pytest.mark.parametrize("arguments, message", [([], "nothing to collect"), (["--texts", "none.txt"], "none.txt")])
def test_collecting_says_what_is_missing(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        load_script("collect_long_text").main([str(tmp_path / "text.jsonl"), *arguments])
    assert message in capsys.readouterr().err


def test_arms_share_their_text_and_leave_reports(tmp_path, monkeypatch):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} " + WORDS * 8}) + "\n" for i in range(60)))
    settings = dict(
        model_name_or_path=save_checkpoint(tmp_path / "model"), moba={"block_size": 8, "top_k": 2}, dataset=str(text),
        sequence_length=64, document_mask=False, held_out_share=0.2, held_out_sequences=4, meter_sequences=2,
        trailing_tokens=16, sample_tokens=0, max_steps=10, logging_steps=1, eval_strategy="steps", eval_steps=5,
        recall_steps=5, save_strategy="no", report_to="none", use_cpu=True, learning_rate=1e-3,
    )  # fmt: skip
    (tmp_path / "arm.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.syspath_prepend(SCRIPTS)
    study = load_script("study_quality")
    small = {"block_size": 8, "top_k": 2, "full_attention_layers": [-1]}
    monkeypatch.setattr(
        study, "ARMS", {name: {**arm, "moba": small} for name, arm in study.ARMS.items() if "seed" not in arm}
    )
    arms = ["full", "switch", "hybrid"]
    arguments = ["--folder", str(tmp_path / "runs"), "--config", str(tmp_path / "arm.yaml"), "--arms"]
    folders = study.main(arguments + arms)
    reports = {folder.name: json.loads((folder / "report.json").read_text()) for folder in folders}
    layers = {name: report["history"]["moba_layers"] for name, report in reports.items()}
    assert layers == {"full": [0] * 10, "switch": [2] * 9 + [0], "hybrid": [2] * 10}
    starts = [report["sequence_loss"]["before"]["full"] for report in reports.values()]
    assert len(starts[0]) == 4 and starts[0] == starts[1] == starts[2]
    report = reports["hybrid"]
    assert report["moba_after"]["mean"] == pytest.approx(sum(report["sequence_loss"]["after"]["moba"]) / 4, abs=1e-5)

    monkeypatch.setattr(study, "loading_once", lambda: pytest.fail)
    assert study.main(arguments + arms) == folders  # done: nothing is loaded, nothing trained
