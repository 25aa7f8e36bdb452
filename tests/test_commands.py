"""Every command of the pages and notebooks is run here on a tiny model, or marked as needing a GPU.

bash itself reads the commands of a page, with `python`, `make` and the like replaced by functions that only write down
what they were given. What was written down is then run: the same script with the same options, and a few more after
them that make it short (SHORTER; as few as will do, because the options that they replace are not tried). Three kinds
are not run: those marked "needs a GPU", those that another test runs (ELSEWHERE), and those that set something up
(SET_UP).
"""

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import SCRIPTS, byte_tokenizer, load_script, save_checkpoint
from test_docs import PAGES, ROOT
from training_runs import CHAT

from moba_hf import cli

pytestmark = pytest.mark.skipif(not (shutil.which("bash") and shutil.which("make")), reason="needs bash and make")

TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
for _file in sorted((ROOT / "notebooks").glob("*.ipynb")):
    _cells = json.loads(_file.read_text(encoding="utf-8"))["cells"]
    TEXTS[_file] = "\n\n".join("".join(cell["source"]) for cell in _cells if cell["cell_type"] == "markdown")
READERS = pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))

MARK = re.compile(r"needs (a|\d+) GPUs?\b")
PROGRAMS = ("python", "accelerate", "torchrun", "moba-hf", "make", "pip", "jupyter", "mkdir", "cp", "source")
# a command in running text: a program and what it is given
INLINE = re.compile(r"(?<!`)`((?:python scripts|torchrun|accelerate launch -|moba-hf |make |pip install)[^`]*)`(?!`)")

SHORTER = {
    "continue_pretrain": "--max_steps 2 --held_out_sequences 1 --meter_sequences 1 --eval_steps 2 --save_steps 2",
    "sft": "--max_steps 1 --held_out_sequences 1",
    "eval_needle": "--new_tokens 2",
    "eval_ruler": "--samples 1 --tasks vt --words words.txt",
    "eval_position_loss": "--sequences 1",
    "eval_granularity": "--sequences 1",
    "eval_recall": "--sequences 1",
    "benchmark_attention": "--lengths 256 --block-size 32 --rounds 1 --threads 1 --others",
    "benchmark_decode": "--model runs/demo/model --gguf-file= --length 2048 --rounds 1 --tokens 2",
    "draw_moba": "--model runs/demo/model --gguf_file= --layer 1 --head 0 --output story.png",
}
ELSEWHERE = {  # script: the test that runs it
    "bench_check": "test_bench_check.py::test_what_was_just_stored_passes",
    "collect_long_text": "test_quality_study.py::test_collects_articles_folders_and_texts",
    "compile_kernels": "test_compile_kernels.py::test_kernels_compile_within_their_gates",
    "summarize_quality": "test_quality_study.py::test_the_summary_holds_each_arm_against_full_attention",
    "summarize_rehearsal": "test_rehearsal.py::test_summary",
}
SET_UP = {  # what a command begins with: why it is not run
    "make test": "it runs this suite",
    "make test-oldest": "it runs this suite",
    "make lint": "it judges the sources, and CI runs it",
    "make ci": ".ci/run runs this suite",
    "pip install": "it needs a network; its extras are looked up by test_extras_exist",
    "jupyter lab": "it waits for a reader; tests/test_notebooks.py runs the notebooks",
    "source .venv/bin/activate": "the tests run in that environment",
    "mkdir -p": "the files it makes room for are there",
    "cp docs/*.md": "the files it copies are there",
}


def given(text: str) -> list[tuple[str, ...]]:
    """What bash hands to programs in these lines: loops, variables and quotes resolved, marked lines left out."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if not MARK.search(line)]
    lines = ["make ci" if line.startswith(".ci/run") else line for line in lines]  # no name for a function
    functions = [f"{name}() {{ printf '%s\\037' {name} \"$@\"; echo; }}" for name in PROGRAMS]
    code = "\n".join([*functions, *lines])
    ran = subprocess.run(["bash", "-euc", code], capture_output=True, text=True, cwd=ROOT / "configs")
    assert ran.returncode == 0, ran.stderr
    return [tuple(line.rstrip("\x1f").split("\x1f")) for line in ran.stdout.splitlines()]


@functools.cache
def commands(page: Path) -> list[tuple[str, ...]]:
    """Every command of a page, those that are marked left out: of its bash blocks, and in running text."""
    lines = re.findall(r"```bash\n(.*?)```", TEXTS[page], re.S)
    for paragraph in re.split(r"\n\s*\n|\n(?=[|-] )", re.sub(r"```.*?```", "", TEXTS[page], flags=re.S)):
        if not MARK.search(paragraph):
            lines += [" ".join(command.split()) for command in INLINE.findall(paragraph)]
    return given("\n".join(lines))


def made(target: str) -> list[tuple[str, ...]]:
    """The scripts that a make target runs."""
    ran = subprocess.run(["make", "-nB", target], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.replace(".venv/bin/", "") for line in ran.stdout.splitlines() if "scripts/" in line]
    return given("\n".join(lines))


def runnable() -> list[tuple[str, ...]]:
    """Every command once, make targets as the scripts they run, without what SET_UP and ELSEWHERE name."""
    found = {}
    for page in TEXTS:
        for command in commands(page):
            if " ".join(command[:2]) not in SET_UP:
                for one in made(command[1]) if command[0] == "make" else [command]:
                    if Path(one[1]).stem not in ELSEWHERE:
                        found[one] = None
    return list(found)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Like a checkout in which everything ran, but all its models are tiny, the published one of its configs too."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for config in (tmp_path / "configs").rglob("*.yaml"):
        text = re.sub(r"^model_name_or_path: package:.*\ngguf_file: .*$", "model_name_or_path: runs/demo/model",
                      config.read_text(encoding="utf-8"), flags=re.M)  # fmt: skip
        config.write_text(text, encoding="utf-8")
    for name in ("demo", "rehearsal/1k", "rehearsal/2k", "rehearsal/2k-moba"):
        save_checkpoint(tmp_path / "runs" / name / "model", moba={"block_size": 64, "top_k": 4})
        byte_tokenizer(CHAT).save_pretrained(tmp_path / "runs" / name / "model")
    (tmp_path / "runs" / "text").mkdir()
    for page in (ROOT / "docs").glob("*.md"):
        shutil.copy(page, tmp_path / "runs" / "text")
    words = " ".join(f"{a}{b}{c}ing" for a in "bcdfg" for b in "aeiou" for c in "lmnrst")
    (tmp_path / "words.txt").write_text(words, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def lm_eval(tmp_path, monkeypatch):
    """A stand-in that is handed the command line."""
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").touch()
    (tmp_path / "lm_eval" / "__main__.py").write_text("def cli_evaluate(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("lm_eval", "lm_eval.__main__"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("command", runnable(), ids=lambda command: " ".join(command)[:110])
def test_runs(command, checkout, lm_eval, monkeypatch):
    if command[0] == "moba-hf":
        assert cli.main(list(command[1:])) == 0
        return
    assert command[0] == "python", f"{command} is neither run, nor marked as needing a GPU, nor named in SET_UP"
    name, options = Path(command[1]).stem, list(command[2:])
    script, threads = load_script(name), torch.get_num_threads()
    if name == "benchmark_attention":  # a process for each peak; tests/test_benchmark_attention.py starts them
        monkeypatch.setattr(script, "peak_mb", lambda *_: 1.0)
    try:
        script.main(options + ([] if "--plan" in options else SHORTER[name].split()))
    finally:
        torch.set_num_threads(threads)


@READERS
def test_every_command_is_run_or_marked(page):
    """GPU commands that lack the mark, and programs that bash does not know here, fail in `commands`."""
    for command in commands(page):
        assert " ".join(command[:2]) in SET_UP or command[0] in ("python", "moba-hf", "make"), command


def test_marks_are_seen():
    """The pages have commands with a GPU's mark; without it they would be among those to run."""
    marked = "accelerate launch scripts/sft.py  # needs 8 GPUs"
    assert given(marked) == [] and given(marked.split("#")[0]) == [("accelerate", "launch", "scripts/sft.py")]
    assert given('for n in 1 2; do X="a b"; Y=1 python s.py $n "$X"; done')[1] == ("python", "s.py", "2", "a b")
    assert len(runnable()) > 30


def test_others_are_run_by_the_tests_named():
    for script, test in ELSEWHERE.items():
        file, name = test.split("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert (SCRIPTS / f"{script}.py").is_file() and f"def {name}(" in text and script in text, test


@READERS
def test_extras_exist(page):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(r"^(\w+) = \[", project.split("[project.optional-dependencies]")[1].split("\n[")[0], re.M)
    for command in commands(page):
        for asked in re.findall(r"\[(.*?)\]", " ".join(command)) if command[0] == "pip" else ():
            assert set(asked.split(",")) <= set(extras), command


def test_python_blocks(checkout):
    """The Python of README and docs, in the order in which it stands there, on the tiny model and with fewer tokens."""
    names, blocks = {}, 0
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", TEXTS[page], re.S):
            block = re.sub(r"max_new_tokens=\d+", "max_new_tokens=2", block)
            exec(block.replace("meta-llama/Llama-3.1-8B", "runs/demo/model"), names)
            blocks += 1
    assert blocks >= 4 and names["model"].config.moba["full_attention_layers"] == [-3, -2, -1]
    assert names["blocks"].shape == (4096, 8, 3)
