"""Packing keeps every token and every boundary; held-out text never reaches training.

Document lengths: empty, one token (dropped: carries no loss), one less than a sequence, exactly one, one more, several.
"""

import itertools
import json
from pathlib import Path

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
    training_sequences,
)
from moba_hf.training.sources import Reading, read_documents

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


# ---- long documents, labels, open rows -----------------------------------------------------------------------------


def test_long_documents_are_cut_or_dropped_and_others_kept_whole():
    documents = [[2] * 20, [3] * 8, [4] * 7]
    for way, pieces, dropped in (("cut", [4, 7, 8, 8, 8], 0), ("drop", [7, 8], 20)):
        count = PackingCount()
        rows = list(pack(documents, LENGTH, pad_token_id=PAD, long_documents=way, count=count))
        assert sorted(len(ids) for row in rows for ids, labels in documents_of(row) if PAD not in ids) == pieces
        assert count.dropped == dropped and (count.cut_documents, count.dropped_documents) == (
            way == "cut",
            way == "drop",
        )
    assert "1 dropped" in str(count)
    with pytest.raises(ValueError, match=r"long_documents must be one of \('cut', 'drop'\), but was 'keep'"):
        list(pack(documents, LENGTH, pad_token_id=PAD, long_documents="keep"))


def test_labels_of_their_own():
    (row,) = pack([([5, 6, 7], [5, IGNORED, 7]), ([8, 9], [8, 9])], LENGTH, pad_token_id=PAD)
    assert row["labels"] == [IGNORED, IGNORED, 7, IGNORED, 9, IGNORED, IGNORED, IGNORED]


def test_rows_held_open_are_bounded():
    """Long sequences: 2^24 tokens at most wait for more documents, whatever their number."""
    read = []

    def documents():
        for i in range(10**6):
            read.append(i)
            yield [2] * (1 << 19)

    next(pack(documents(), (1 << 20) - 1, pad_token_id=PAD))
    assert len(read) == 17
    read.clear()
    next(pack(documents(), (1 << 20) - 1, pad_token_id=PAD, open_rows=2))
    assert len(read) == 3


# ---- mixtures ------------------------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    """Three sources: 100 documents of 10 characters, 20 of 50, 2 of 400."""
    for name, number, size in (("a", 100, 10), ("b", 20, 50), ("c", 2, 400)):
        rows = [json.dumps({"text": f"{name}{i:03}".ljust(size, name)}) for i in range(number)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return lambda **weights: [{"dataset": str(tmp_path / f"{n}.jsonl"), "weight": w} for n, w in weights.items()]


def test_mixture_keeps_its_weights_from_the_beginning(three):
    weights = dict(a=0.5, b=0.3, c=0.2)
    documents = list(read_documents(three(**weights)))
    for end in (200, len(documents)):
        size = {n: sum(len(d) for d in documents[:end] if d[0] == n) for n in weights}
        for name, weight in weights.items():
            assert abs(size[name] - weight * sum(size.values())) <= 400  # one document
    assert list(read_documents(three(**weights))) == documents


def test_mixture_reads_everything_and_says_what_it_read_again(three):
    readings = {}
    documents = list(read_documents(three(a=1, b=1, c=2), readings=readings))
    assert len(set(documents)) == 122
    passes = {Path(name).stem: reading.passes for name, reading in readings.items()}
    assert passes == {"a": 2, "b": 1, "c": 3}  # a and b are as long, but a ends first: one row of it is read again
    assert sum(r.rows for r in readings.values()) == len(documents)
    assert sum(r.characters for r in readings.values()) == sum(map(len, documents))
    told = str(PackingCount(sources=readings))
    assert "c.jsonl: 49.9% of the characters" in told and "5 rows, begun 3 times" in told


def test_one_source_is_read_once(three):
    readings = {}
    assert len(list(read_documents(three(b=3), readings=readings))) == 20
    assert list(readings.values()) == [Reading(20, 1000, 1)]


@pytest.mark.parametrize(
    ("mixture", "error", "message"),
    [
        ([], ValueError, "dataset must be a name or a list"),
        (["pydoc"], ValueError, "dataset must be a name or a list"),
        ([{"weight": 1}], ValueError, "dataset among them"),
        ([{"dataset": "pydoc", "share": 1}], ValueError, "has the keys"),
        ([{"dataset": "pydoc", "weight": 0}], ValueError, "weight of pydoc must be a number above 0, but was 0"),
        ([{"dataset": "pydoc", "weight": "much"}], ValueError, "must be a number above 0, but was 'much'"),
        ([{"dataset": "pydoc"}, {"dataset": "pydoc"}], ValueError, "pydoc stands twice"),
        ([{"dataset": "pydoc"}, {"dataset": "./nowhere"}], FileNotFoundError, "no such file or folder: ./nowhere"),
    ],
)
def test_mixtures_that_cannot_be(mixture, error, message):
    with pytest.raises(error, match=message):
        read_documents(mixture)


def test_an_empty_source_is_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty, but the mixture gives it weight=1\.0"):
        list(read_documents([{"dataset": "pydoc"}, {"dataset": str(tmp_path / "empty.jsonl")}]))


def test_unrelated_text_is_left_as_it_is():
    assert HeldOut([], frozenset()).remove_from("a\n\n\nb") == "a\n\n\nb"
