"""Interpolated Kneser-Ney n-gram model over token ids: the baseline every expert has to beat.

    p_k(w | h) = max(c(h w) - D_k, 0) / c(h) + D_k t(h) / c(h) * p_{k-1}(w | h'),    p_0(w) = 1 / V

with t(h) the number of types seen after h, h' = h without its oldest token and D_k = n1 / (n1 + 2 n2), n1 and
n2 the numbers of order-k n-grams with count 1 and 2. At the highest order c counts occurrences; below it
counts distinct left neighbours, except that an n-gram at the start of a document, which can have no left
neighbour, keeps its occurrences. Chen & Goodman 1999, section 3 and equations (4)-(5); Ney, Essen & Kneser
1994 for D.

n-grams are packed into one int64, oldest token in the highest bits, so that one sort groups them by context
and a lookup is a binary search.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Order:
    """Counts of one order: packed n-grams with their counts, and their contexts with sums over them."""

    grams: Ints
    counts: Ints
    contexts: Ints
    totals: Ints
    types: Ints
    discount: float

    @classmethod
    def count(cls, grams: Ints, bits: int) -> _Order:
        """From packed n-grams, one entry per occurrence to count."""
        unique, counts = np.unique(grams, return_counts=True)
        context = unique >> bits
        first = np.flatnonzero(np.diff(context, prepend=-1))
        totals = np.add.reduceat(counts, first) if len(first) else counts
        types = np.diff(first, append=len(unique))
        return cls(unique, counts, context[first], totals, types, _discount(counts))


def _discount(counts: Ints) -> float:
    """D = n1 / (n1 + 2 n2); 0.5 where no count is 1, because D = 0 would leave unseen tokens no mass."""
    ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
    return ones / (ones + 2 * twos) if ones else 0.5


def _find(keys: Ints, wanted: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Index of each wanted value in the sorted keys, and whether it is there (else the index is void)."""
    index = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return index, keys[index] == wanted


def _grams_in_documents(
    tokens: ArrayLike, doc_starts: ArrayLike, order: int, bits: int
) -> tuple[Ints, list[Ints]]:
    """Packed n-grams of one stream that lie inside one document.

    Returns those of the highest order, and for each lower order k >= 2 (at index k) those at document starts.
    """
    stream = np.asarray(tokens).astype(np.int64)
    starts = np.asarray(doc_starts).astype(np.int64)
    ends = np.append(starts[1:], len(stream))
    if len(stream) and (len(starts) == 0 or starts[0] != 0 or (ends <= starts).any()):
        raise ValueError("doc_starts must begin with 0 and increase: one offset per document of the stream.")
    packed = stream.copy()
    at_start = [np.empty(0, dtype=np.int64)] * max(order, 2)
    for k in range(2, order + 1):
        packed = (packed[:-1] << bits) | stream[k - 1 :]
        if k < order:
            at_start[k] = packed[starts[ends - starts >= k]]
    # packed[i] now covers tokens i .. i + order - 1; drop those that run over the end of their document.
    # Order 1 has no context token, but the first token of a document is given, never predicted.
    inside = np.ones(len(packed), dtype=bool)
    if order == 1:
        inside[starts] = False
    for overrun in range(1, order):
        last = ends - overrun
        inside[last[(last >= starts) & (last < len(packed))]] = False
    return packed[inside], at_start


class KneserNey:
    """Interpolated Kneser-Ney model; build it with `fit`.

    Every token has a probability above 0 in every context. A context never crosses the start of a document.
    """

    def __init__(self, orders: Sequence[_Order], vocab_size: int, bits: int) -> None:
        self._orders = list(orders)
        self._bits = bits
        self.vocab_size = vocab_size

    @property
    def order(self) -> int:
        """Longest n-gram: 1 unigram, 2 bigram, 3 trigram."""
        return len(self._orders)

    @property
    def num_ngrams(self) -> list[int]:
        """Distinct n-grams of each order."""
        return [len(order.grams) for order in self._orders]

    @property
    def discounts(self) -> list[float]:
        """D of each order."""
        return [order.discount for order in self._orders]

    @classmethod
    def fit(cls, streams: Iterable[tuple[ArrayLike, ArrayLike]], *, order: int, vocab_size: int) -> KneserNey:
        """Count the n-grams of token streams, for example one stream per domain.

        Args:
            streams: pairs (tokens (n,), doc_starts (m,)): concatenated documents and the offset at which each
                begins. The first token of a document (BOS) is context only.
            order: longest n-gram, at least 1.
            vocab_size: V, the number of token ids.

        Raises:
            ValueError: an id outside the vocabulary, no token to predict, or n-grams too long for 62 bits.
        """
        bits = max(1, (vocab_size - 1).bit_length())
        if order < 1 or order * bits > 62:
            raise ValueError(
                f"order={order} does not work with vocab_size={vocab_size}: choose from 1 to {62 // bits}."
            )
        top: list[Ints] = []
        at_start: list[list[Ints]] = []
        for tokens, doc_starts in streams:
            stream = np.asarray(tokens)
            if len(stream) and (stream.min() < 0 or stream.max() >= vocab_size):
                raise ValueError(
                    f"The tokens hold ids outside 0..{vocab_size - 1}: fit with their tokenizer."
                )
            grams, starts = _grams_in_documents(stream, doc_starts, order, bits)
            top.append(grams)
            at_start.append(starts)
        orders = [_Order.count(np.concatenate([np.empty(0, dtype=np.int64), *top]), bits)]
        del top
        for k in range(order - 1, 0, -1):
            # Dropping the oldest token of each distinct longer n-gram leaves one entry per left neighbour.
            left = orders[0].grams & ((1 << (bits * k)) - 1)
            starts_k = [lists[k] for lists in at_start] if k > 1 else []
            orders.insert(0, _Order.count(np.concatenate([left, *starts_k]), bits))
        if len(orders[0].grams) == 0:
            raise ValueError("There is no token to count: give at least one document of two tokens.")
        return cls(orders, vocab_size, bits)

    def _probability(self, history: Ints, available: Ints, target: Ints) -> Floats:
        """p(target | history) for M queries.

        history (M, order - 1), newest token last; available (M,) how many of them may be used; target (M,).
        """
        p = np.full(len(target), 1 / self.vocab_size)
        context = np.zeros(len(target), dtype=np.int64)
        for k, table in enumerate(self._orders, start=1):
            if len(table.grams) == 0:
                break  # no document is this long, so no longer n-gram exists either
            if k > 1:
                context |= history[:, -(k - 1)] << (self._bits * (k - 2))
            row, known = _find(table.contexts, context)
            known &= available >= k - 1
            gram, seen = _find(table.grams, (context << self._bits) | target)
            count = np.where(seen, table.counts[gram] - table.discount, 0.0)
            mass = table.discount * table.types[row] * p
            p = np.where(known, (count + mass) / table.totals[row], p)
        return p

    def probabilities(self, context: Sequence[int]) -> Floats:
        """(V,) distribution of the next token after `context`, which lies inside one document."""
        size = self.order - 1
        recent = list(context)[len(context) - size :] if len(context) > size else list(context)
        history = np.zeros((self.vocab_size, size), dtype=np.int64)
        history[:, size - len(recent) :] = recent
        available = np.full(self.vocab_size, len(recent))
        return self._probability(history, available, np.arange(self.vocab_size))

    def batch_nll(self, batch: dict[str, Tensor]) -> Tensor:
        """Nats per token, (B, L) float64, 0 where the label is masked.

        labels[t] is predicted from tokens[..t] of the same segment, so the model is scored on exactly the
        tokens, and with exactly the contexts, that networks get from this batch.
        """
        tokens, labels = batch["tokens"].cpu().numpy(), batch["labels"].cpu().numpy()
        segments = batch["segments"].cpu().numpy()
        rows, length = tokens.shape
        history = np.zeros((rows, length, self.order - 1), dtype=np.int64)
        available = np.zeros((rows, length), dtype=np.int64)
        for back in range(min(self.order - 1, length)):
            history[:, back:, self.order - 2 - back] = tokens[:, : length - back]
            # counts up only while every nearer token is of the same segment, as segments are contiguous
            available[:, back:] += segments[:, back:] == segments[:, : length - back]
        scored = labels >= 0
        nll = np.zeros((rows, length))
        nll[scored] = -np.log(self._probability(history[scored], available[scored], labels[scored]))
        return torch.from_numpy(nll)
