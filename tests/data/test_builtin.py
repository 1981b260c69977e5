from __future__ import annotations

from collections import Counter

import pytest

from nano_think.data.builtin import GRAMMARS, MAX_IMBALANCE, BuiltinSource
from nano_think.data.prepare import prepare_corpus
from nano_think.data.split import SPLITS
from nano_think.errors import UserError


def domain_bytes(source):
    counts = Counter()
    for document in source:
        counts[document.domain] += len(document.text.encode())
    return counts


def test_same_seed_same_text_other_seed_other_text():
    assert list(BuiltinSource(0.5, seed=1)) == list(BuiltinSource(0.5, seed=1))
    one, two = ({d.text for d in BuiltinSource(0.5, seed=seed) if d.domain in GRAMMARS} for seed in (1, 2))
    assert not one & two
    assert BuiltinSource(0.5, seed=1).fingerprint() == BuiltinSource(0.5, seed=1).fingerprint()
    keys = {BuiltinSource(size, seed).fingerprint() for size in (0.5, 1.0) for seed in (1, 2)}
    assert len(keys) == 4


@pytest.mark.parametrize("megabytes", [0.5, 8.0, 40.0])
def test_domains_are_of_similar_size(megabytes):
    counts = domain_bytes(BuiltinSource(megabytes))
    assert sorted(counts) == ["academic", "code", "general", "philosophy", "theology"]
    assert max(counts.values()) <= MAX_IMBALANCE * min(counts.values()) * 1.02
    assert max(counts.values()) <= 1.02 * max(megabytes * 1e6 / 5, 2048 * 5)
    if megabytes == 8.0:
        assert 6.5e6 < sum(counts.values()) < 8.1e6


def test_every_generated_record_is_marked_synthetic_and_no_other():
    source = BuiltinSource(0.5)
    synthetic = source.describe()["synthetic"]
    for document in source:
        assert document.source.startswith("synthetic:grammar/") == synthetic[document.domain]
    assert synthetic == {
        "academic": False,
        "code": False,
        "general": True,
        "philosophy": True,
        "theology": True,
    }
    assert sorted(source.describe()["licences"]) == sorted(synthetic)


def test_ids_are_unique():
    documents = list(BuiltinSource(0.5))
    assert len({(d.source, d.id) for d in documents}) == len(documents)


def test_prepared_corpus_has_every_split_and_no_collapse(tmp_path):
    corpus = prepare_corpus(BuiltinSource(1.0), tmp_path / "corpus")
    manifest = corpus.manifest
    assert manifest["synthetic"]["general"] is True
    assert all(
        manifest["splits"][split][domain]["documents"] for split in SPLITS for domain in corpus.domains
    )
    generated = sum(1 for d in BuiltinSource(1.0) if d.domain in GRAMMARS)
    kept = [r for split in SPLITS for domain in GRAMMARS for r in corpus.documents(split, domain)]
    assert len(kept) == generated
    assert len({record.cluster for record in kept}) == generated
    assert manifest["removed"]["near_copies_across_splits"] < 10
    assert corpus.leakage["exact_overlap"] == 0


@pytest.mark.parametrize("megabytes", [0, -1.0])
def test_a_size_that_makes_no_sense_is_refused(megabytes):
    with pytest.raises(UserError, match="must be positive"):
        BuiltinSource(megabytes)
