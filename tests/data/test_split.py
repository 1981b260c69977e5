from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_think.data.split import FRACTIONS, SPLITS, own_split, resolve_clusters

documents = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8)), min_size=1, max_size=30)


def test_shares_are_as_stated():
    n = 20_000
    counts = Counter(own_split(f"document number {i}") for i in range(n))
    for index, fraction in enumerate(FRACTIONS):
        deviation = 5 * (n * fraction * (1 - fraction)) ** 0.5
        assert abs(counts[index] - n * fraction) < deviation, SPLITS[index]


def test_a_split_is_a_pure_function_of_content_and_salt():
    texts = [f"text {i}" for i in range(300)]
    first = [own_split(text, "salt") for text in texts]
    assert first == [own_split(text, "salt") for text in reversed(texts)][::-1]
    assert first != [own_split(text, "other") for text in texts]
    assert [own_split("bc", "a")] * 3 == [own_split("bc", "a") for _ in range(3)]


def test_salt_and_text_do_not_run_into_each_other():
    assert any(own_split(f"b{i}", "a") != own_split(f"{i}", "ab") for i in range(200))


@given(documents)
def test_no_cluster_spans_two_splits_and_the_most_held_out_one_wins(rows):
    own, clusters = [split for split, _ in rows], [cluster for _, cluster in rows]
    keep = resolve_clusters(own, clusters).tolist()
    for cluster in set(clusters):
        members = [i for i, label in enumerate(clusters) if label == cluster]
        assert {own[i] for i in members if keep[i]} == {max(own[i] for i in members)}


@given(documents, st.tuples(st.integers(0, 3), st.integers(0, 8)))
def test_one_more_document_only_excludes_members_of_its_cluster(rows, new):
    own, clusters = [split for split, _ in rows], [cluster for _, cluster in rows]
    before = resolve_clusters(own, clusters)
    after = resolve_clusters([*own, new[0]], [*clusters, new[1]])
    for i, (was, now) in enumerate(zip(before, after[:-1], strict=True)):
        assert was or not now, "an excluded document came back"
        if was != now:
            assert clusters[i] == new[1]
            assert own[i] < new[0]


@given(documents, st.randoms(use_true_random=False))
def test_the_order_of_documents_does_not_matter(rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    own, clusters = zip(*rows, strict=True)
    keep = resolve_clusters(own, clusters).tolist()
    shuffled = resolve_clusters([own[i] for i in order], [clusters[i] for i in order])
    assert shuffled.tolist() == [keep[i] for i in order]


def test_lengths_must_agree():
    with pytest.raises(ValueError):
        resolve_clusters([0, 1], [0])
