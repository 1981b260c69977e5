from __future__ import annotations

import random
import re
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_think.data.dedup import (
    NUM_PERMUTATIONS,
    SignatureFile,
    UnionFind,
    _pieces,
    exact_jaccard,
    near_duplicates,
    ngram_hashes,
    signature,
)


def shingles(text, n=5):
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def true_jaccard(a, b):
    a, b = shingles(a), shingles(b)
    return len(a & b) / len(a | b) if a and b else 0.0


def random_text(rng, words=120, vocabulary=400):
    return " ".join(f"w{rng.randrange(vocabulary)}" for _ in range(words))


def edited(rng, text, edits):
    words = text.split()
    for _ in range(edits):
        words[rng.randrange(len(words))] = f"new{rng.randrange(10**6)}"
    return " ".join(words)


def clusters_of(texts, threshold=0.8):
    rows = np.stack([signature(text) for text in texts])
    sets = near_duplicates(rows, threshold, lambda i, j: exact_jaccard(texts[i], texts[j]))
    groups = {}
    for i, text in enumerate(texts):
        groups.setdefault(sets.find(i), set()).add(text)
    return {frozenset(group) for group in groups.values()}


def brute_force_clusters(texts, threshold=0.8):
    groups = [{text} for text in texts]
    for i, a in enumerate(texts):
        for b in texts[:i]:
            if true_jaccard(a, b) >= threshold:
                first, second = (next(g for g in groups if t in g) for t in (a, b))
                if first is not second:
                    first |= second
                    groups.remove(second)
    return {frozenset(group) for group in groups}


def test_ngram_hashes_are_equal_exactly_where_the_ngrams_are():
    rng = random.Random(0)
    text = random_text(rng, words=3000, vocabulary=6)
    words = text.split()
    grams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    hashes = ngram_hashes(text, 3)
    assert len(hashes) == len(grams)
    assert len({*zip(grams, hashes.tolist(), strict=True)}) == len(set(grams)) == len(set(hashes.tolist()))


def test_ngram_order_and_border_matter():
    assert ngram_hashes("a b", 2)[0] != ngram_hashes("b a", 2)[0]
    assert ngram_hashes("ab c", 2)[0] != ngram_hashes("a bc", 2)[0]
    assert len(ngram_hashes("only four words here", 5)) == 0
    assert signature("only four words here") is None


@given(st.text(), st.text(alphabet="aB_1 -\u00e9\u0661\U0001d7d9\u0301\u4e2d\ud800"), st.integers(1, 3))
def test_words_are_those_of_the_regular_expression(any_text, chosen, n):
    for text in (any_text, chosen):
        words = re.findall(r"\w+", text)
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        hashes = ngram_hashes(text, n).tolist()
        assert len(hashes) == len(grams)
        assert len({*zip(grams, hashes, strict=True)}) == len(set(grams)) == len(set(hashes))


def test_a_long_text_is_hashed_in_pieces_without_a_seam(monkeypatch):
    text = random_text(random.Random(8), words=500)
    whole = ngram_hashes(text, 4)
    for size in (1, 7, 100):
        monkeypatch.setattr("nano_think.data.dedup._PIECE", size)
        assert (ngram_hashes(text, 4) == whole).all()
    monkeypatch.setattr("nano_think.data.dedup._PIECE", 8)
    assert len(ngram_hashes("x" * 100, 1)) == 1, "a word is not cut"


def test_a_text_without_blanks_is_hashed_in_pieces_too(monkeypatch):
    monkeypatch.setattr("nano_think.data.dedup._PIECE", 8)
    monkeypatch.setattr("nano_think.data.dedup._LONGEST_WORD", 20)
    assert [len(piece) for piece in _pieces("x" * 100)] == [28, 28, 28, 16]
    clauses = "\u5929\u5730\u7384\u9ec4\uff0c" * 30
    assert max(len(piece) for piece in _pieces(clauses)) <= 8 + 5
    whole = re.findall(r"\w+", clauses)
    assert len(set(ngram_hashes(clauses, 1).tolist())) == len(set(whole)) == 1
    assert len(ngram_hashes(clauses, 1)) == len(whole)


def test_a_signature_file_reads_like_an_array():
    rows = np.stack([signature(random_text(random.Random(i))) for i in range(9)])
    with tempfile.TemporaryFile(buffering=0) as file:
        table = SignatureFile(file)
        table.append(rows[:4].tobytes())
        assert (table[3] == rows[3]).all()
        table.append(rows[4:].tobytes())
        assert len(table) == 9
        assert (table[2:7] == rows[2:7]).all()
        assert (table[8:20] == rows[8:]).all()
        assert table[20:30].shape == (0, NUM_PERMUTATIONS)
        assert (table[np.array([5, 0])] == rows[[5, 0]]).all()
        assert table[np.array([], dtype=int)].shape == (0, NUM_PERMUTATIONS)


def test_clusters_from_a_file_are_those_from_memory_and_skip_rows_left_out():
    rng = random.Random(9)
    texts = [random_text(rng) for _ in range(40)]
    texts += [edited(rng, text, 1) for text in texts[:20]]
    rows = np.stack([signature(text) for text in texts])
    exact = lambda i, j: exact_jaccard(texts[i], texts[j])  # noqa: E731
    memory = near_duplicates(rows, 0.8, exact)
    with tempfile.TemporaryFile(buffering=0) as file:
        table = SignatureFile(file)
        table.append(rows.tobytes())
        on_disk = near_duplicates(table, 0.8, exact)
        some = near_duplicates(table, 0.8, exact, np.arange(10, 60))
    labels = [memory.find(i) for i in range(60)]
    assert labels == [on_disk.find(i) for i in range(60)]
    assert len(set(labels)) < 60
    assert [some.find(i) for i in range(10)] == list(range(10))
    assert [some.find(i) for i in range(50, 60)] == [memory.find(i) for i in range(50, 60)]


def test_exact_jaccard_matches_sets_of_tuples():
    rng = random.Random(1)
    for edits in (0, 1, 3, 10, 60):
        a = random_text(rng)
        b = edited(rng, a, edits)
        assert exact_jaccard(a, b) == pytest.approx(true_jaccard(a, b), abs=1e-12)
    assert exact_jaccard("too short", "too short") == 0.0


def test_signatures_estimate_the_jaccard_index():
    rng = random.Random(2)
    errors = []
    for _ in range(60):
        a = random_text(rng, words=200, vocabulary=10**6)
        b = edited(rng, a, rng.randrange(40))
        errors.append((signature(a) == signature(b)).mean() - true_jaccard(a, b))
    # 60 estimates with standard error at most 0.5 / sqrt(128) = 0.044 each: mean within 4 standard errors.
    assert abs(np.mean(errors)) < 4 * 0.044 / np.sqrt(60)
    assert np.abs(errors).max() < 0.2


def test_a_signature_does_not_depend_on_block_borders():
    rng = random.Random(3)
    long = random_text(rng, words=9000, vocabulary=10**6)
    halves = [long.split()[:5002], long.split()[4998:]]
    parts = [signature(" ".join(words)) for words in halves]
    assert (signature(long) == np.minimum(*parts)).all()


def test_clusters_equal_brute_force():
    rng = random.Random(4)
    texts = []
    for _ in range(25):
        base = random_text(rng)
        # Between 0 and 9 edits of 120 words: Jaccard from 1 down to about 0.5, on both sides of the threshold.
        texts += [base, *(edited(rng, base, rng.randrange(10)) for _ in range(4))]
    texts = sorted(set(texts))
    expected = brute_force_clusters(texts)
    assert 25 < len(expected) < len(texts)
    assert clusters_of(texts) == expected
    rng.shuffle(texts)
    assert clusters_of(texts) == expected


def test_many_copies_do_not_take_quadratic_work():
    rng = random.Random(5)
    base = random_text(rng)
    texts = [base + f" tail{i}" for i in range(400)]
    calls = 0

    def exact(i, j):
        nonlocal calls
        calls += 1
        return exact_jaccard(texts[i], texts[j])

    sets = near_duplicates(np.stack([signature(text) for text in texts]), 0.8, exact)
    assert len({sets.find(i) for i in range(len(texts))}) == 1
    assert calls < 2 * len(texts)


def test_unrelated_texts_and_empty_input():
    rng = random.Random(6)
    texts = [random_text(rng, vocabulary=10**6) for _ in range(50)]
    assert len(clusters_of(texts)) == 50
    empty = near_duplicates(np.empty((0, NUM_PERMUTATIONS), dtype=np.uint32), 0.8, lambda i, j: 1.0)
    assert isinstance(empty, UnionFind)
