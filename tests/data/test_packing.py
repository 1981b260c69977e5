from __future__ import annotations

import pickle
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nano_think.data.packing import (
    IGNORE,
    RowReader,
    num_packed_rows,
    pack_row,
    pad_row,
    padded_row_ends,
)
from nano_think.data.shards import Documents

BOS, EOS, PAD = 100, 101, 102
FIELDS = ("tokens", "labels", "positions", "segments", "doc_uid", "cluster")

bodies = st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=8)
seq_lens = st.integers(1, 12)


def stream_of(texts: list[list[int]]) -> tuple[np.ndarray, Documents]:
    whole = [[BOS, *text, EOS] for text in texts]
    length = np.array([len(document) for document in whole])
    start = np.cumsum(length) - length
    numbers = np.arange(len(whole))
    docs = Documents(start, length, 50 + numbers, 70 + numbers // 2, length - 2, numbers)
    return np.concatenate([np.array(document) for document in whole]).astype(np.uint16), docs


def slow_rows(texts: list[list[int]], seq_len: int, packed: bool) -> list[dict[str, list[int]]]:
    """Rows token by token: one list of (token, label, document) cut every `seq_len`, then counted through."""
    documents = []
    for number, text in enumerate(texts):
        tokens = [BOS, *text, EOS]
        documents.append([(a, b, number) for a, b in zip(tokens, [*tokens[1:], IGNORE], strict=True)])
    rows = []
    for part in [list(chain(*documents))] if packed else documents:
        pieces = [part[i : i + seq_len] for i in range(0, len(part), seq_len)]
        # A last piece of one EOS has nothing to predict: no row is made of it.
        rows += pieces if len(pieces[-1]) > 1 or pieces[-1][0][0] != EOS else pieces[:-1]
    result = []
    for piece in rows:
        row: dict[str, list[int]] = {name: [] for name in FIELDS}
        segment = position = -1
        last = None
        for token, label, number in piece:
            position, segment = (position + 1, segment) if number == last else (0, segment + 1)
            last = number
            values = (token, label, position, segment, 50 + number, 70 + number // 2)
            for name, value in zip(FIELDS, values, strict=True):
                row[name].append(value)
        pads = seq_len - len(piece)
        for name, value in zip(FIELDS, (PAD, IGNORE, 0, -1, -1, -1), strict=True):
            row[name] += [value] * pads
        result.append(row)
    return result


def fast_rows(texts: list[list[int]], seq_len: int, packed: bool) -> list[dict[str, np.ndarray]]:
    tokens, docs = stream_of(texts)
    if packed:
        count = num_packed_rows(len(tokens), seq_len)
        return [pack_row(tokens, docs, row, seq_len, PAD) for row in range(count)]
    ends = padded_row_ends(docs, seq_len)
    return [pad_row(tokens, docs, ends, row, seq_len, PAD) for row in range(ends[-1])]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@given(texts=bodies, seq_len=seq_lens)
def test_rows_equal_the_slow_reference(packed: bool, texts: list[list[int]], seq_len: int) -> None:
    fast, slow = fast_rows(texts, seq_len, packed), slow_rows(texts, seq_len, packed)
    assert len(fast) == len(slow)
    for got, expected in zip(fast, slow, strict=True):
        assert {name: got[name].tolist() for name in FIELDS} == expected
        assert all(got[name].dtype == np.int64 and got[name].shape == (seq_len,) for name in FIELDS)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@given(texts=bodies, seq_len=seq_lens)
def test_every_token_but_bos_is_a_label_exactly_once(packed, texts, seq_len) -> None:
    labels = Counter()
    for row in fast_rows(texts, seq_len, packed):
        for uid, label in zip(row["doc_uid"].tolist(), row["labels"].tolist(), strict=True):
            if label != IGNORE:
                labels[uid, label] += 1
    expected = Counter((50 + number, token) for number, text in enumerate(texts) for token in [*text, EOS])
    assert labels == expected


@given(texts=bodies, seq_len=seq_lens)
def test_packed_rows_waste_nothing_before_the_end_of_the_stream(texts, seq_len) -> None:
    rows = fast_rows(texts, seq_len, packed=True)
    assert all((row["segments"] >= 0).all() for row in rows[:-1])
    pads = int((rows[-1]["segments"] < 0).sum())
    assert pads < seq_len
    tokens, _ = stream_of(texts)
    # The stream's last EOS may fall behind the last row: it predicts nothing and is already a label.
    assert len(rows) * seq_len - pads in (len(tokens), len(tokens) - 1)


def test_one_packed_row_by_hand() -> None:
    tokens, docs = stream_of([[1, 2, 3, 4], [5], [6, 7]])
    row = pack_row(tokens, docs, 1, 5, PAD)
    assert row["tokens"].tolist() == [EOS, BOS, 5, EOS, BOS]
    assert row["labels"].tolist() == [IGNORE, 5, EOS, IGNORE, 6]
    assert row["positions"].tolist() == [0, 0, 1, 2, 0]
    assert row["segments"].tolist() == [0, 1, 1, 1, 2]
    assert row["doc_uid"].tolist() == [50, 51, 51, 51, 52]
    assert row["cluster"].tolist() == [70, 70, 70, 70, 71]


def test_no_rows_in_an_empty_stream() -> None:
    assert num_packed_rows(0, 8) == 0
    assert [num_packed_rows(n, 8) for n in (2, 9, 10, 17, 18)] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_reader_stacks_rows_of_any_domain(make_shards, mode: str) -> None:
    shards = make_shards({"expert_train": {"a": ["abcdef", "gh"], "b": ["ij"]}})
    reader = RowReader(shards, "expert_train", 4, mode)
    assert reader.rows_per_domain == [3, 1]
    batch = reader.batch([(1, 0), (0, 2), (0, 0)])
    assert batch["domain"].tolist() == [1, 0, 0]
    assert set(batch) == {*FIELDS, "domain", "row"}
    for name in FIELDS:
        assert batch[name].dtype == torch.int64
        assert batch[name].shape == (3, 4)
        assert torch.equal(batch[name][1], torch.from_numpy(reader.row(0, 2)[name]))
    assert batch["tokens"][0].tolist() == [256, ord("i"), ord("j"), 257]
    copy = pickle.loads(pickle.dumps(reader))
    assert len(pickle.dumps(reader)) < 3000  # the mapped files stay out of it
    assert torch.equal(copy.batch([(0, 1)])["tokens"], reader.batch([(0, 1)])["tokens"])


def test_reader_refuses_nonsense(make_shards) -> None:
    shards = make_shards({"expert_train": {"a": ["text"]}})
    with pytest.raises(ValueError, match="choose packed or padded"):
        RowReader(shards, "expert_train", 4, "stacked")
    with pytest.raises(ValueError, match="seq_len=0"):
        RowReader(shards, "expert_train", 0)
