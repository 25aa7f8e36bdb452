"""RULER: material from the user's files, prompts cut to length, the official scores."""

import importlib.util
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel

from .generation import continuations, encode, in_chat
from .modes import Mode, running
from .needle import split_sentences
from .result_log import ResultLog
from .ruler_tasks import ESSAYS, HOTPOTQA, SQUAD, TASKS, Material, Question, QuestionSet, Sample, Task

# ---- scores --------------------------------------------------------------------------------------------------------


def all_strings(answer: str, references: Sequence[str]) -> float:
    """Percent of the references that the answer holds, in any case: the official score of all tasks but QA."""
    answer = _clean(answer)
    return 100 * sum(reference.lower() in answer for reference in references) / len(references)


def any_string(answer: str, references: Sequence[str]) -> float:
    """100 where the answer holds one of the references, in any case, else 0: the official score of QA."""
    answer = _clean(answer)
    return 100.0 * any(reference.lower() in answer for reference in references)


def score(task: Task, answer: str, references: Sequence[str]) -> float:
    return (any_string if task.any_answer else all_strings)(answer, references)


def _clean(answer: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", answer).strip().lower()


# ---- which tasks can run -------------------------------------------------------------------------------------------

_WHAT_IT_TAKES = {
    ESSAYS: "a haystack of prose (--essays FILE, a folder, or pydoc)",
    SQUAD: "the SQuAD 2.0 development set (--squad FILE.json)",
    HOTPOTQA: "the HotpotQA development set, distractor setting (--hotpotqa FILE.json)",
}


def choose_tasks(names: Sequence[str], material: Material) -> tuple[list[Task], dict[str, str]]:
    """The tasks to run, and those that cannot run with what they lack. "all" stands for every task that can.

    Raises:
        ValueError: an unknown task, or one asked for by name whose material is missing.
    """
    unknown = [name for name in names if name != "all" and name not in TASKS]
    if unknown or not names:
        raise ValueError(
            f"unknown RULER task: {', '.join(unknown) or 'none given'}; the tasks are all, {', '.join(TASKS)}"
        )
    missing = {t.name: _WHAT_IT_TAKES[t.needs] for t in TASKS.values() if t.needs and not getattr(material, t.needs)}
    if "all" in names:
        return [task for task in TASKS.values() if task.name not in missing], missing
    cannot = [f"{name} needs {missing[name]}" for name in names if name in missing]
    if cannot:
        raise ValueError("; ".join(cannot))
    return [TASKS[name] for name in dict.fromkeys(names)], {}


# ---- material ------------------------------------------------------------------------------------------------------

WONDERWORDS = "wonderwords"


def gather(
    *,
    words: str = WONDERWORDS,
    essays: Iterable[str] | None = None,
    squad: str | None = None,
    hotpotqa: str | None = None,
) -> Material:
    """Material of the tasks; nothing is downloaded.

    Args:
        words: "wonderwords" (the package the benchmark takes its words from), or a text file: its different words.
        essays: documents of the haystack.
        squad, hotpotqa: files of these QA sets, as they are published.

    Raises:
        ValueError: empty essays, fewer than 100 words, or a file that is no such QA set. FileNotFoundError.
        ModuleNotFoundError: wonderwords is not installed.
    """
    sentences = tuple(s.strip() for document in essays or () for s in split_sentences(document) if s.strip())
    if essays is not None and not sentences:
        raise ValueError("the essays are empty: give a text to hide the needles in")
    return Material(
        **_read_words(words),
        essays=sentences,
        squad=read_squad(squad) if squad else None,
        hotpotqa=read_hotpotqa(hotpotqa) if hotpotqa else None,
    )


def words_of(text: str) -> tuple[str, ...]:
    """The different lower-case words of 4 to 12 letters in a text, in alphabetical order."""
    return tuple(sorted(set(re.findall(r"\b[a-z]{4,12}\b", text))))


def _read_words(source: str) -> dict[str, tuple[str, ...]]:
    if source == WONDERWORDS:
        return _wonderwords()
    words = words_of(Path(source).read_text(encoding="utf-8"))
    if len(words) < 100:
        raise ValueError(f"words: {source} has {len(words)} different words of 4 to 12 letters, but 100 are needed")
    return {"words": words}


def _wonderwords() -> dict[str, tuple[str, ...]]:
    if importlib.util.find_spec(WONDERWORDS) is None:
        raise ModuleNotFoundError(
            "the words of RULER come from the package wonderwords: pip install wonderwords, or take those of a text "
            "with --words FILE.txt"
        )
    from wonderwords import RandomWord

    of_kind = {kind: sorted(RandomWord().filter(include_categories=[kind])) for kind in ("noun", "adjective", "verb")}
    return {
        "words": tuple(sorted(set().union(*of_kind.values()))),
        "adjectives": tuple(of_kind["adjective"]),
        "nouns": tuple(of_kind["noun"]),
    }


def read_squad(path: str) -> QuestionSet:
    """SQuAD 2.0 as published; questions without an answer are left out."""
    data = _read_json(path, "SQuAD", lambda data: data["data"][0]["paragraphs"][0]["qas"])
    paragraphs = [paragraph for article in data["data"] for paragraph in article["paragraphs"]]
    number = {context: i for i, context in enumerate(dict.fromkeys(p["context"] for p in paragraphs))}
    questions = []
    for article in data["data"]:
        of_article = dict.fromkeys(number[paragraph["context"]] for paragraph in article["paragraphs"])
        for paragraph in article["paragraphs"]:
            here = number[paragraph["context"]]
            related = tuple(i for i in of_article if i != here)
            answered = [qa for qa in paragraph["qas"] if qa["answers"]]
            questions += [Question(q["question"], _texts(q["answers"]), (here,), related) for q in answered]
    return QuestionSet(tuple(questions), tuple(number))


def _texts(answers: list[dict]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(answer["text"] for answer in answers))


def read_hotpotqa(path: str) -> QuestionSet:
    """HotpotQA (distractor setting) as published: a question's documents are all that come with it."""
    data = _read_json(path, "HotpotQA", lambda data: (data[0]["question"], data[0]["answer"], data[0]["context"][0][1]))
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]] for entry in data]
    number = {text: i for i, text in enumerate(dict.fromkeys(text for of_entry in texts for text in of_entry))}
    questions = tuple(
        Question(entry["question"], (entry["answer"],), tuple(dict.fromkeys(number[text] for text in of_entry)))
        for entry, of_entry in zip(data, texts, strict=True)
    )
    return QuestionSet(questions, tuple(number))


def _read_json(path: str, what: str, look) -> dict | list:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        look(data)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is no {what} file as it is published ({type(error).__name__}: {error})") from error
    return data


# ---- prompts of a length -------------------------------------------------------------------------------------------


class Writer:
    """Makes samples of a task that fit into a length, prompt and answer together.

    Args:
        tokenizer: of the model; its chat template, where it has one, frames the question.
        material: what the tasks are made of.
        seed: another one makes other samples.
    """

    def __init__(self, tokenizer, material: Material, seed: int = 0):
        self.tokenizer, self.material, self.seed = tokenizer, material, seed
        self._before, self._after = in_chat(tokenizer)

    def check(self, tasks: Sequence[Task], lengths: Sequence[int], samples: int) -> None:
        """ValueError, naming them all, where a task's smallest samples do not fit into a length."""
        misfits = [
            f"{task.name} needs {needed} tokens and has {length}"
            for length, task in itertools.product(lengths, tasks)
            if (needed := self._needed(task, length, samples)) > length
        ]
        if misfits:
            raise ValueError(f"lengths: {'; '.join(misfits)}; take longer ones, or name the tasks that fit")

    def _needed(self, task: Task, length: int, samples: int) -> int:
        """Tokens of the largest among the smallest samples, answer included."""
        return task.new_tokens + max(len(self._make(task, length, i, task.least)[1]) for i in range(samples))

    def write(self, task: Task, length: int, samples: int) -> Iterator[tuple[Sample, list[int]]]:
        """(sample, prompt tokens) `samples` times, always the same ones.

        Raises:
            ValueError: not even the smallest sample fits into the length.
        """
        size = None
        for index in range(samples):
            size = self._largest(task, length, index) if size is None else size
            sample, prompt = self._make(task, length, index, size)
            while len(prompt) + task.new_tokens > length and size > task.least:
                size = max(task.least, size - max(1, size // 50))
                sample, prompt = self._make(task, length, index, size)
            if len(prompt) + task.new_tokens > length:
                needed = len(prompt) + task.new_tokens
                raise ValueError(f"{task.name} does not fit into {length} tokens: its smallest sample takes {needed}")
            yield sample, prompt

    def _make(self, task: Task, length: int, index: int, size: int) -> tuple[Sample, list[int]]:
        rng = random.Random(f"{self.seed}/{task.name}/{length}/{index}")
        sample = task.make(rng, size, length, self.material)
        start = sample.answer_start.lstrip() if self._after else sample.answer_start
        prompt = self._before + sample.question + self._after + start
        return sample, encode(self.tokenizer, prompt, start=True)

    def _largest(self, task: Task, length: int, index: int) -> int:
        """The largest size that fits, by doubling and halving; a size that adds nothing ends the search."""

        def tokens(size: int) -> int:
            return len(self._make(task, length, index, size)[1])

        low, high, before = task.least, 2 * task.least, -1
        while before < (now := tokens(high)) <= length - task.new_tokens:
            low, high, before = high, 2 * high, now
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if tokens(middle) + task.new_tokens <= length else (low, middle)
        return low


# ---- running -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One sample, asked once. `score` in percent; `tokens` is the length that the prompt really has."""

    mode: str
    task: str
    length: int
    sample: int
    tokens: int
    references: tuple[str, ...]
    answer: str
    score: float


def run(
    model: PreTrainedModel,
    writer: Writer,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    modes: Sequence[Mode],
    log: ResultLog,
    *,
    samples: int,
    batch_size: int = 1,
    prefill_chunk_size: int | None = None,
) -> Iterator[int]:
    """Ask every sample that the log does not have, in every mode; yields how many results were added."""
    done = {(r["mode"], r["task"], r["length"], r["sample"]) for r in log.results}
    for length, task in itertools.product(lengths, tasks):
        if all((mode.name, task.name, length, i) in done for mode in modes for i in range(samples)):
            continue
        written = enumerate(writer.write(task, length, samples))
        while batch := list(itertools.islice(written, batch_size)):
            for mode in modes:
                todo = [(i, made) for i, made in batch if (mode.name, task.name, length, i) not in done]
                if not todo:
                    continue
                with running(model, mode):
                    answers = continuations(
                        model,
                        writer.tokenizer,
                        [prompt for _, (_, prompt) in todo],
                        max_new_tokens=task.new_tokens,
                        prefill_chunk_size=prefill_chunk_size,
                    )
                log.add([_result(mode, task, length, i, made, a) for (i, made), a in zip(todo, answers, strict=True)])
                yield len(todo)


def _result(mode: Mode, task: Task, length: int, index: int, written: tuple[Sample, list[int]], answer: str) -> dict:
    sample, prompt = written
    points = score(task, answer, sample.answers)
    return asdict(Result(mode.name, task.name, length, index, len(prompt), sample.answers, answer, points))


def table(results: Sequence[dict]) -> dict[str, dict[str, dict[int, float]]]:
    """Mean score in percent: mode → task → length; under "mean", the mean over the tasks that were run."""
    points: dict[tuple[str, str, int], list[float]] = {}
    for result in results:
        points.setdefault((result["mode"], result["task"], result["length"]), []).append(result["score"])
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for (mode, task, length), values in points.items():
        scores.setdefault(mode, {}).setdefault(task, {})[length] = sum(values) / len(values)
    for by_task in scores.values():
        lengths = {length for by_length in by_task.values() for length in by_length}
        columns = {n: [by_length[n] for by_length in by_task.values() if n in by_length] for n in sorted(lengths)}
        by_task["mean"] = {length: sum(values) / len(values) for length, values in columns.items()}
    return scores
