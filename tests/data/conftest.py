"""Prepared corpora and token shards small enough to check by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from nano_think.data.corpus import Corpus
from nano_think.data.shards import SPLITS, Shards, build_shards
from nano_think.tokenizer import Tokenizer, train_bpe

Texts = Mapping[str, Mapping[str, list[str]]]


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """One token a byte, so that expected tokens can be written down."""
    return train_bpe(["x"], 259)


@pytest.fixture
def write_corpus(tmp_path) -> Callable[..., Corpus]:
    """`write_corpus({split: {domain: [text, ...]}}, name="corpus")` lays out a prepared corpus by hand.

    uids count up from 1 over the whole corpus; the cluster of a document is its uid plus 1000.
    """

    def write(texts: Texts, name: str = "corpus") -> Corpus:
        root: Path = tmp_path / name
        domains = sorted({domain for split in texts.values() for domain in split})
        uid = 0
        for split in SPLITS:
            (root / split).mkdir(parents=True)
            for domain in domains:
                with open(root / split / f"{domain}.jsonl", "w", encoding="utf-8") as file:
                    for text in texts.get(split, {}).get(domain, []):
                        uid += 1
                        record = {"uid": uid, "cluster": uid + 1000, "text": text, "domain": domain}
                        record |= {"source": "hand", "id": str(uid)}
                        file.write(json.dumps(record) + "\n")
        manifest = {"domains": domains, "hash": f"hash of {name}"}
        (root / "manifest.json").write_text(json.dumps(manifest))
        return Corpus(root)

    return write


@pytest.fixture
def make_shards(write_corpus, byte_tokenizer, tmp_path) -> Callable[..., Shards]:
    """Token shards of `write_corpus`, a token a byte."""

    def make(texts: Texts, name: str = "corpus") -> Shards:
        return build_shards(write_corpus(texts, name), byte_tokenizer, tmp_path / f"{name}_shards")

    return make
