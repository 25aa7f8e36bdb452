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
    tiny = {name: {**arm, "moba": small} for name, arm in study.ARMS.items() if "seed" not in arm}
    few = {"start": "hybrid", "answer": 16, "max_steps": 4, "warmup_steps": 1, "eval_steps": 2, "recall_steps": 2}
    tiny["masked-1"] |= few | {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 1},
    }
    monkeypatch.setattr(study, "ARMS", tiny)
    arms = ["full", "switch", "hybrid", "masked-1"]
    arguments = ["--folder", str(tmp_path / "runs"), "--config", str(tmp_path / "arm.yaml"), "--arms"]
    folders = study.main(arguments + arms)
    reports = {folder.name: json.loads((folder / "report.json").read_text()) for folder in folders}
    layers = {name: report["history"]["moba_layers"] for name, report in reports.items()}
    assert layers == {"full": [0] * 10, "switch": [2] * 9 + [0], "hybrid": [2] * 10, "masked-1": [2] * 4}
    starts = [reports[name]["sequence_loss"]["before"]["full"] for name in arms[:3]]
    assert len(starts[0]) == 4 and starts[0] == starts[1] == starts[2]
    found, left = reports["masked-1"]["sequence_loss"]["before"], reports["hybrid"]["sequence_loss"]["after"]
    assert found["moba"] == pytest.approx(left["moba"], abs=1e-5) and found["full"] != pytest.approx(
        starts[0], abs=1e-3
    )
    report = reports["hybrid"]
    assert report["moba_after"]["mean"] == pytest.approx(sum(report["sequence_loss"]["after"]["moba"]) / 4, abs=1e-5)

    assert [entry["step"] for entry in report["evaluations"]] == [5, 10]
    assert {"full_mean", "moba_trailing", "recall"} <= report["evaluations"][0].keys()

    monkeypatch.setattr(study, "loading_once", lambda: pytest.fail)
    assert study.main(arguments + arms) == folders  # done: nothing is loaded, nothing trained


def test_answers_alone_carry_loss():
    """Of the training sequences; held-out text and the text that the arms share are left as they are."""
    row = {"input_ids": [1, 2, 3, 2, 2], "labels": [1, 2, 3, 2, -100], "position_ids": [0, 1, 2, 3, 4]}
    study = load_script("study_quality")
    held_out, rows, count = study.answers_only(lambda *arguments: (arguments, [row], "count"), 2)("a", "b")
    assert (held_out, count, len(rows)) == (("a", "b"), "count", 1)
    assert {name: list(values) for name, values in rows[0].items()} == {**row, "labels": [-100, -100, -100, 2, -100]}
    assert row["labels"] == [1, 2, 3, 2, -100]


def test_masked_arms_keep_the_last_layers_full():
    arms = load_script("study_quality").ARMS
    full = {name: len(arm["moba"]["full_attention_layers"]) for name, arm in arms.items() if "answer" in arm}
    assert full == {"masked-0": 0, "masked-1": 1, "masked-3": 3, "masked-5": 5, "masked-10": 10,
                    "masked-30": 0, "masked-full": 0}  # fmt: skip
    assert arms["masked-3"]["moba"]["full_attention_layers"] == [-3, -2, -1]
    starts = {name: arms[name]["start"] for name in full}
    assert set(starts.values()) == {"moba", "full"} and starts["masked-full"] == "full"


def arm(full: float, moba: float, moba_tokens: int) -> dict:
    losses = {"full": [full, full], "moba": [moba, moba]}
    after = {mode: {"mean": loss, "trailing": loss + 0.5} for mode, (loss, _) in losses.items()}
    evaluations = [{"step": 1, "full_mean": full, "moba_mean": moba, "recall": 0.5}]
    return {
        "steps": 1, "trained_tokens": 100, "moba_tokens": moba_tokens, "tokens_per_second": 2500.0,
        **{f"{mode}_{when}": loss for mode, loss in after.items() for when in ("before", "after")},
        "position_loss": {"after": {"ends": [8, 16], **losses}}, "evaluations": evaluations,
        "history": {"moba_layers": [2, 2 if moba_tokens == 100 else 0]}, "data": "left out",
    }  # fmt: skip


def test_the_summary_holds_each_arm_against_full_attention(tmp_path):
    """That of the same training, in the attention that an arm ends in; the file that it writes says as much as the
    folder."""
    arms = {"full": arm(2.0, 3.0, 0), "moba": arm(2.25, 2.5, 100), "switch": arm(2.125, 2.75, 90)}
    arms |= {"hybrid-low-rate": arm(2.0, 2.25, 100), "masked-10": arm(2.0, 2.125, 100), "masked-full": arm(2.0, 3.0, 0)}
    for name, report in arms.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    summarize = load_script("summarize_quality")
    text = summarize.main([str(tmp_path), "--json", str(tmp_path / "arms.json")])
    assert text.splitlines()[2:] == [
        "| full | full | 2.0000 | 2.5000 |  | 2K |",
        "| hybrid-low-rate | moba | 2.2500 | 2.7500 |  | 2K |",
        "| masked-10 | moba | 2.1250 | 2.6250 | +0.1250 / +0.1250 | 2K |",
        "| masked-full | full | 2.0000 | 2.5000 |  | 2K |",
        "| moba | moba | 2.5000 | 3.0000 | +0.5000 / +0.5000 | 2K |",
        "| switch | full | 2.1250 | 2.6250 | +0.1250 / +0.1250 | 2K |",
    ]
    *_, panel = summarize.figure(arms).axes
    assert [list(line.get_xdata()) for line in panel.lines] == [[10], [10], [0, 1]]
    assert "left out" not in (tmp_path / "arms.json").read_text()
    assert summarize.main([str(tmp_path / "arms.json"), "--figure", str(tmp_path / "again.png")]) == text
    assert (tmp_path / "quality.png").stat().st_size and (tmp_path / "again.png").stat().st_size


def test_the_summary_needs_the_arm_full(tmp_path, capsys):
    with pytest.raises(SystemExit):
        load_script("summarize_quality").main([str(tmp_path)])
    assert "arm full" in capsys.readouterr().err
