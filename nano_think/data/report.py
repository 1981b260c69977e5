"""What a tokenizer makes of a corpus: bytes a token, lengths and single-byte tokens for each domain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from rich.table import Table

from nano_think.data.corpus import Corpus
from nano_think.data.shards import Shards
from nano_think.tokenizer import Tokenizer

_TokenBatches = Iterable[tuple[np.ndarray, np.ndarray]]  # (ids of some documents in a row, tokens of each)


def bytes_per_token(tokenizer: Tokenizer, corpus: Corpus, split: str) -> dict[str, float]:
    """UTF-8 bytes a token for each domain; 0 for a domain without text."""
    domains = token_report(tokenizer, corpus, split)["domains"]
    return {name: figures["bytes_per_token"] for name, figures in domains.items()}


def token_report(tokenizer: Tokenizer, corpus: Corpus, split: str) -> dict[str, Any]:
    """Figures of one split, tokenised on the way; see `shard_report` for the keys."""

    def batches(domain: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        texts = (record.text for record in corpus.documents(split, domain))
        while batch := list(islice(texts, 256)):
            encoded = tokenizer.encode_batch(batch)
            lengths = np.array([len(ids) for ids in encoded], np.int64)
            yield np.concatenate([np.array(ids, np.int64) for ids in encoded]), lengths

    return _report(tokenizer, split, {domain: batches(domain) for domain in corpus.domains})


def shard_report(tokenizer: Tokenizer, shards: Shards, split: str) -> dict[str, Any]:
    """Figures of one split from its token shards: the same as `token_report` without encoding again.

    Returns:
        `split`, `vocab_size`, `tokenizer_hash` and `domains`, for each: `documents`, `tokens` (without BOS
            and
        EOS), `bytes`, `bytes_per_token`, `vocab_used` (share of the ordinary tokens that occur),
        `single_byte_share` (share of tokens that are one byte), `byte_fallback_share` (share of tokens that
        are one byte of a longer character, that is, text the vocabulary has no token for), `mean_length` and
        `length_histogram` (tokens a document: `below` the bound and not below the one before -> documents).
    """
    shards.check_tokenizer(tokenizer.hash)

    def batches(domain: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        docs, tokens = shards.docs(split, domain), shards.tokens(split, domain)
        for first in range(0, len(docs), 1024):
            lengths = np.asarray(docs.length[first : first + 1024])
            begin = int(docs.start[first])
            yield np.asarray(tokens[begin : begin + int(lengths.sum())]), lengths - 2

    return _report(tokenizer, split, {domain: batches(domain) for domain in shards.domains})


def _report(tokenizer: Tokenizer, split: str, domains: dict[str, _TokenBatches]) -> dict[str, Any]:
    return {
        "split": split,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_hash": tokenizer.hash,
        "domains": {name: _figures(tokenizer, batches) for name, batches in domains.items()},
    }


def _figures(tokenizer: Tokenizer, batches: _TokenBatches) -> dict[str, Any]:
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    lengths = [np.empty(0, np.int64)]
    for ids, document_lengths in batches:
        counts += np.bincount(ids, minlength=tokenizer.vocab_size)
        lengths.append(document_lengths)
    length = np.concatenate(lengths)
    ordinary = tokenizer.byte_lengths > 0
    counts *= ordinary
    tokens, num_bytes = int(counts.sum()), int(counts @ tokenizer.byte_lengths)
    single = tokenizer.byte_lengths == 1
    high = np.array([tokenizer.token_bytes(i) >= b"\x80" for i in range(tokenizer.vocab_size)])
    return {
        "documents": len(length),
        "tokens": tokens,
        "bytes": num_bytes,
        "bytes_per_token": num_bytes / max(tokens, 1),
        "vocab_used": float((counts > 0).sum() / ordinary.sum()),
        "single_byte_share": int(counts[single].sum()) / max(tokens, 1),
        "byte_fallback_share": int(counts[single & high].sum()) / max(tokens, 1),
        "mean_length": float(length.mean()) if len(length) else 0.0,
        "length_histogram": _histogram(length),
    }


def _histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Documents between powers of two, from below 16 tokens to the longest."""
    if not len(lengths):
        return []
    bounds = 2 ** np.arange(4, max(4, int(lengths.max()).bit_length()) + 1)
    bins = np.searchsorted(bounds, lengths, side="right")
    counts = np.bincount(bins, minlength=len(bounds))
    return [
        {"below": int(bound), "documents": int(count)} for bound, count in zip(bounds, counts, strict=True)
    ]


def report_table(report: dict[str, Any]) -> Table:
    """The report as a table for the terminal, a row for each domain."""
    table = Table(title=f"{report['split']}: {report['vocab_size']} tokens in the vocabulary")
    table.add_column("domain")
    for heading in (
        "documents",
        "tokens",
        "bytes/token",
        "vocabulary used",
        "single bytes",
        "byte fallback",
        "mean length",
    ):
        table.add_column(heading, justify="right")
    for name, figures in report["domains"].items():
        table.add_row(
            name,
            f"{figures['documents']:,}",
            f"{figures['tokens']:,}",
            f"{figures['bytes_per_token']:.2f}",
            f"{figures['vocab_used']:.1%}",
            f"{figures['single_byte_share']:.1%}",
            f"{figures['byte_fallback_share']:.2%}",
            f"{figures['mean_length']:.0f}",
        )
    return table
