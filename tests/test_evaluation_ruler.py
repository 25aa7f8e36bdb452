"""The 13 RULER tasks: what a sample holds, that it fits, and what is refused. One token is one byte here."""

import json
import random
import re
import sys
from collections import Counter

import pytest
from checkpoints import CHAT, byte_tokenizer

from moba_hf.evaluation import ruler
from moba_hf.evaluation.ruler_tasks import TASKS, Material, Question, QuestionSet

WORDS = tuple(f"{a}{b}{c}ing" for a in "bcdfg" for b in "aeiou" for c in "lmnrst")
QUESTIONS = QuestionSet(
    (Question("Who?", ("Ada", "Ada L."), (1,), (2,)), Question("Where?", ("Rome",), (3, 0))),
    tuple(f"Text of document {i}. " * 2 for i in range(30)),
)
MATERIAL = Material(WORDS, essays=("It is so.", "It was so.", "Why?"), squad=QUESTIONS, hotpotqa=QUESTIONS)
# name: tokens the model may answer with, number of references; from the benchmark's definition
OFFICIAL = {
    "niah_single_1": (128, 1), "niah_single_2": (128, 1), "niah_single_3": (128, 1), "niah_multikey_1": (128, 1),
    "niah_multikey_2": (128, 1), "niah_multikey_3": (128, 1), "niah_multivalue": (128, 4), "niah_multiquery": (128, 4),
    "vt": (30, 5), "cwe": (120, 10), "fwe": (50, 3), "qa_1": (32, None), "qa_2": (32, None),
}  # fmt: skip


def make(name: str, size: int, length: int = 4096, seed: int = 0):
    return TASKS[name].make(random.Random(seed), size, length, MATERIAL)


def test_the_list_is_the_benchmarks():
    assert {name: task.new_tokens for name, task in TASKS.items()} == {name: n for name, (n, _) in OFFICIAL.items()}
    assert [name for name, task in TASKS.items() if task.any_answer] == ["qa_1", "qa_2"]


@pytest.mark.parametrize("name", TASKS)
def test_prompts_fit_fill_the_length_and_repeat(name):
    writer = ruler.Writer(byte_tokenizer(CHAT), MATERIAL)
    length = 12_000 if name == "cwe" else 6000  # its worked example alone takes 5000 bytes
    written = list(writer.write(TASKS[name], length, 3))
    again = list(ruler.Writer(byte_tokenizer(CHAT), MATERIAL).write(TASKS[name], length, 3))
    assert written == again and len({tuple(prompt) for _, prompt in written}) == 3
    number = OFFICIAL[name][1]
    for sample, prompt in written:
        room = length - TASKS[name].new_tokens
        enough = 0.3 if name.startswith("qa") else 0.9  # there are only 30 documents
        assert enough * room < len(prompt) <= room
        text = writer.tokenizer.decode(prompt)
        assert number is None or len(sample.answers) == number == len(set(sample.answers))
        assert number is None or all(answer in text for answer in sample.answers)
        assert text.endswith(sample.answer_start.strip()) and "<assistant>" in text
    other = next(ruler.Writer(byte_tokenizer(CHAT), MATERIAL, seed=1).write(TASKS[name], length, 1))
    assert other != written[0]


def test_too_short_a_length_is_refused():
    with pytest.raises(ValueError, match="cwe does not fit into 300 tokens: its smallest sample takes"):
        list(ruler.Writer(byte_tokenizer(), MATERIAL).write(TASKS["cwe"], 300, 1))


def test_lengths_beyond_131072():
    """No list of lengths stands in the way, as it does in lm-eval."""
    length, task, writer = 140_000, TASKS["niah_single_1"], ruler.Writer(byte_tokenizer(), MATERIAL)
    writer.check([task], [length], samples=1)
    ((_, prompt),) = writer.write(task, length, 1)
    assert 0.99 * length < len(prompt) + task.new_tokens <= length


@pytest.mark.parametrize(
    ("name", "needles", "kind"),
    [
        ("niah_single_1", 1, r"\d{7}"),
        ("niah_single_2", 1, r"\d{7}"),
        ("niah_single_3", 1, r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"),
        ("niah_multikey_1", 4, r"\d{7}"),
        ("niah_multikey_2", 51, r"\d{7}"),
        ("niah_multikey_3", 51, r"[0-9a-f-]{36}"),
        ("niah_multivalue", 4, r"\d{7}"),
        ("niah_multiquery", 4, r"\d{7}"),
    ],
)
def test_needles(name, needles, kind):
    sample = make(name, 50)
    found = re.findall(rf"The secret \w+ of (\S+) is ({kind})\.", sample.question)
    assert len(found) == needles
    keys = {key for key, _ in found}
    assert len(keys) == {"niah_multivalue": 1}.get(name, needles)
    asked = {key for key in keys if key in sample.answer_start}
    assert len(asked) == (4 if name == "niah_multiquery" else 1)
    assert {value for key, value in found if key in asked} == set(sample.answers)


def test_variable_tracking():
    sample = make("vt", 40)
    text = sample.question.split("\n\n", 2)[2]  # after the worked example
    statements = re.findall(r"VAR (\w{5}) = (?:VAR )?(\w{5})\n", text)
    assert [name for name, _ in statements] == list(sample.answers)
    assert [what for _, what in statements[1:]] == list(sample.answers[:-1])
    value = statements[0][1]
    assert value.isdigit() and f"value {value}:" in sample.answer_start and f"value {value} in" in text
    example = re.findall(r"VAR (\w{3}) = ", sample.question)
    assert len(example) == 5 and ", ".join(example) in sample.question


@pytest.mark.parametrize(("length", "repeats"), [(2048, (6, 1)), (4096, (30, 3))])
def test_common_words(length, repeats):
    sample = make("cwe", 40, length)
    listed = re.findall(r"\d+\. (\w+)", sample.question.rsplit("Note which.", 1)[1])
    count = Counter(listed)
    assert sorted(count.values()) == [repeats[1]] * 30 + [repeats[0]] * 10
    assert {word for word, n in count.items() if n == repeats[0]} == set(sample.answers)


def test_more_words_than_there_are_become_pairs():
    words = re.findall(r"\d+\. (\S+)", make("cwe", 400).question.rsplit("Note which.", 1)[1])
    assert len(set(words)) == 400 and sum("-" in word for word in set(words)) == 400 - len(WORDS)


def test_frequent_words():
    sample = make("fwe", 1000, 4096)
    count = Counter(re.findall(r"(?<=[ \n])(\.\.\.|[a-z]{6})(?=[ \n])", sample.question.split("\n\n")[1].join("  ")))
    # 1000 · k⁻² / ζ(2), ζ(2) = 1.6449: 607, 151, 67, 37
    assert count.most_common(1) == [("...", 607)]
    assert [count[answer] for answer in sample.answers] == [151, 67, 37]


def test_questions():
    for seed in range(8):
        sample = make("qa_1", 5, seed=seed)
        numbers = [int(i) for i in re.findall(r"Document \d+:\nText of document (\d+)\.", sample.question)]
        assert len(numbers) == len(set(numbers)) == 5
        gold = {1, 2} if "Who?" in sample.question else {0, 3}  # of Who?, document 2 is of the same article
        assert gold <= set(numbers)
        assert sample.answers == (("Ada", "Ada L.") if "Who?" in sample.question else ("Rome",))
    assert "Document 30:" in make("qa_2", 99).question


# ---- material ------------------------------------------------------------------------------------------------------


def test_tasks_that_cannot_run_are_named():
    tasks, missing = ruler.choose_tasks(["all"], Material(WORDS))
    assert [t.name for t in tasks] == ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"]
    assert len(missing) == 7 and "--essays" in missing["niah_single_2"] and "--squad" in missing["qa_1"]
    assert ruler.choose_tasks(["all"], MATERIAL)[1] == {}
    assert [t.name for t in ruler.choose_tasks(["vt", "cwe", "vt"], Material(WORDS))[0]] == ["vt", "cwe"]
    with pytest.raises(ValueError, match="qa_2 needs the HotpotQA"):
        ruler.choose_tasks(["vt", "qa_2"], Material(WORDS))
    with pytest.raises(ValueError, match=r"unknown RULER task: nih; the tasks are all, niah_single_1"):
        ruler.choose_tasks(["nih"], MATERIAL)


def test_qa_files_as_published(tmp_path):
    paragraphs = [
        {"context": "P0", "qas": [
            {"question": "q0", "answers": [{"text": "a"}, {"text": "b"}, {"text": "a"}], "is_impossible": False},
            {"question": "q1", "answers": [], "is_impossible": True},
        ]},
        {"context": "P1", "qas": []},
    ]  # fmt: skip
    squad = tmp_path / "squad.json"
    squad.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    assert ruler.read_squad(str(squad)) == QuestionSet((Question("q0", ("a", "b"), (0,), (1,)),), ("P0", "P1"))
    hotpot = tmp_path / "hotpot.json"
    entry = {"question": "q", "answer": "yes", "context": [["T", ["One.", " Two."]], ["U", ["Three."]]]}
    hotpot.write_text(json.dumps([entry]))
    expected = QuestionSet((Question("q", ("yes",), (0, 1)),), ("T\nOne. Two.", "U\nThree."))
    assert ruler.read_hotpotqa(str(hotpot)) == expected
    with pytest.raises(ValueError, match="no SQuAD file as it is published"):
        ruler.read_squad(str(hotpot))
    with pytest.raises(ValueError, match="no HotpotQA file as it is published"):
        ruler.read_hotpotqa(str(squad))


def test_words_and_essays(tmp_path, monkeypatch):
    file = tmp_path / "words.txt"
    file.write_text(" ".join(WORDS) + " Capital toolongtobeaword22 ab 17")
    material = ruler.gather(words=str(file), essays=["One. Two.", "Three."])
    assert material.words == tuple(sorted(WORDS)) and material.essays == ("One.", "Two.", "Three.")
    file.write_text("few words only")
    with pytest.raises(ValueError, match="but 100 are needed"):
        ruler.gather(words=str(file))
    file.write_text(" ".join(WORDS))
    with pytest.raises(ValueError, match="essays are empty"):
        ruler.gather(words=str(file), essays=[" "])
    monkeypatch.setattr(ruler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install wonderwords"):
        ruler.gather()
    assert "wonderwords" not in sys.modules
