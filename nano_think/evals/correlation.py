"""Do the experts err on the same text? Correlation of their losses, token by token and document by document.

Letters: B rows, L positions, T tokens, M documents, N experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nano_think.evals.losses import Batch, DocumentLosses, NllFunction

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ErrorCorrelation:
    """Pearson correlation of losses between models, in the order of `names`.

    Attributes:
        names: the models.
        matrix: (N, N), NaN where a model's loss does not vary.
        mean: (N,) mean loss in nats a token.
        deviation: (N,) standard deviation.
        count: tokens or documents correlated.
    """

    names: tuple[str, ...]
    matrix: Floats
    mean: Floats
    deviation: Floats
    count: int


class Moments:
    """Mean and co-moments of N quantities, merged part by part without loss of digits (Chan et al. 1983)."""

    def __init__(self, size: int) -> None:
        self.count, self.mean, self.comoment = 0.0, np.zeros(size), np.zeros((size, size))

    def add(self, values: Floats, weights: Floats | None = None) -> None:
        """Add (T, N) values, each row with a weight (T,), 1 by default."""
        w = np.ones(len(values)) if weights is None else weights
        count = w.sum()
        mean = w @ values / count
        centred = values - mean
        step, total = mean - self.mean, self.count + count
        self.comoment += (
            centred.T @ (w[:, None] * centred) + np.outer(step, step) * self.count * count / total
        )
        self.mean = self.mean + step * count / total
        self.count = total

    def correlation(self, names: Iterable[str], count: int) -> ErrorCorrelation:
        """The correlations of what was added."""
        variance = np.diag(self.comoment) / self.count
        deviation = np.sqrt(variance)
        with np.errstate(invalid="ignore", divide="ignore"):
            matrix = self.comoment / self.count / np.outer(deviation, deviation)
        return ErrorCorrelation(tuple(names), matrix, self.mean, deviation, count)


@torch.no_grad()
def token_correlation(models: Mapping[str, NllFunction], batches: Iterable[Batch]) -> ErrorCorrelation:
    """Correlation of the losses of single tokens, in one pass that keeps sums alone.

    Args:
        models: by name, functions from a batch to (B, L) nats per token.
        batches: dicts with labels (B, L).

    Raises:
        ValueError: no batch holds a scored token.
    """
    moments = Moments(len(models))
    for batch in batches:
        scored = (batch["labels"] >= 0).cpu().numpy()
        if scored.any():
            moments.add(
                np.stack([model(batch).double().cpu().numpy()[scored] for model in models.values()], axis=1)
            )
    if not moments.count:
        raise ValueError("The batches hold no scored token: check the split and its size.")
    return moments.correlation(models, int(moments.count))


def document_correlation(losses: Mapping[str, DocumentLosses]) -> ErrorCorrelation:
    """Correlation of the documents' losses in nats a token, every document counting by its tokens.

    Raises:
        ValueError: the models were not scored on the same documents and tokens.
    """
    first = next(iter(losses.values()))
    for name, other in losses.items():
        if not first.pairs_with(other):
            raise ValueError(f"{name} was not scored on the same documents and tokens as the others.")
    moments = Moments(len(losses))
    tokens = first.num_tokens.astype(np.float64)
    moments.add(np.stack([value.sum_nll / tokens for value in losses.values()], axis=1), tokens)
    return moments.correlation(losses, len(first))
