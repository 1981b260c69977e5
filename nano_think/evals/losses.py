"""Losses per document: what every table, interval and paired comparison is computed from.

Letters: B rows, L positions, V vocabulary, M documents.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from nano_think.files import atomic_write

Batch = dict[str, Tensor]
NllFunction = Callable[[Batch], Tensor]

# Parts are merged now and then, so that memory follows the documents and not the batches.
_MERGE_EVERY = 256


@dataclass(frozen=True)
class DocumentLosses:
    """Summed negative log-likelihood of each document, sorted by uid; each document once.

    Attributes:
        uid: (M,) int64 document ids.
        domain: (M,) int64 domain index.
        sum_nll: (M,) float64 nats.
        num_tokens: (M,) int64 scored tokens, at least 1.
        num_bytes: (M,) int64 bytes of the scored tokens.
        num_domains: number of domains, seen or not.
    """

    uid: NDArray[np.int64]
    domain: NDArray[np.int64]
    sum_nll: NDArray[np.float64]
    num_tokens: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    num_domains: int

    def __len__(self) -> int:
        return len(self.uid)

    def loss(self, domain: int | None = None) -> float:
        """Nats per token, every token alike; NaN without tokens."""
        chosen = self._chosen(domain)
        return _ratio(self.sum_nll[chosen].sum(), self.num_tokens[chosen].sum())

    def perplexity(self, domain: int | None = None) -> float:
        """exp of `loss`."""
        return float(np.exp(self.loss(domain)))

    def bpb(self, domain: int | None = None) -> float:
        """Bits per byte of text; NaN without bytes."""
        chosen = self._chosen(domain)
        return _ratio(self.sum_nll[chosen].sum() / math.log(2), self.num_bytes[chosen].sum())

    def per_domain(self, metric: str = "loss") -> list[float]:
        """`loss`, `perplexity` or `bpb` of each domain, in the order of the domain index."""
        return [getattr(self, metric)(domain) for domain in range(self.num_domains)]

    def pairs_with(self, other: DocumentLosses) -> bool:
        """Whether both were scored on the same tokens of the same documents."""
        return np.array_equal(self.uid, other.uid) and np.array_equal(self.num_tokens, other.num_tokens)

    def macro(self, metric: str = "loss") -> float:
        """`loss` or `bpb` with every domain alike, where plain `loss()` weighs every token alike.

        The mean over the domains that have documents.
        """
        return float(np.mean([getattr(self, metric)(domain) for domain in np.unique(self.domain)]))

    def documents(self, domain: int | None = None) -> int:
        """Number of documents."""
        return int(self._chosen(domain).sum())

    def _chosen(self, domain: int | None) -> NDArray[np.bool_]:
        return np.ones(len(self), dtype=bool) if domain is None else self.domain == domain

    @classmethod
    def from_tokens(
        cls, uid: NDArray, domain: NDArray, nll: NDArray, num_bytes: NDArray, num_domains: int
    ) -> DocumentLosses:
        """Losses of scored tokens (T,) in nats, summed by their documents (T,)."""
        return _add_up(num_domains, uid, domain, nll, np.ones(len(uid)), num_bytes)

    @classmethod
    def concatenate(cls, parts: Sequence[DocumentLosses]) -> DocumentLosses:
        """All documents of the parts; fragments of one document in several parts are added up."""
        if not parts:
            raise ValueError("Give at least one DocumentLosses to concatenate.")
        names = ("uid", "domain", "sum_nll", "num_tokens", "num_bytes")
        columns = [np.concatenate([getattr(part, name) for part in parts]) for name in names]
        return _add_up(max(part.num_domains for part in parts), *columns)

    def save(self, path: str | Path) -> None:
        """Write an .npz file."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **vars(self))
        atomic_write(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> DocumentLosses:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            columns = {name: arrays[name] for name in arrays.files}
        return cls(**(columns | {"num_domains": int(columns["num_domains"])}))


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else math.nan


def _add_up(
    num_domains: int, uid: NDArray, domain: NDArray, nll: NDArray, tokens: NDArray, num_bytes: NDArray
) -> DocumentLosses:
    unique, first, group = np.unique(uid, return_index=True, return_inverse=True)

    def total(values: NDArray) -> NDArray:
        return np.bincount(group, weights=values, minlength=len(unique))

    return DocumentLosses(
        uid=unique.astype(np.int64),
        domain=domain[first].astype(np.int64),
        sum_nll=total(nll),
        num_tokens=total(tokens).astype(np.int64),
        num_bytes=total(num_bytes).astype(np.int64),
        num_domains=num_domains,
    )


@torch.no_grad()
def evaluate_models(
    models: Mapping[str, NllFunction], batches: Iterable[Batch], byte_lengths: ArrayLike, num_domains: int
) -> dict[str, DocumentLosses]:
    """Score several models on the same tokens in one pass over the batches.

    Args:
        models: by name, functions from a batch to (B, L) nats per token; masked labels are ignored.
        batches: dicts with labels (B, L), doc_uid (B, L) and domain (B,).
        byte_lengths: (V,) bytes of each token id.
        num_domains: number of domains.

    Raises:
        ValueError: a model's result has not the shape of the labels, or no batch holds a scored token.
    """
    lengths = np.asarray(byte_lengths)
    parts: dict[str, list[DocumentLosses]] = {name: [] for name in models}
    for batch in batches:
        labels = batch["labels"].cpu().numpy()
        scored = labels >= 0
        if not scored.any():
            continue
        uid = batch["doc_uid"].cpu().numpy()[scored]
        domain = np.broadcast_to(batch["domain"].cpu().numpy()[:, None], labels.shape)[scored]
        num_bytes = lengths[labels[scored]]
        for name, model in models.items():
            nll = model(batch)
            if nll.shape != labels.shape:
                raise ValueError(f"{name} gave losses of shape {tuple(nll.shape)}, not {labels.shape}.")
            values = nll.double().cpu().numpy()[scored]
            parts[name].append(DocumentLosses.from_tokens(uid, domain, values, num_bytes, num_domains))
        if len(next(iter(parts.values()), [])) >= _MERGE_EVERY:
            parts = {name: [DocumentLosses.concatenate(some)] for name, some in parts.items()}
    if models and not next(iter(parts.values())):
        raise ValueError("The batches hold no scored token: check the split and its size.")
    return {name: DocumentLosses.concatenate(some) for name, some in parts.items()}


def document_losses(
    nll_fn: NllFunction, batches: Iterable[Batch], byte_lengths: ArrayLike, num_domains: int
) -> DocumentLosses:
    """`evaluate_models` for one model."""
    return evaluate_models({"model": nll_fn}, batches, byte_lengths, num_domains)["model"]
