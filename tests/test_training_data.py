"""Packing keeps every token and every boundary; held-out text never reaches training.

Document lengths: empty, one token (dropped: carries no loss), one less than a sequence, exactly one, one more, several.
"""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_hf.training.data import (
    IGNORED,
    HeldOut,
    PackingCount,
    hold_out,
    is_held_out,
    pack,
    read_documents,
    training_sequences,
)

LENGTH, PAD, END = 8, 0, 1


class WordTokenizer:
    """Every word is one token: its length plus 10."""

    eos_token_id, pad_token_id = END, PAD

    def __call__(self, text, verbose=True):
        return {"input_ids": [len(word) + 10 for word in text.split()]}


def documents_of(row):
    """(input_ids, labels) of the documents of a packed row, by position_ids, padding included."""
    starts = [i for i, position in enumerate(row["position_ids"]) if position == 0] + [len(row["input_ids"])]
    return [(row["input_ids"][a:b], row["labels"][a:b]) for a, b in itertools.pairwise(starts)]


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 30]), max_size=12))
def test_packing_keeps_every_token(lengths):
    documents = [[100 * n + i for i in range(length)] for n, length in enumerate(lengths, start=1)]
    count = PackingCount()
    rows = list(pack(documents, LENGTH, pad_token_id=PAD, count=count))
    pieces = [ids for row in rows for ids, labels in documents_of(row) if any(x != IGNORED for x in labels)]

    assert all(len(row[key]) == LENGTH for row in rows for key in ("input_ids", "labels", "position_ids"))
    expected = [d[i : i + LENGTH] for d in documents for i in range(0, len(d), LENGTH)]
    assert sorted(pieces) == sorted(p for p in expected if len(p) > 1)
    assert count.dropped == sum(len(p) == 1 for p in expected)
    assert count.tokens + count.padding == LENGTH * count.sequences == LENGTH * len(rows)
    assert count.tokens + count.dropped == sum(lengths)


def test_labels_stop_at_document_boundaries_and_padding():
    (row,) = pack([[5, 6, 7], [8, 9]], LENGTH, pad_token_id=PAD)
    assert row["input_ids"] == [5, 6, 7, 8, 9, PAD, PAD, PAD]
    assert row["labels"] == [IGNORED, 6, 7, IGNORED, 9, IGNORED, IGNORED, IGNORED]
    assert row["position_ids"] == [0, 1, 2, 0, 1, 0, 1, 2]


def test_without_document_mask_attention_crosses():
    (row,) = pack([[5, 6, 7], [8, 9]], LENGTH, pad_token_id=PAD, document_mask=False)
    assert row["labels"] == [5, 6, 7, 8, 9, IGNORED, IGNORED, IGNORED]
    assert row["position_ids"] == list(range(LENGTH))


def test_documents_stay_whole_where_they_fit():
    rows = list(pack([[2] * 5, [3] * 6, [4] * 3, [5] * 2], LENGTH, pad_token_id=PAD))
    assert [len(documents_of(row)) for row in rows] == [2, 2]
    assert not any(PAD in row["input_ids"] for row in rows)


def long_documents():
    return [" ".join(f"{'x' * (i % 7)}{n}" for i in range(40)) for n in range(60)]


def test_held_out_documents_and_their_paragraphs_are_not_trained_on():
    documents = long_documents()
    held_out = hold_out(documents, WordTokenizer(), sequence_length=LENGTH, share=0.3, sequences=12)
    assert len(held_out.sequences) == 12 and all(len(s) == LENGTH for s in held_out.sequences)

    hidden = next(d for d in documents if is_held_out(d, 0.3))
    others = [d for d in documents if not is_held_out(d, 0.3)]
    quoting = next(
        d for d in (f"new words {i}\n\n{hidden}\n\nlast words" for i in range(99)) if not is_held_out(d, 0.3)
    )
    count = PackingCount()
    rows = list(
        training_sequences(
            [*documents, quoting], WordTokenizer(), held_out, sequence_length=LENGTH, share=0.3, count=count
        )
    )
    assert count.documents == len(others) + 1
    assert len(hidden) <= count.held_out_characters <= len(hidden) + 4
    assert sum(len(row["input_ids"]) for row in rows) == LENGTH * count.sequences


def test_held_out_sequences_come_from_as_many_documents_as_there_are():
    documents = long_documents()
    held = [d for d in documents if is_held_out(d, 0.1)]
    found = hold_out(documents, WordTokenizer(), sequence_length=LENGTH, share=0.1, sequences=len(held) + 1).sequences
    starts = [WordTokenizer()(d)["input_ids"][:LENGTH] for d in held]
    assert found[: len(held)] == starts
    assert found[len(held)] == WordTokenizer()(held[0])["input_ids"][LENGTH : 2 * LENGTH]


def test_no_held_out_text_is_an_error():
    with pytest.raises(ValueError, match=r"held-out text is empty.*held_out_share=0.5.*sequence_length=100"):
        hold_out(long_documents(), WordTokenizer(), sequence_length=100, share=0.5, sequences=2)


def test_documents_of_every_file_type(tmp_path):
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("second", "third")), encoding="utf-8")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["fourth"]}), tmp_path / "c.parquet")
    assert list(read_documents(str(tmp_path))) == ["first", "second", "third", "fourth"]
    assert list(read_documents(str(tmp_path / "a.txt"))) == ["first"]
    with pytest.raises(ValueError, match=r"text_column='words'.*\['text'\]"):
        list(read_documents(str(tmp_path / "b.jsonl"), text_column="words"))


def test_python_manual_is_there_without_a_network():
    assert sum(map(len, read_documents("pydoc"))) > 300_000


@pytest.mark.parametrize("missing", ["nowhere.jsonl", "./nowhere", "/nowhere/at/all"])
def test_missing_files_are_named(missing):
    with pytest.raises(FileNotFoundError, match=missing):
        read_documents(missing)


def test_unrelated_text_is_left_as_it_is():
    assert HeldOut([], frozenset()).remove_from("a\n\n\nb") == "a\n\n\nb"
