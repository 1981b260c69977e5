"""How much of the held-out text can be found in the training text, measured on the files as written."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from nano_think.data.corpus import Block, Corpus
from nano_think.data.dedup import ngram_hashes
from nano_think.data.normalize import fold
from nano_think.data.split import SPLITS
from nano_think.data.workers import Workers

OVERLAP_WORDS = 13
# Held-out n-grams are looked up in batches of this many, so that memory stays flat.
_BATCH_NGRAMS = 2_000_000


def leakage_report(
    corpus: Corpus, excluded: list[dict[str, Any]], workers: Workers | None = None
) -> dict[str, Any]:
    """Audit a written corpus.

    Args:
        corpus: the corpus; all its records are read.
        excluded: descriptions of the near copies that were left out.
        workers: processes that read; by default this one does.

    Returns:
        "exact_overlap": texts (lower-cased, white space joined) that occur in two splits;
        "clusters_in_two_splits"; "clusters": per split the number of clusters, of clusters with more than one
        kept document and of the documents in them; "overlap_13gram": per domain the share of test documents
        and of test 13-grams that occur in the training text of any domain; "excluded".
    """
    workers = workers or Workers(1)
    texts, clusters, splits = [], [], []
    for number, split in enumerate(SPLITS):
        for text, cluster in workers.map(_identities, _all_blocks(corpus, split)):
            texts.append(text)
            clusters.append(cluster)
            splits.append(np.full(len(cluster), number))
    of_cluster, of_split = np.concatenate(clusters), np.concatenate(splits)
    return {
        "exact_overlap": _in_two_splits(np.concatenate(texts), of_split),
        "clusters_in_two_splits": _in_two_splits(of_cluster, of_split),
        "clusters": {
            split: _cluster_sizes(of_cluster[of_split == number]) for number, split in enumerate(SPLITS)
        },
        "overlap_13gram": ngram_overlap(corpus, workers=workers),
        "excluded_documents": len(excluded),
        "excluded": excluded,
    }


def ngram_overlap(
    corpus: Corpus, held_out: str = "test", train: str = "expert_train", workers: Workers | None = None
) -> dict[str, Any]:
    """Share of held-out documents and word 13-grams that occur in the training split, per held-out domain."""
    workers = workers or Workers(1)
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for domains, grams in _batches(corpus, held_out, workers):
        known = _Known(np.unique(np.concatenate(grams)))
        seen = np.zeros(len(known.hashes), dtype=bool)
        for places in workers.map(partial(_places, known), _all_blocks(corpus, train)):
            seen[places] = True
        for domain, document in zip(domains, grams, strict=True):
            hits = int(seen[np.searchsorted(known.hashes, document)].sum())
            totals[domain].update(documents=1, hit_documents=hits > 0, ngrams=len(document), hit_ngrams=hits)
    return {
        domain: {
            "documents": count["documents"],
            "documents_share": round(count["hit_documents"] / count["documents"], 6),
            "ngrams": count["ngrams"],
            "ngrams_share": round(count["hit_ngrams"] / max(1, count["ngrams"]), 6),
        }
        for domain, count in sorted(totals.items())
    }


class _Known:
    """A set of hashes that answers which of many others are in it.

    Most are not, and a table of one byte for every value of some leading bits says so at the cost of one look-up.

    Args:
        hashes: different uint64, rising.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        self.hashes = hashes
        bits = min(28, max(8, len(hashes).bit_length() + 2))
        self._shift = np.uint64(64 - bits)
        self._taken = np.zeros(1 << bits, dtype=bool)
        self._taken[hashes >> self._shift] = True

    def places(self, candidates: np.ndarray) -> np.ndarray:
        """Indices into `hashes` of the candidates that are there, each once."""
        candidates = candidates[self._taken[candidates >> self._shift]]
        places = np.minimum(np.searchsorted(self.hashes, candidates), len(self.hashes) - 1)
        return np.unique(places[self.hashes[places] == candidates])


def _identities(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """Hash (n, 2) uint64 of the folded text and cluster (n,) of each record."""
    texts, clusters = bytearray(), array("q")
    for record in block.records():
        texts += hashlib.blake2b(fold(record.text).encode(), digest_size=16).digest()
        clusters.append(record.cluster)
    return np.frombuffer(texts, np.uint64).reshape(-1, 2), np.frombuffer(clusters, np.int64)


def _ngrams(block: Block) -> list[np.ndarray]:
    """The n-grams of each record."""
    return [ngram_hashes(fold(record.text), OVERLAP_WORDS) for record in block.records()]


def _places(known: _Known, block: Block) -> np.ndarray:
    """Which known n-grams occur in a block."""
    return known.places(np.concatenate(_ngrams(block)))


def _in_two_splits(keys: np.ndarray, splits: np.ndarray) -> int:
    """How many different keys, (n,) or (n, m), occur with more than one split."""
    pairs = np.unique(np.column_stack((keys, splits.astype(keys.dtype))), axis=0)
    _, counts = np.unique(pairs[:, :-1], axis=0, return_counts=True)
    return int((counts > 1).sum())


def _cluster_sizes(clusters: np.ndarray) -> dict[str, int]:
    sizes = np.unique(clusters, return_counts=True)[1]
    several = sizes[sizes > 1]
    return {
        "clusters": len(sizes),
        "with_near_copies": len(several),
        "documents_in_those": int(several.sum()),
    }


def leakage_summary(report: dict[str, Any]) -> str:
    """Return the report as a short Markdown text."""
    lines = [
        "# Leakage report",
        "",
        f"- Texts that occur in two splits: {report['exact_overlap']}",
        f"- Near-duplicate clusters in two splits: {report['clusters_in_two_splits']}",
        f"- Near copies left out because their cluster lies in another split: {report['excluded_documents']}",
        "",
        "| split | clusters | with near copies | documents in those |",
        "|---|---:|---:|---:|",
        *(
            f"| {split} | {row['clusters']:,} | {row['with_near_copies']:,} | {row['documents_in_those']:,} |"
            for split, row in report["clusters"].items()
        ),
        "",
        "Word 13-grams of the test split that occur in expert_train:",
        "",
        "| domain | test documents | with a shared 13-gram | test 13-grams | shared |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {domain} | {row['documents']:,} | {row['documents_share']:.2%} "
            f"| {row['ngrams']:,} | {row['ngrams_share']:.2%} |"
            for domain, row in report["overlap_13gram"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _all_blocks(corpus: Corpus, split: str) -> Iterator[Block]:
    for domain in corpus.domains:
        yield from corpus.blocks(split, domain)


def _batches(corpus: Corpus, split: str, workers: Workers) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """(domain, n-grams) of the documents of a split, as two lists, so many that memory stays flat."""
    domains: list[str] = []
    grams: list[np.ndarray] = []
    for domain in corpus.domains:
        for documents in workers.map(_ngrams, corpus.blocks(split, domain)):
            domains += [domain] * len(documents)
            grams += documents
            if sum(map(len, grams)) >= _BATCH_NGRAMS:
                yield domains, grams
                domains, grams = [], []
    if sum(map(len, grams)):
        yield domains, grams
