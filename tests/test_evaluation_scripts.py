"""The five evaluation scripts end to end on a tiny random model: what they write, that they go on, what they refuse."""

import json
import math

import pytest
import torch
from checkpoints import load_script, save_checkpoint

from moba_hf import cli
from moba_hf.evaluation import needle, ruler
from moba_hf.evaluation.ruler import words_of

MOBA = {"block_size": 32, "top_k": 2}
PROSE = "The cat sat on the mat. It saw a dog, and the dog ran to the gate! Where did it go? Nobody knows. "


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a checkpoint, a text of several documents, and words."""
    folder = tmp_path_factory.mktemp("material")
    save_checkpoint(folder / "model", positions=2048, moba=MOBA)
    (folder / "text").mkdir()
    for i, times in enumerate((2, 4, 6, 1)):  # 200, 400, 600 and 100 tokens
        (folder / "text" / f"{i}.txt").write_text((PROSE * 9)[i : i + 100 * times])
    (folder / "empty.txt").write_text("  \n")
    (folder / "words.txt").write_text(" ".join(f"{a}{b}{c}ing" for a in "bcdfg" for b in "aeiou" for c in "lmnrst"))
    return folder


@pytest.fixture
def arguments(material, tmp_path):
    """The command line that every script here takes, and more of it."""

    def line(*more: str) -> list[str]:
        return ["--model_name_or_path", str(material / "model"), "--output_dir", str(tmp_path / "out"), *more]

    return line


def needle_line(material, *more):
    return ["--lengths", "400", "480", "--depths", "0", "50", "100", "--haystack", str(material / "text"), *more]


def test_needle(material, arguments, tmp_path, monkeypatch):
    script = load_script("eval_needle")
    line = arguments(*needle_line(material, "--new_tokens", "3", "--batch_size", "2"))
    asked, stop_after = [], 5
    original = needle.continuations

    def counting(model, tokenizer, prompts, **options):
        if len(asked) >= stop_after:
            raise KeyboardInterrupt
        asked.append((model.config._attn_implementation, len(prompts[0])))
        return original(model, tokenizer, prompts, **options)

    monkeypatch.setattr(needle, "continuations", counting)
    with pytest.raises(KeyboardInterrupt):
        script.main(line)
    stop_after = 100
    report = script.main(line)
    # 3 depths in batches of 2, per mode and length: 8 calls in all, none of them twice
    assert asked == [(mode, n) for n in (397, 477) for mode in ("sdpa", "moba") for _ in range(2)]
    assert json.loads((tmp_path / "out" / "needle.json").read_text()) == json.loads(json.dumps(report))
    assert len(report["cells"]) == 12 and {c["score"] for c in report["cells"]} == {0.0}
    assert report["found"] == {"full": 0.0, "moba": 0.0} and report["haystack_tokens"] == 1306
    assert (tmp_path / "out" / "needle.png").stat().st_size > 5000
    assert script.main(line)["cells"] == report["cells"] and len(asked) == 8
    assert len(script.main([*line, "--depths", "0", "25"])["cells"]) == 8 and len(asked) == 12  # a new depth joins
    with pytest.raises(ValueError, match="seed was 0 and now is 1"):
        script.main([*line, "--seed", "1"])


def test_chunked_prefill_and_batches_change_nothing(material):
    """Full attention: chunks and batches are ways to save memory, not other measurements."""
    from moba_hf.evaluation.checkpoint import load
    from moba_hf.evaluation.generation import continuations

    model, tokenizer = load(str(material / "model"), longest=300)
    prompts = [torch.arange(1, 1 + n).remainder(200).add(1).tolist() for n in (200, 150)]
    for implementation in ("sdpa", "moba"):
        model.set_attn_implementation(implementation)
        alone = [continuations(model, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]
        assert continuations(model, tokenizer, prompts, max_new_tokens=6) == alone
        assert continuations(model, tokenizer, prompts, max_new_tokens=6, prefill_chunk_size=64) == alone


def test_ruler(material, arguments, tmp_path, capsys, monkeypatch):
    script, asked = load_script("eval_ruler"), []
    original = ruler.continuations

    def short(*given, max_new_tokens, **options):
        asked.append(max_new_tokens)
        return original(*given, max_new_tokens=2, **options)

    monkeypatch.setattr(ruler, "continuations", short)
    words = ["--words", str(material / "words.txt"), "--lengths", "2000", "--samples", "1"]
    report = script.main(arguments(*words, "--tasks", "all"))
    said = capsys.readouterr().out
    assert sorted(report["not_run"]) == sorted(
        ["niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery", "qa_1", "qa_2"]
    )
    assert all(f"Not run: {name}, which needs" in said for name in report["not_run"])
    assert len(report["answers"]) == 6 * 2
    assert asked == [128] * 6 + [30] * 2 + [120] * 2 + [50] * 2  # three needle tasks, vt, cwe, fwe, in both modes
    assert all(a["tokens"] + report["tasks"][a["task"]]["new_tokens"] <= 2000 for a in report["answers"])
    assert set(report["scores"]) == {"full", "moba"} and report["tasks"]["vt"] == {
        "new_tokens": 30,
        "chains": 1,
        "hops": 4,
    }
    assert json.loads((tmp_path / "out" / "ruler.json").read_text())["not_run"] == report["not_run"]
    assert (tmp_path / "out" / "ruler.png").stat().st_size > 5000


def test_position_loss(material, arguments, tmp_path, capsys):
    script = load_script("eval_position_loss")
    text = ["--dataset", str(material / "text"), "--length", "300", "--trailing_tokens", "100", "--window", "50"]
    report = script.main(arguments(*text, "--hybrid_layers", "-2", "-1"))
    assert report["sequences"] == 3 and report["documents_too_short"] == 2  # 400 and 2 · 300; 200 and 100
    assert [len(curve) for curve in report["by_position"].values()] == [6, 6, 6]
    assert len({loss["mean"] for loss in report["loss"].values()}) == 3
    assert "2 documents were shorter than 300 tokens" in capsys.readouterr().out
    assert (tmp_path / "out" / "position_loss.png").stat().st_size > 5000
    settings = script.main(arguments(*text[:4]))["settings"]
    assert settings["trailing_tokens"] == 75, "by default a quarter of the length"
    with pytest.raises(ValueError, match="none of the 4 documents has 1000 tokens"):
        script.main(arguments(*text[:2], "--length", "1000", "--trailing_tokens", "10"))
    with pytest.raises(ValueError, match="trailing_tokens must be at least 1 and at most 299, but was 300"):
        script.main(arguments(*text[:4], "--trailing_tokens", "300"))
    with pytest.raises(ValueError, match="full_attention_layers must lie in -3 … 2"):
        script.main(arguments(*text, "--hybrid_layers", "3"))


def test_granularity(material, arguments, tmp_path):
    script = load_script("eval_granularity")
    text = ["--dataset", str(material / "text"), "--length", "128", "--sequences", "2", "--trailing_tokens", "32"]
    report = script.main(arguments(*text, "--splits", "2/8", "8/32", "4/4"))
    assert report["sparsity"] == {"2/8": 0.75, "8/32": 0.75, "4/4": 0.0}
    losses = report["loss"]
    assert losses["4/4"] == pytest.approx(losses["full"])  # all blocks: full attention
    assert losses["2/8"]["mean"] != losses["8/32"]["mean"] and all(math.isfinite(x["mean"]) for x in losses.values())
    assert (tmp_path / "out" / "granularity.png").stat().st_size > 5000
    default = script.main(arguments(*text[:6], "--splits", "2/8"))["settings"]["trailing_tokens"]
    assert default == 32, "a quarter of the length"
    for wrong, message in (("9/8", "as in 2/8, but was '9/8'"), ("2/7", "cannot be cut into 7 equal blocks")):
        with pytest.raises(ValueError, match=message):
            script.main(arguments(*text, "--splits", wrong))


def test_recall(material, arguments, tmp_path, capsys):
    script = load_script("eval_recall")
    text = ["--dataset", str(material / "text"), "--length", "200", "--sequences", "2", "--queries", "50"]
    report = script.main(arguments(*text, "--suggest", "1"))
    assert sorted(report["layers"]) == [0, 1, 2] and len(report["layers"][0]["selected"]) == 4
    assert 0 < report["mean"]["selected"] <= report["mean"]["best"] <= 1
    means = {layer: sum(of["selected"]) for layer, of in report["layers"].items()}
    assert report["suggestion"]["layers"] == (min(means, key=means.get),)
    said = capsys.readouterr().out
    assert "Suggested full_attention_layers: [" in said and "lowest mean recall over heads" in said
    assert (tmp_path / "out" / "recall.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="= 64 covers all 12 tokens"):
        script.main(arguments("--dataset", str(material / "text"), "--length", "12"))


# ---- refusals that all scripts share -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("eval_needle", ["--lengths", "4096"]),
        ("eval_ruler", ["--lengths", "4096", "--words", "words.txt"]),
        ("eval_position_loss", ["--length", "4096"]),
        ("eval_granularity", ["--length", "4096"]),
        ("eval_recall", ["--length", "4096"]),
    ],
)
def test_beyond_the_models_positions(name, more, material, arguments, monkeypatch):
    monkeypatch.chdir(material)
    with pytest.raises(ValueError, match="length 4096 is above the model's 2048 positions"):
        load_script(name).main(arguments(*more))


def test_without_moba_settings_and_without_text(material, tmp_path, arguments):
    plain = save_checkpoint(tmp_path / "plain", positions=2048)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    del config["moba"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    script = load_script("eval_needle")
    line = ["--model_name_or_path", plain, "--output_dir", str(tmp_path / "out"), *needle_line(material)]
    with pytest.raises(ValueError, match=r"no MoBA settings.*--moba"):
        script.main(line)
    report = script.main([*line, "--lengths", "400", "--new_tokens", "1", "--moba", '{"block_size": 8, "top_k": 2}'])
    assert report["settings"]["moba"]["block_size"] == 8
    with pytest.raises(ValueError, match="haystack is empty"):
        script.main(arguments(*needle_line(material), "--haystack", str(material / "empty.txt")))
    with pytest.raises(FileNotFoundError, match="no such file"):
        script.main(arguments("--haystack", "missing.txt", "--lengths", "400"))
    granularity = ["--dataset", str(material / "text"), "--length", "128", "--trailing_tokens", "8", "--splits", "2/8"]
    load_script("eval_granularity").main(["--model_name_or_path", plain, *line[2:4], *granularity])


def test_words_of():
    assert words_of("Alpha beta, gamma-delta beta 9tree it extraordinarily") == ("beta", "delta", "gamma")


# ---- lm-eval -------------------------------------------------------------------------------------------------------


def test_lm_eval_is_handed_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").touch()
    (tmp_path / "lm_eval" / "__main__.py").write_text("import sys\ndef cli_evaluate(): print(*sys.argv, sep='|')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("lm_eval", "lm_eval.__main__"):
        monkeypatch.delitem(cli.sys.modules, name, raising=False)
    former = list(cli.sys.argv)
    assert cli.main(["lm-eval", "--help", "--model_args", "pretrained=x,attn_implementation=moba", "ls", "tasks"]) == 0
    said = capsys.readouterr().out.strip()
    assert said == "moba-hf lm-eval|--help|--model_args|pretrained=x,attn_implementation=moba|ls|tasks"
    assert cli.sys.argv == former


def test_lm_eval_missing(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["lm-eval", "--tasks", "x"]) == 2
    assert 'pip install "moba_hf[eval]"' in capsys.readouterr().err
