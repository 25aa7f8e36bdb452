"""Documents -> token sequences of one length, with document boundaries; held-out text that training never sees."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PYDOC = "pydoc"
IGNORED = -100  # label of a position that carries no loss
_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_TEXT_SUFFIXES = (".txt", ".md", ".rst")
_MIN_PARAGRAPH = 80  # characters; shorter ones ("See also:") repeat everywhere and give nothing away
_OPEN_ROWS = 256  # rows kept open for best-fit packing


@dataclass
class PackingCount:
    """What became of the text. Tokens unless said otherwise."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    padding: int = 0
    dropped: int = 0
    held_out_characters: int = 0  # removed from training documents because the held-out text has them too

    def __str__(self) -> str:
        return (
            f"{self.sequences} sequences from {self.documents} documents: {self.tokens} tokens, {self.padding} of "
            f"padding, {self.dropped} dropped; {self.held_out_characters} characters left out because held-out text "
            f"has them too"
        )


# ---- documents -----------------------------------------------------------------------------------------------------


def read_documents(
    dataset: str, *, config: str | None = None, split: str = "train", text_column: str = "text"
) -> Iterator[str]:
    """The documents of a data set, in its order, one string each; read as they are asked for.

    Args:
        dataset: "pydoc" (the topics that Python's own help() shows), a local file or folder (.txt, .md and .rst: one
            document per file; .jsonl and .parquet: one per row), or a hub id.
        config, split: of a hub data set.
        text_column: of everything that has columns.

    Raises:
        FileNotFoundError: a local path without such files. ValueError: no column of that name.
    """
    if dataset == PYDOC:
        from pydoc_data.topics import topics

        return iter([topics[name] for name in sorted(topics)])
    files = _local_files(dataset)
    if files is None:
        return _rows(dataset, text_column, name=config, split=split)
    return _read_files(files, text_column)


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
    if path.is_absolute() or path.suffix in known or dataset.startswith("."):
        raise FileNotFoundError(f"dataset: no such file or folder: {dataset}")
    return None


def _read_files(files: list[Path], text_column: str) -> Iterator[str]:
    for file in files:
        if file.suffix in _TEXT_SUFFIXES:
            yield file.read_text(encoding="utf-8")
        else:
            yield from _rows(_SUFFIXES[file.suffix], text_column, data_files=str(file), split="train")


def _rows(path: str, text_column: str, **arguments) -> Iterator[str]:
    from datasets import load_dataset

    for row in load_dataset(path, streaming=True, **arguments):
        if text_column not in row:
            raise ValueError(f"text_column={text_column!r} is no column of the data; it has {sorted(row)}")
        yield row[text_column]


# ---- held-out text -------------------------------------------------------------------------------------------------


def is_held_out(document: str, share: float) -> bool:
    """Whether the document is on the held-out side. Depends on its text alone, so every run and process agrees."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


@dataclass(frozen=True)
class HeldOut:
    """Held-out sequences and the paragraphs they came from.

    Attributes:
        sequences: token numbers, each exactly sequence_length long and from one document: the trailing loss is the
            loss far into a document, so shorter ones would not measure it.
        paragraphs: digests of every paragraph of the documents used.
    """

    sequences: list[list[int]]
    paragraphs: frozenset[bytes]

    def remove_from(self, document: str) -> str:
        """The document without the paragraphs that the held-out text has too (manuals and web pages repeat)."""
        if self.paragraphs.isdisjoint(_digests(document)):
            return document
        kept = [p for p in _paragraphs(document) if len(p) < _MIN_PARAGRAPH or _digest(p) not in self.paragraphs]
        return "\n\n".join(kept)


def hold_out(documents: Iterable[str], tokenizer, *, sequence_length: int, share: float, sequences: int) -> HeldOut:
    """Take `sequences` full-length sequences from the held-out documents, first one from each, then the next ones.

    Stops reading once as many documents have given one. ValueError where no held-out document is long enough.
    """
    found, paragraphs, seen = [], set(), 0
    for document in documents:
        if not is_held_out(document, share):
            continue
        seen += 1
        pieces = [p for p in _cut(_tokenize(tokenizer, document), sequence_length) if len(p) == sequence_length]
        if pieces:
            found.append(pieces)
            paragraphs |= _digests(document)
        if len(found) == sequences:
            break
    if not found:
        raise ValueError(
            f"held-out text is empty: none of the {seen} documents held out (held_out_share={share}) has "
            f"sequence_length={sequence_length} tokens; raise the share or shorten the sequences"
        )
    turns = range(max(map(len, found)))
    in_turn = [pieces[turn] for turn in turns for pieces in found if turn < len(pieces)]
    return HeldOut(in_turn[:sequences], frozenset(paragraphs))


def _paragraphs(document: str) -> list[str]:
    return re.split(r"\n\s*\n", document)


def _digest(paragraph: str) -> bytes:
    return hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=8).digest()


def _digests(document: str) -> set[bytes]:
    return {_digest(p) for p in _paragraphs(document) if len(p) >= _MIN_PARAGRAPH}


# ---- packing -------------------------------------------------------------------------------------------------------


def training_sequences(
    documents: Iterable[str],
    tokenizer,
    held_out: HeldOut,
    *,
    sequence_length: int,
    share: float,
    document_mask: bool = True,
    count: PackingCount | None = None,
) -> Iterator[dict[str, list[int]]]:
    """Packed training sequences (see `pack`) of the documents that are not held out; `count` is kept up to date."""
    count = PackingCount() if count is None else count

    def tokens():
        for document in documents:
            if is_held_out(document, share):
                continue
            text = held_out.remove_from(document)
            count.held_out_characters += len(document) - len(text)
            count.documents += 1
            yield _tokenize(tokenizer, text)

    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return pack(tokens(), sequence_length, pad_token_id=pad or 0, document_mask=document_mask, count=count)


def pack(
    documents: Iterable[list[int]],
    sequence_length: int,
    *,
    pad_token_id: int,
    document_mask: bool = True,
    count: PackingCount | None = None,
) -> Iterator[dict[str, list[int]]]:
    """Sequences of exactly `sequence_length` tokens: documents stay whole where they fit, best fit first.

    Longer documents are cut. Only pieces of a single token, which carry no loss, are dropped. Order and result depend
    on the input alone.

    Yields dicts of lists [sequence_length]:
        input_ids: what is left over is filled with `pad_token_id`.
        labels: input_ids, −100 at padding and at the first token of a document (nothing before it predicts it).
        position_ids: from 0 in each document, which is how attention knows the boundaries; padding counts as one
            more document. Without `document_mask`: 0 … sequence_length − 1, and attention crosses the boundaries.
    """
    count = PackingCount() if count is None else count

    def finish(pieces):
        row = _row(pieces, sequence_length, pad_token_id, document_mask)
        filled = sum(map(len, pieces))
        count.sequences, count.tokens = count.sequences + 1, count.tokens + filled
        count.padding += sequence_length - filled
        return row

    open_rows: list[list[list[int]]] = []
    for document in documents:
        for piece in _cut(document, sequence_length):
            if len(piece) < 2:
                count.dropped += len(piece)
                continue
            fitting = [row for row in open_rows if sum(map(len, row)) + len(piece) <= sequence_length]
            row = max(fitting, key=lambda row: sum(map(len, row)), default=None)
            if row is None:
                row = []
                open_rows.append(row)
            row.append(piece)
            fullest = max(open_rows, key=lambda row: sum(map(len, row)))
            if sum(map(len, fullest)) >= sequence_length - 1 or len(open_rows) > _OPEN_ROWS:
                open_rows.remove(fullest)
                yield finish(fullest)
    for row in open_rows:
        yield finish(row)


def _tokenize(tokenizer, text: str) -> list[int]:
    """Token numbers of a document with the tokenizer's own special tokens, closed by its end-of-text token."""
    tokens = tokenizer(text, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def _cut(tokens: list[int], length: int) -> list[list[int]]:
    return [tokens[i : i + length] for i in range(0, len(tokens), length)]


def _row(pieces: list[list[int]], length: int, pad_token_id: int, document_mask: bool) -> dict[str, list[int]]:
    tokens, labels, positions = [], [], []
    for piece in pieces:
        tokens += piece
        labels += [IGNORED, *piece[1:]] if document_mask else piece
        positions += range(len(piece))
    padding = length - len(tokens)
    return {
        "input_ids": tokens + [pad_token_id] * padding,
        "labels": labels + [IGNORED] * padding,
        "position_ids": positions + list(range(padding)) if document_mask else list(range(length)),
    }
