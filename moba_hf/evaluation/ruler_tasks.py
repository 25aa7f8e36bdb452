"""The 13 tasks of RULER (arXiv 2404.06654), made from their published definitions.

Numbers, counts and what is asked are those of the benchmark; the wording of the prompts is ours. To compare with scores
published elsewhere, word for word, use `moba-hf lm-eval --tasks ruler`.

A task is made by a function (rng, size, length, material) → Sample, where `size` is the amount of haystack in the unit
of the task: sentences, words or documents.
"""

import math
import random
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice

ESSAYS, SQUAD, HOTPOTQA = "essays", "squad", "hotpotqa"
_ZETA_2 = math.pi**2 / 6
_NOISE = (
    "Rain falls on the hills. ",
    "The river runs to the sea. ",
    "Birds sing in the morning. ",
    "The road is long. ",
    "Nothing happens here. ",
)


@dataclass(frozen=True)
class Question:
    """One question of a QA set.

    Attributes:
        text: what is asked. answers: every accepted answer.
        documents: numbers of those that hold the answer. related: of those that distract best, the rest of its article.
    """

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """A QA set: its questions, and all the documents there are."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Material:
    """What the tasks are made of.

    Attributes:
        words: different words. adjectives, nouns: of which keys are made; all of `words` where the kind is not known.
        essays: sentences of the haystack that some tasks want; empty where there is none.
        squad, hotpotqa: the QA sets; None where there is none.
    """

    words: tuple[str, ...]
    adjectives: tuple[str, ...] = ()
    nouns: tuple[str, ...] = ()
    essays: tuple[str, ...] = ()
    squad: QuestionSet | None = None
    hotpotqa: QuestionSet | None = None

    def pair(self, rng: random.Random) -> str:
        """A key: adjective-noun."""
        return f"{rng.choice(self.adjectives or self.words)}-{rng.choice(self.nouns or self.words)}"


@dataclass(frozen=True)
class Sample:
    """One prompt: what the user says, how the answer begins, and what it must hold."""

    question: str
    answer_start: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One of the 13 tasks.

    Attributes:
        name: as the benchmark calls it.
        new_tokens: tokens the model may answer with.
        make: (rng, size, length, material) → Sample.
        least: smallest size that makes sense.
        needs: the material that it cannot do without, as a field of Material.
        any_answer: one accepted answer suffices (QA); otherwise each counts.
        options: of the task, for the record.
    """

    name: str
    new_tokens: int
    make: Callable[[random.Random, int, int, Material], Sample]
    least: int = 1
    needs: str | None = None
    any_answer: bool = False
    options: dict = field(default_factory=dict)


# ---- needles -------------------------------------------------------------------------------------------------------


def _needles(rng, size, length, material, *, hay, keys=1, values=1, queries=1, key="words", value="numbers") -> Sample:
    """`keys` keys with `values` values each are hidden; `queries` of the keys are asked for."""
    names = _different(partial(_random_kind, rng, key, material), max(keys, queries))
    hidden = {name: [_random_kind(rng, value, material) for _ in range(values)] for name in names}
    needles = [_needle(value, name, v) for name, of_name in hidden.items() for v in of_name]
    rng.shuffle(needles)
    if hay == ESSAYS:
        sentences = list(islice(cycle(material.essays), size))
        depths = sorted(rng.sample([round(100 * i / 39) for i in range(40)], len(needles)))
        places = [size * depth // 100 for depth in depths]
    else:
        sentences = ["".join(_NOISE).strip()] * size
        if hay == "needles":
            sentences = [
                _needle(value, _random_kind(rng, key, material), _random_kind(rng, value, material))
                for _ in range(size)
            ]
        places = sorted(rng.randrange(size + 1) for _ in needles)
    for place, needle in zip(reversed(places), reversed(needles), strict=True):
        sentences.insert(place, needle)
    text = (" " if hay == ESSAYS else "\n").join(sentences)
    asked = rng.sample(names, queries)
    return _ask_for_needles(text, value, asked, tuple(v for name in asked for v in hidden[name]))


def _needle(kind: str, key: str, value: str) -> str:
    return f"The secret {kind[:-1]} of {key} is {value}."


def _ask_for_needles(text: str, kind: str, keys: Sequence[str], answers: tuple[str, ...]) -> Sample:
    whose = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
    what, verb = (kind[:-1], "is") if len(answers) == 1 else (kind, "are")
    return Sample(
        f"Sentences about secret {kind} are hidden in the text below. Remember them: you will be asked for them.\n\n"
        f"{text}\n\nWhich secret {what} of {whose} {verb} given in the text above?",
        f" According to the text, the secret {what} of {whose} {verb}",
        answers,
    )


def _random_kind(rng: random.Random, kind: str, material: Material) -> str:
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return material.pair(rng)


# ---- tracing and counting ------------------------------------------------------------------------------------------


def _variable_tracking(rng, size, length, material, *, hops=4) -> Sample:
    """One chain of assignments; which variables end up with its value? After one worked example."""
    example, example_value, example_names = _chain(rng, 10, hops, letters=3)
    text, value, names = _chain(rng, size, hops, letters=5)
    example = f"{_variable_question(example, example_value)}{_variable_answer(example_value, hops)} "
    return Sample(
        f"{example}{', '.join(example_names)}\n\n{_variable_question(text, value)}",
        _variable_answer(value, hops),
        tuple(names),
    )


def _chain(rng: random.Random, size: int, hops: int, letters: int) -> tuple[str, str, list[str]]:
    names = _different(lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)), hops + 1)
    value = str(rng.randrange(10_000, 100_000))
    assigned = [value, *(f"VAR {name}" for name in names[:-1])]
    statements = [f"VAR {name} = {what}\n" for name, what in zip(names, assigned, strict=True)]
    sentences = list(islice(cycle(_NOISE), size))
    places = sorted(rng.randrange(size + 1) for _ in statements)
    for place, statement in zip(reversed(places), reversed(statements), strict=True):
        sentences.insert(place, statement)
    return "".join(sentences), value, names


def _variable_question(text: str, value: str) -> str:
    return (
        f"Variables are assigned in the text below, one from another. Follow the assignments.\n\n{text}\n\n"
        f"Question: which variables have the value {value} in the end?"
    )


def _variable_answer(value: str, hops: int) -> str:
    return f" Answer: {hops + 1} variables have the value {value}:"


def _common_words(rng, size, length, material, *, common=10) -> Sample:
    """A numbered list of `size` different words; ten occur ten times (below 4096 tokens: six times) as often as the
    others. After one worked example."""
    short = length < 4096
    example, example_answers = _word_list(rng, 20 if short else 40, (3, 1) if short else (10, 3), common, material)
    listed, answers = _word_list(rng, size, (6, 1) if short else (30, 3), common, material)
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(example_answers, 1))
    return Sample(
        f"{_words_question(example, common)}{_words_answer(common)} {numbered}\n\n{_words_question(listed, common)}",
        _words_answer(common),
        tuple(answers),
    )


def _word_list(rng, size: int, repeats: tuple[int, int], common: int, material: Material) -> tuple[str, list[str]]:
    words = rng.sample(material.words, min(size, len(material.words)))
    if len(words) < size:  # a million tokens take more words than a language has: pairs of them
        words += _different(lambda: material.pair(rng), size - len(words))
    listed = words[:common] * repeats[0] + words[common:] * repeats[1]
    rng.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)), words[:common]


def _words_question(listed: str, common: int) -> str:
    return (
        f"Some words of the numbered list below occur more often than the others. Note which.\n\n{listed}\n\n"
        f"Question: which {common} words are the most common ones in the list?"
    )


def _words_answer(common: int) -> str:
    return f" Answer: the {common} most common words are:"


def _frequent_words(rng, size, length, material, *, alpha=2, letters=6) -> Sample:
    """`size` made-up words, the k-th of them with frequency k^−alpha / ζ(alpha); the most frequent are dots, noise."""
    vocabulary = _different(lambda: "".join(rng.choices(string.ascii_lowercase, k=letters)), max(4, length // 50))
    vocabulary[0] = "..."
    text = [word for k, word in enumerate(vocabulary, 1) for _ in range(int(size * k**-alpha / _ZETA_2))]
    rng.shuffle(text)
    return Sample(
        f"The text below is in code. Count how often each coded word occurs; the dots mean nothing.\n\n"
        f"{' '.join(text)}\n\nQuestion: which three coded words occur most often? Name them and nothing else.",
        " Answer: the three most frequent coded words are:",
        tuple(vocabulary[1:4]),
    )


def _different(draw: Callable[[], str], number: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < number:
        found[draw()] = None
    return list(found)


# ---- questions -----------------------------------------------------------------------------------------------------


def _question_answering(rng, size, length, material, *, source) -> Sample:
    """One question among `size` documents in random order: those with the answer, related ones, then any."""
    questions: QuestionSet = getattr(material, source)
    question = rng.choice(questions.questions)
    near = {*question.documents, *question.related}
    far = [i for i in range(len(questions.documents)) if i not in near]
    distractors = rng.sample(question.related, len(question.related)) + rng.sample(far, min(size, len(far)))
    chosen = [*question.documents, *distractors[: max(0, size - len(question.documents))]]
    rng.shuffle(chosen)
    text = "\n\n".join(f"Document {i}:\n{questions.documents[number]}" for i, number in enumerate(chosen, 1))
    task = "Answer the question from the documents, with the answer alone."
    return Sample(f"{task}\n\n{text}\n\n{task}\n\nQuestion: {question.text}", " Answer:", question.answers)


# ---- the list ------------------------------------------------------------------------------------------------------


def _needle_task(name: str, *, hay: str, **options) -> Task:
    make = partial(_needles, hay=hay, **options)
    return Task(name, 128, make, needs=ESSAYS if hay == ESSAYS else None, options={"hay": hay, **options})


_ALL = (
    _needle_task("niah_single_1", hay="noise"),
    _needle_task("niah_single_2", hay=ESSAYS),
    _needle_task("niah_single_3", hay=ESSAYS, value="uuids"),
    _needle_task("niah_multikey_1", hay=ESSAYS, keys=4),
    _needle_task("niah_multikey_2", hay="needles"),
    _needle_task("niah_multikey_3", hay="needles", key="uuids", value="uuids"),
    _needle_task("niah_multivalue", hay=ESSAYS, values=4),
    _needle_task("niah_multiquery", hay=ESSAYS, queries=4),
    Task("vt", 30, _variable_tracking, options={"chains": 1, "hops": 4}),
    Task("cwe", 120, _common_words, least=10, options={"common": 10}),
    Task("fwe", 50, _frequent_words, least=50, options={"alpha": 2, "letters": 6}),
    Task("qa_1", 32, partial(_question_answering, source=SQUAD), needs=SQUAD, any_answer=True),
    Task("qa_2", 32, partial(_question_answering, source=HOTPOTQA), needs=HOTPOTQA, any_answer=True),
)
TASKS = {task.name: task for task in _ALL}
