"""How much of the held-out text can be found in the training text, measured on the files as written."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from nano_think.data.corpus import Corpus, Record
from nano_think.data.dedup import ngram_hashes
from nano_think.data.normalize import fold
from nano_think.data.split import SPLITS

OVERLAP_WORDS = 13
# Held-out n-grams are looked up in batches of this many, so that memory stays flat.
_BATCH_NGRAMS = 4_000_000


def leakage_report(corpus: Corpus, excluded: list[dict[str, Any]]) -> dict[str, Any]:
    """Audit a written corpus.

    Args:
        corpus: the corpus; all its records are read.
        excluded: descriptions of the near copies that were left out.

    Returns:
        "exact_overlap": texts (lower-cased, white space joined) that occur in two splits;
        "clusters_in_two_splits"; "clusters": per split the number of clusters, of clusters with more than one
        kept document and of the documents in them; "overlap_13gram": per domain the share of test documents
        and of test 13-grams that occur in the training text of any domain; "excluded".
    """
    split_of_text: dict[bytes, str] = {}
    split_of_cluster: dict[int, str] = {}
    sizes: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
    shared_texts, shared_clusters = set(), set()
    for split in SPLITS:
        for record in _all_records(corpus, split):
            text = hashlib.blake2b(fold(record.text).encode(), digest_size=16).digest()
            if split_of_text.setdefault(text, split) != split:
                shared_texts.add(text)
            if split_of_cluster.setdefault(record.cluster, split) != split:
                shared_clusters.add(record.cluster)
            sizes[split][record.cluster] += 1
    return {
        "exact_overlap": len(shared_texts),
        "clusters_in_two_splits": len(shared_clusters),
        "clusters": {
            split: {
                "clusters": len(count),
                "with_near_copies": sum(size > 1 for size in count.values()),
                "documents_in_those": sum(size for size in count.values() if size > 1),
            }
            for split, count in sizes.items()
        },
        "overlap_13gram": ngram_overlap(corpus),
        "excluded_documents": len(excluded),
        "excluded": excluded,
    }


def ngram_overlap(corpus: Corpus, held_out: str = "test", train: str = "expert_train") -> dict[str, Any]:
    """Share of held-out documents and word 13-grams that occur in the training split, per held-out domain."""
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for domains, grams in _batches(corpus, held_out):
        known = np.unique(np.concatenate(grams))
        seen = np.zeros(len(known), dtype=bool)
        for record in _all_records(corpus, train):
            candidates = ngram_hashes(fold(record.text), OVERLAP_WORDS)
            position = np.minimum(np.searchsorted(known, candidates), len(known) - 1)
            seen[position[known[position] == candidates]] = True
        for domain, document in zip(domains, grams, strict=True):
            hits = int(seen[np.searchsorted(known, document)].sum())
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


def _all_records(corpus: Corpus, split: str) -> Iterator[Record]:
    for domain in corpus.domains:
        yield from corpus.documents(split, domain)


def _batches(corpus: Corpus, split: str) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    domains: list[str] = []
    grams: list[np.ndarray] = []
    size = 0
    for record in _all_records(corpus, split):
        domains.append(record.domain)
        grams.append(ngram_hashes(fold(record.text), OVERLAP_WORDS))
        size += len(grams[-1])
        if size >= _BATCH_NGRAMS:
            yield domains, grams
            domains, grams, size = [], [], 0
    if size:
        yield domains, grams
