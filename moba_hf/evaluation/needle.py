"""A needle in a haystack: one sentence with a number, hidden at some depth of a long text, and asked for at the end."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle

from transformers import PreTrainedModel

from .generation import continuations, encode, in_chat
from .modes import Mode, running
from .result_log import ResultLog

PAPER_LENGTHS = tuple(range(32_000, 1_024_001, 32_000))
PAPER_DEPTHS = tuple(round(100 * i / 14) for i in range(15))  # 0, 7, 14, … 93, 100

_HEAD = "Read the following text. One of its sentences says what the passcode of the lighthouse is.\n\n"
_NEEDLE = " The passcode of the lighthouse is {number}."
_TAIL = "\n\nWhat is the passcode of the lighthouse, according to the text above?"
_ANSWER = "The passcode of the lighthouse is"


@dataclass(frozen=True)
class Grid:
    """What is asked: every length at every depth, `samples` times.

    Attributes:
        lengths: tokens of a cell, prompt and answer together.
        depths: percent of the haystack before the needle.
        samples: different numbers hidden per cell.
        new_tokens: tokens the model may answer with.
        seed: another one hides other numbers.
    """

    lengths: tuple[int, ...] = PAPER_LENGTHS
    depths: tuple[int, ...] = PAPER_DEPTHS
    samples: int = 1
    new_tokens: int = 16
    seed: int = 0

    def __post_init__(self):
        for name in ("lengths", "depths"):
            values = tuple(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be different numbers, at least one, but were {list(values)}")
            object.__setattr__(self, name, tuple(sorted(values)))
        if self.depths[0] < 0 or self.depths[-1] > 100:
            raise ValueError(f"depths are percent, 0 … 100, but were {list(self.depths)}")
        for name in ("samples", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but was {getattr(self, name)}")

    def cells(self) -> Iterator[tuple[int, int, int]]:
        """(length, depth, sample), short ones first: a figure of the first hours is then a whole figure."""
        return ((n, d, s) for n in self.lengths for d in self.depths for s in range(self.samples))


def passcode(grid: Grid, length: int, depth: int, sample: int) -> str:
    """The seven digits hidden in a cell: the same in every mode, and in a run that goes on."""
    return str(random.Random(f"{grid.seed}/{length}/{depth}/{sample}").randrange(10**6, 10**7))


def check_text(text: str) -> None:
    """ValueError where there is nothing to hide a needle in."""
    if not text.strip():
        raise ValueError("the haystack is empty: give a text to hide the needle in")


class Haystack:
    """A text to hide needles in, cut to any number of tokens; repeated where it is too short.

    Args:
        tokenizer: of the model; its chat template, where it has one, frames the question.
        text: the haystack.

    Raises:
        ValueError: the text is empty.
    """

    def __init__(self, tokenizer, text: str):
        check_text(text)
        self.tokenizer = tokenizer
        before, after = in_chat(tokenizer)
        self._head = encode(tokenizer, before + _HEAD, start=True)
        self._tail = encode(tokenizer, _TAIL + after + _ANSWER, start=False)
        self._sentences = tokenizer(split_sentences(text), add_special_tokens=False, verbose=False)["input_ids"]

    @property
    def tokens(self) -> int:
        """Tokens before it repeats."""
        return sum(map(len, self._sentences))

    def check(self, grid: Grid) -> None:
        """ValueError where the shortest length has no room for question, needle and answer."""
        shortest = grid.lengths[0]
        numbers = [passcode(grid, *cell) for cell in grid.cells() if cell[0] == shortest]
        needed = max(map(self._without_hay, numbers)) + 1 + grid.new_tokens
        if needed > shortest:
            raise ValueError(
                f"lengths must be at least {needed}, for question, needle and answer, but one is {shortest}"
            )

    def _without_hay(self, number: str) -> int:
        return len(self._head) + len(self._needle(number)) + len(self._tail)

    def _needle(self, number: str) -> list[int]:
        return encode(self.tokenizer, _NEEDLE.format(number=number), start=False)

    def prompt(self, number: str, *, tokens: int, depth: int) -> list[int]:
        """A prompt of exactly `tokens` tokens with the needle after the last sentence that ends within `depth` percent.

        Raises:
            ValueError: there is no room for question and needle.
        """
        needle = self._needle(number)
        room = tokens - self._without_hay(number)
        if room < 1:
            raise ValueError(f"{tokens} tokens are too few: question and needle alone take {tokens - room}")
        hay, ends = [], [0]
        for sentence in cycle(self._sentences):
            if len(hay) + len(sentence) > room:
                break
            hay += sentence
            ends.append(len(hay))
        hay += sentence[: room - len(hay)]
        place = room if depth == 100 else max(end for end in ends if end <= room * depth / 100)
        return [*self._head, *hay[:place], *needle, *hay[place:], *self._tail]


def split_sentences(text: str) -> list[str]:
    """The text in pieces that end where a sentence or a paragraph does; joined, they are the text again."""
    return [piece for piece in re.findall(r".+?(?:[.!?](?=\s)|\n\s*(?=\n)|\Z)", text, re.DOTALL) if piece]


def score(answer: str, number: str) -> float:
    """1.0 where the answer holds the number, else 0.0."""
    return float(number in answer)


def run(
    model: PreTrainedModel,
    haystack: Haystack,
    grid: Grid,
    modes: Sequence[Mode],
    log: ResultLog,
    *,
    batch_size: int = 1,
    prefill_chunk_size: int | None = None,
) -> Iterator[int]:
    """Ask for every cell that the log does not have, in every mode; yields how many results were added.

    Cells of one length fill a batch; their prompts are equally long, so that there is no padding.
    """
    done = {(r["mode"], r["length"], r["depth"], r["sample"]) for r in log.results}
    for length in grid.lengths:
        for mode in modes:
            todo = [cell for cell in grid.cells() if cell[0] == length and (mode.name, *cell) not in done]
            for start in range(0, len(todo), batch_size):
                batch = todo[start : start + batch_size]
                numbers = [passcode(grid, *cell) for cell in batch]
                prompts = [
                    haystack.prompt(number, tokens=length - grid.new_tokens, depth=depth)
                    for number, (_, depth, _) in zip(numbers, batch, strict=True)
                ]
                with running(model, mode):
                    answers = continuations(
                        model,
                        haystack.tokenizer,
                        prompts,
                        max_new_tokens=grid.new_tokens,
                        prefill_chunk_size=prefill_chunk_size,
                    )
                results = zip(batch, numbers, answers, strict=True)
                log.add([asdict(_result(mode, cell, number, answer)) for cell, number, answer in results])
                yield len(batch)


@dataclass(frozen=True)
class Result:
    """One cell, asked once."""

    mode: str
    length: int
    depth: int
    sample: int
    number: str
    answer: str
    score: float


def _result(mode: Mode, cell: tuple[int, int, int], number: str, answer: str) -> Result:
    return Result(mode.name, *cell, number, answer, score(answer, number))


def table(results: Sequence[dict], mode: str, grid: Grid) -> list[list[float | None]]:
    """Mean score [depth][length] in a mode; None where nothing was measured."""
    scores: dict[tuple[int, int], list[float]] = {}
    for result in results:
        if result["mode"] == mode:
            scores.setdefault((result["depth"], result["length"]), []).append(result["score"])
    means = {cell: sum(values) / len(values) for cell, values in scores.items()}
    return [[means.get((depth, length)) for length in grid.lengths] for depth in grid.depths]
