"""Documents -> token sequences of one length, with document boundaries; held-out text that training never sees.

What is read, in which order and in which shares: the module `sources`.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .sources import Reading

IGNORED = -100  # label of a position that carries no loss
_MIN_PARAGRAPH = 80  # characters; shorter ones ("See also:") repeat everywhere and give nothing away
_OPEN_ROWS, _OPEN_TOKENS = 256, 1 << 24  # kept open for best-fit packing: so many rows, but at most so many tokens
LONG_DOCUMENTS = ("cut", "drop")


@dataclass
class PackingCount:
    """What became of the text. Tokens unless said otherwise."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    padding: int = 0
    dropped: int = 0
    dropped_documents: int = 0  # longer than a sequence, where such documents are dropped
    cut_documents: int = 0  # longer than a sequence, where such documents are cut
    held_out_characters: int = 0  # removed from training documents because the held-out text has them too
    sources: dict[str, Reading] = field(default_factory=dict)  # what was read of each data set, held-out text included

    def reset(self) -> None:
        """Count from nothing again."""
        self.__init__()

    def __str__(self) -> str:
        parts = [
            f"{self.sequences} sequences from {self.documents} documents: {self.tokens} tokens, {self.padding} of "
            f"padding, {self.dropped} dropped; {self.held_out_characters} characters left out because held-out text "
            f"has them too"
        ]
        if self.cut_documents or self.dropped_documents:
            parts.append(f"longer than a sequence: {self.cut_documents} cut, {self.dropped_documents} dropped")
        read = sum(reading.characters for reading in self.sources.values())
        if len(self.sources) > 1:
            parts += [f"{name}: {reading.share_of(read)}" for name, reading in self.sources.items()]
        return "; ".join(parts)


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
    documents: Iterable[list[int] | tuple[list[int], list[int]]],
    sequence_length: int,
    *,
    pad_token_id: int,
    document_mask: bool = True,
    long_documents: str = "cut",
    open_rows: int | None = None,
    count: PackingCount | None = None,
) -> Iterator[dict[str, list[int]]]:
    """Sequences of exactly `sequence_length` tokens: documents stay whole where they fit, best fit first.

    Order and result depend on the input alone. Pieces of a single token, which carry no loss, are dropped.

    Args:
        documents: token numbers of each; or (token numbers, labels), where labels are token numbers or −100.
        long_documents: what becomes of a document longer than a sequence: "cut" into pieces, each but the last a whole
            sequence, or "drop" it and count its tokens. Every other document is kept whole.
        open_rows: sequences that are filled side by side at most; by default, what 2^24 tokens make, at most 256. More
            of them leave less padding, fewer give the first sequence sooner.
        count: kept up to date.

    Yields dicts of lists [sequence_length]:
        input_ids: what is left over is filled with `pad_token_id`.
        labels: input_ids, or the labels given; −100 at padding and at the first token of a document (nothing before it
            predicts it).
        position_ids: from 0 in each document, which is how attention knows the boundaries; padding counts as one
            more document. Without `document_mask`: 0 … sequence_length − 1, and attention crosses the boundaries.

    Raises:
        ValueError: an unknown value of `long_documents`.
    """
    if long_documents not in LONG_DOCUMENTS:
        raise ValueError(f"long_documents must be one of {LONG_DOCUMENTS}, but was {long_documents!r}")
    count = PackingCount() if count is None else count
    most = open_rows or max(1, min(_OPEN_ROWS, _OPEN_TOKENS // sequence_length))

    def finish(pieces):
        row = _row(pieces, sequence_length, pad_token_id, document_mask)
        filled = _filled(pieces)
        count.sequences, count.tokens = count.sequences + 1, count.tokens + filled
        count.padding += sequence_length - filled
        return row

    rows: list[list[tuple[list[int], list[int]]]] = []
    for piece in _pieces(documents, sequence_length, long_documents, count):
        fitting = [row for row in rows if _filled(row) + len(piece[0]) <= sequence_length]
        row = max(fitting, key=_filled, default=None)
        if row is None:
            row = []
            rows.append(row)
        row.append(piece)
        fullest = max(rows, key=_filled)
        if _filled(fullest) >= sequence_length - 1 or len(rows) > most:
            rows.remove(fullest)
            yield finish(fullest)
    for row in rows:
        yield finish(row)


def _pieces(documents, length: int, long_documents: str, count: PackingCount) -> Iterator[tuple[list[int], list[int]]]:
    """(token numbers, labels) of what goes into one sequence each."""
    for document in documents:
        tokens, labels = document if isinstance(document, tuple) else (document, document)
        if len(tokens) > length and long_documents == "drop":
            count.dropped, count.dropped_documents = count.dropped + len(tokens), count.dropped_documents + 1
            continue
        count.cut_documents += len(tokens) > length
        for piece in zip(_cut(tokens, length), _cut(labels, length)):
            if len(piece[0]) < 2:
                count.dropped += len(piece[0])
            else:
                yield piece


def _filled(pieces: Sequence[tuple[list[int], list[int]]]) -> int:
    return sum(len(tokens) for tokens, _ in pieces)


def _tokenize(tokenizer, text: str) -> list[int]:
    """Token numbers of a document with the tokenizer's own special tokens, closed by its end-of-text token."""
    tokens = tokenizer(text, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def _cut(tokens: list[int], length: int) -> list[list[int]]:
    return [tokens[i : i + length] for i in range(0, len(tokens), length)]


def _row(pieces, length: int, pad_token_id: int, document_mask: bool) -> dict[str, list[int]]:
    tokens, labels, positions = [], [], []
    for piece, piece_labels in pieces:
        tokens += piece
        labels += [IGNORED, *piece_labels[1:]] if document_mask else piece_labels
        positions += range(len(piece))
    padding = length - len(tokens)
    return {
        "input_ids": tokens + [pad_token_id] * padding,
        "labels": labels + [IGNORED] * padding,
        "position_ids": positions + list(range(padding)) if document_mask else list(range(length)),
    }
