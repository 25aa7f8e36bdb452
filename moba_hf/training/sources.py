"""Which data sets are read, in which shares and in which order: one data set, or a mixture with weights.

The order of a mixture depends on its sources and weights alone (no random numbers): a run that starts again reads the
same rows in the same order, in streaming too.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

PYDOC = "pydoc"
_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_TEXT_SUFFIXES = (".txt", ".md", ".rst")


@dataclass(frozen=True)
class Source:
    """One data set of a mixture.

    Attributes:
        dataset: "pydoc" (the topics that Python's own help() shows), a local file or folder (.txt, .md and .rst: one
            row per file; .jsonl and .parquet: their rows), or a hub id.
        weight: share of the characters read, relative to the other weights; above 0.
        config, split: of a hub data set.
        text_column: the column that holds the text of a document.

    Raises:
        ValueError: no data set, or a weight that is none.
    """

    dataset: str
    weight: float = 1.0
    config: str | None = None
    split: str = "train"
    text_column: str = "text"

    def __post_init__(self):
        if not self.dataset or not isinstance(self.dataset, str):
            raise ValueError(f"dataset must be a hub id, a file or folder, or pydoc, but was {self.dataset!r}")
        number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not number or not 0 < self.weight < math.inf:
            raise ValueError(f"weight of {self.dataset} must be a number above 0, but was {self.weight!r}")

    @property
    def name(self) -> str:
        """Tells the source from the others of a mixture."""
        split = self.split if self.split != "train" else None
        return ":".join(part for part in (self.dataset, self.config, split) if part)


@dataclass
class Reading:
    """What was read of one source; characters include those of rows that are not text. passes: times it was begun."""

    rows: int = 0
    characters: int = 0
    passes: int = 0

    def share_of(self, characters: int) -> str:
        share = self.characters / characters if characters else 0.0
        again = f", begun {self.passes} times" if self.passes > 1 else ""
        return f"{share:.1%} of the characters ({self.rows} rows{again})"


def sources(dataset: str | Sequence[Mapping], **defaults) -> tuple[Source, ...]:
    """The sources that a setting names: one data set, or a list of mappings with the fields of `Source`.

    Args:
        dataset: as above.
        defaults: fields of `Source` for what a mapping leaves out.

    Raises:
        FileNotFoundError: a local path that is not there or holds no such file.
        ValueError: an empty list, an unknown field, the same source twice.
    """
    given = [{"dataset": dataset}] if isinstance(dataset, str) else dataset
    if not isinstance(given, Sequence) or not given or not all(isinstance(one, Mapping) for one in given):
        raise ValueError(f"dataset must be a name or a list of {{dataset: …, weight: …}}, but was {dataset!r}")
    known = [f.name for f in fields(Source)]
    for one in given:
        unknown = sorted(set(one) - set(known))
        if unknown or "dataset" not in one:
            raise ValueError(f"a data set of a mixture has the keys {known}, dataset among them, but was {dict(one)}")
    found = tuple(Source(**{**defaults, **one}) for one in given)
    names = [source.name for source in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"dataset: {', '.join(twice)} stands twice in the mixture; add up its weights")
    for source in found:
        _local_files(source.dataset)
    return found


def read_documents(
    dataset: str | Sequence[Mapping],
    *,
    config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    readings: dict[str, Reading] | None = None,
) -> Iterator[str]:
    """The documents of a data set or mixture, one string each; read as they are asked for.

    Args:
        dataset, config, split, text_column: see `Source`; the last three hold for what a mixture's entry leaves out.
        readings: filled with what was read of each source.

    Raises:
        FileNotFoundError: a local path without such files. ValueError: no column of that name; see `sources`.
    """
    mixture = sources(dataset, config=config, split=split, text_column=text_column)
    rows = read_rows(mixture, lambda source, row: len(text_of(source, row)), readings)
    return (text_of(source, row) for source, row in rows)


def text_of(source: Source, row: Mapping) -> str:
    """ValueError where the row has no such column."""
    if source.text_column not in row:
        raise ValueError(f"text_column={source.text_column!r} is no column of the data; it has {sorted(row)}")
    return row[source.text_column]


def read_rows(
    mixture: Sequence[Source],
    characters: Callable[[Source, Mapping], int],
    readings: dict[str, Reading] | None = None,
) -> Iterator[tuple[Source, dict]]:
    """Rows of the sources, each with its source, so that the characters read stand in the ratio of the weights.

    The next row is always taken from the source that is furthest behind its share. A source that runs out is begun
    again, and the reading ends when every source has been read to its end at least once: nothing is left out, and the
    shares hold from beginning to end. One source alone is simply read once.

    Args:
        mixture: the sources.
        characters: how much a row counts.
        readings: filled with what was read, by `Source.name`.
    """
    readings = {} if readings is None else readings
    for source in mixture:
        readings[source.name] = Reading()
    taken, unread = dict.fromkeys(mixture, 0), set(mixture)
    readers = {source: _begin(source, readings) for source in mixture}
    while True:
        source = min(mixture, key=lambda one: taken[one] / one.weight)
        row = next(readers[source], None)
        if row is None:
            unread.discard(source)
            if not unread:
                return
            readers[source] = _begin(source, readings)
            row = next(readers[source], None)
            if row is None:
                raise ValueError(f"dataset: {source.name} is empty, but the mixture gives it weight={source.weight}")
        size = characters(source, row)
        taken[source] += max(1, size)  # empty rows count a little, so that a source of nothing else comes to its end
        reading = readings[source.name]
        reading.rows, reading.characters = reading.rows + 1, reading.characters + size
        yield source, row


def _begin(source: Source, readings: dict[str, Reading]) -> Iterator[dict]:
    readings[source.name].passes += 1
    if source.dataset == PYDOC:
        return _manual(source.text_column)
    files = _local_files(source.dataset)
    if files is None:
        return _load(source.dataset, name=source.config, split=source.split)
    return _read_files(files, source.text_column)


def _manual(text_column: str) -> Iterator[dict]:
    """Python's manual, as text and as question and answer."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        question = f"What does Python's manual say about {name!r}?"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": topics[name].strip()}]
        yield {text_column: topics[name], "messages": messages}


def _local_files(dataset: str) -> list[Path] | None:
    """The files that `dataset` names; None where it must be a hub id."""
    path = Path(dataset).expanduser()
    known = (*_SUFFIXES, *_TEXT_SUFFIXES)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in known)
        if not files:
            raise FileNotFoundError(f"dataset: no {', '.join(known)} file in the folder {dataset}")
        return files
    if path.is_file():
        if path.suffix not in known:
            raise ValueError(f"dataset: {dataset} must end in one of {known}")
        return [path]
    if path.is_absolute() or path.suffix in known or dataset.startswith(".") or dataset.count("/") > 1:
        raise FileNotFoundError(f"dataset: no such file or folder: {dataset}")
    return None


def _read_files(files: list[Path], text_column: str) -> Iterator[dict]:
    for file in files:
        if file.suffix in _TEXT_SUFFIXES:
            yield {text_column: file.read_text(encoding="utf-8")}
        elif file.stat().st_size:
            yield from _load(_SUFFIXES[file.suffix], data_files=str(file), split="train")


def _load(path: str, **arguments) -> Iterator[dict]:
    from datasets import load_dataset

    yield from load_dataset(path, streaming=True, **arguments)
