"""The five evaluation scripts end to end on a tiny random model: what they write, that they go on, what they refuse."""

import json
import math

import pytest
import torch
from checkpoints import byte_tokenizer, load_script, save_checkpoint
from models import tiny_config, tiny_model

from moba_hf import cli
from moba_hf.evaluation import checkpoint, needle, position_loss, recall, ruler
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
    settings = script.main(arguments(*text[:4], "--hybrid_layers", "-2", "-1"))["settings"]
    assert settings["trailing_tokens"] == 75, "by default a quarter of the length"


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


def test_recall(material, arguments, tmp_path, capsys):
    script = load_script("eval_recall")
    text = ["--dataset", str(material / "text"), "--length", "200", "--sequences", "2", "--queries", "50"]
    report = script.main(arguments(*text, "--suggest", "1"))
    assert sorted(report["layers"]) == ["0", "1", "2"] and len(report["layers"]["0"]["selected"]) == 4
    assert 0 < report["mean"]["selected"] <= report["mean"]["best"] <= 1
    means = {layer: sum(of["selected"]) for layer, of in report["layers"].items()}
    assert report["suggestion"]["layers"] == (int(min(means, key=means.get)),)
    said = capsys.readouterr().out
    assert "Suggested full_attention_layers: [" in said and "lowest mean recall over heads" in said
    assert (tmp_path / "out" / "recall.png").stat().st_size > 5000


# ---- outputs of another run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module", "function", "line", "more", "calls", "other"),
    [
        ("eval_position_loss", position_loss, "token_losses", ["--length", "100"], ["--sequences", "3"], (6, 3),
         ["--hybrid_layers", "0"]),
        ("eval_granularity", position_loss, "token_losses", ["--length", "128", "--splits", "2/8"],
         ["--splits", "2/8", "4/16"], (4, 2), ["--length", "120"]),
        ("eval_recall", recall, "measure", ["--length", "100", "--suggest", "1"],
         ["--sequences", "3", "--suggest", "2"], (2, 1), ["--queries", "9"]),
    ],
)  # fmt: skip
def test_runs_go_on_and_keep_those_of_other_settings(
    name, module, function, line, more, calls, other, material, arguments, tmp_path, monkeypatch
):
    script, original, made = load_script(name), getattr(module, function), []
    stop_after = 1

    def counting(*given, **options):
        if len(made) >= stop_after:
            raise KeyboardInterrupt
        made.append(name)
        return original(*given, **options)

    monkeypatch.setattr(module, function, counting)
    line = arguments("--dataset", str(material / "text"), "--sequences", "2", *line)
    with pytest.raises(KeyboardInterrupt):
        script.main(line)
    stop_after = 100
    first = script.main(line)
    assert len(made) == calls[0], "what was measured before the interruption is not measured again"
    assert script.main(line) == first and len(made) == calls[0]
    script.main([*line, *more])
    assert len(made) == sum(calls), "what is asked for in addition joins the log"
    files = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(
        ValueError, match=rf"holds results of another run \({other[0][2:]} was .* and now is .*output_dir"
    ):
        script.main([*line, *other])
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    made.clear()
    fresh = arguments(*line[4:], "--output_dir", str(tmp_path / "fresh"))
    assert script.main(fresh) == first, "an interruption changes nothing"


def test_another_model_in_the_same_folder_is_another_run(material, arguments, tmp_path):
    script, line = load_script("eval_granularity"), ["--dataset", str(material / "text"), "--length", "128"]
    line = arguments(*line, "--sequences", "1", "--splits", "2/8", "--model_name_or_path", str(tmp_path / "model"))
    for seed in (0, 1):
        model = tiny_model(vocab_size=257, max_position_embeddings=2048)
        torch.nn.init.normal_(model.model.norm.weight, generator=torch.Generator().manual_seed(seed))
        model.save_pretrained(tmp_path / "model")
        byte_tokenizer().save_pretrained(tmp_path / "model")
        if seed == 0:
            script.main(line)
    with pytest.raises(ValueError, match="weights was '.*' and now is '"):
        script.main(line)


# ---- refusals, before the weights are loaded -------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    """Whatever loads a model's weights fails the test."""

    def loads(*_, **__):
        raise AssertionError("the weights were loaded before the arguments were checked")

    monkeypatch.setattr(checkpoint.AutoModelForCausalLM, "from_pretrained", loads)


def needs_words(*more):
    return ("--words", "words.txt", *more)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("eval_needle", ["--lengths", "4096"], "length 4096 is above the model's 2048 positions"),
        ("eval_ruler", needs_words("--lengths", "4096"), "length 4096 is above the model's 2048 positions"),
        ("eval_position_loss", ["--length", "4096"], "length 4096 is above the model's 2048 positions"),
        ("eval_granularity", ["--length", "4096"], "length 4096 is above the model's 2048 positions"),
        ("eval_recall", ["--length", "4096"], "length 4096 is above the model's 2048 positions"),
        ("eval_needle", ["--haystack", "empty.txt", "--lengths", "400"], "haystack is empty"),
        ("eval_needle", ["--lengths", "400", "90"], r"lengths must be at least \d+, for question.*but one is 90"),
        ("eval_needle", ["--batch_size", "0"], "batch_size must be at least 1, but was 0"),
        ("eval_needle", ["--batch_size", "-1"], "batch_size must be at least 1, but was -1"),
        ("eval_needle", ["--prefill_chunk_size", "0"], "prefill_chunk_size must be at least 1, but was 0"),
        ("eval_needle", ["--depths", "0", "0"], "depths must be different numbers"),
        ("eval_ruler", needs_words("--batch_size", "0"), "batch_size must be at least 1, but was 0"),
        ("eval_ruler", needs_words("--batch_size", "-1"), "batch_size must be at least 1, but was -1"),
        ("eval_ruler", needs_words("--samples", "0"), "samples must be at least 1, but was 0"),
        ("eval_ruler", needs_words("--lengths", "9", "9"), r"lengths must be different ones.*but were \[9, 9\]"),
        ("eval_ruler", needs_words("--tasks", "nih"), "unknown RULER task: nih; the tasks are all, niah_single_1"),
        ("eval_ruler", needs_words("--tasks", "qa_1"), "qa_1 needs the SQuAD 2.0"),
        ("eval_ruler", needs_words("--lengths", "2000", "900", "--tasks", "fwe", "vt", "cwe", "--samples", "2"),
         r"lengths: cwe needs 1677 tokens and has 900; take longer ones, or name the tasks that fit"),
        ("eval_ruler", needs_words("--lengths", "300", "--tasks", "vt", "cwe", "--samples", "2"),
         r"lengths: vt needs \d+ tokens and has 300; cwe needs \d+ tokens and has 300; take longer ones"),
        ("eval_position_loss", ["--hybrid_layers", "-1", "99"], r"hybrid_layers must lie in -3 … 2 .*had \[99\]"),
        ("eval_position_loss", ["--hybrid_layers", "-4"], r"hybrid_layers must lie in -3 … 2 .*had \[-4\]"),
        ("eval_position_loss", ["--trailing_tokens", "100"], "trailing_tokens must be at least 1 and at most 99"),
        ("eval_position_loss", ["--sequences", "0"], "sequences must be at least 1, but was 0"),
        ("eval_position_loss", ["--window", "0"], "window must be at least 1, but was 0"),
        ("eval_position_loss", ["--length", "1000"], "none of the 4 documents has 1000 tokens"),
        ("eval_granularity", ["--splits", "9/8"], "as in 2/8, but was '9/8'"),
        ("eval_granularity", ["--splits", "2/7"], "cannot be cut into 7 equal blocks"),
        ("eval_granularity", ["--length", "1"], "length must be at least 2, but was 1"),
        ("eval_recall", ["--suggest", "4"], r"suggest must be 1 … 3, .*but was 4"),
        ("eval_recall", ["--suggest", "0"], "suggest must be at least 1, but was 0"),
        ("eval_recall", ["--length", "64"], "= 64 covers all 64 tokens"),
        *[(name, ["--moba", '{"top_k": 4'], r"moba must be JSON, as in .*but was '\{\"top_k\": 4' \(.*line 1 column")
          for name in ("eval_needle", "eval_ruler", "eval_position_loss", "eval_granularity", "eval_recall")],
    ],
)  # fmt: skip
def test_refused_before_any_work(name, more, message, material, arguments, monkeypatch, no_weights):
    monkeypatch.chdir(material)
    of_text = name in ("eval_position_loss", "eval_granularity", "eval_recall")
    line = arguments(*(["--dataset", "text", "--length", "100"] if of_text else []), *more)
    with pytest.raises(ValueError, match=message):
        load_script(name).main(line)


def test_layers_that_slide_are_not_suggested(tmp_path, arguments, material, no_weights):
    """Gemma 3 has one full layer in so many: only those can be measured."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = tiny_config("gemma3_text", num_hidden_layers=3, layer_types=kinds, sliding_window=8, vocab_size=257)
    config.save_pretrained(tmp_path / "sliding")
    line = arguments("--dataset", str(material / "text"), "--length", "100", "--suggest", "2")
    with pytest.raises(ValueError, match="suggest must be 1 … 1, the layers that can be measured, but was 2"):
        load_script("eval_recall").main([*line, "--model_name_or_path", str(tmp_path / "sliding")])


def test_without_moba_settings(material, tmp_path, arguments, monkeypatch):
    plain = save_checkpoint(tmp_path / "plain", positions=2048)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    del config["moba"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(material)
    line = arguments("--model_name_or_path", plain)
    text = ["--dataset", "text", "--length", "128", "--trailing_tokens", "8"]
    asked = {"eval_needle": needle_line(material), "eval_ruler": needs_words("--lengths", "2000", "--samples", "1"),
             "eval_position_loss": text, "eval_recall": text[:4]}  # fmt: skip
    for name, more in asked.items():
        with pytest.raises(ValueError, match=r"no MoBA settings.*--moba"):
            load_script(name).main([*line, *more])
    given = ["--lengths", "400", "--new_tokens", "1", "--moba", '{"block_size": 8, "top_k": 2}']
    report = load_script("eval_needle").main([*line, *asked["eval_needle"], *given])
    assert report["settings"]["moba"]["block_size"] == 8
    load_script("eval_granularity").main([*line, *text, "--splits", "2/8"])  # brings settings of its own


def test_missing_files(arguments, no_weights):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_script("eval_needle").main(arguments("--haystack", "missing.txt", "--lengths", "400"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_script("eval_recall").main(arguments("--dataset", "missing.txt", "--length", "100"))


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
