"""Is a model as often right as it is sure? Reliability of the likeliest token and expected calibration error.

The bins hold equally many tokens (Nguyen & O'Connor 2015, arXiv 1508.05154): bins of equal width leave most of
them nearly empty, and the error then depends on a handful of tokens.

Letters: B rows, L positions, V vocabulary, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nano_think.evals.losses import Batch
from nano_think.model import ExpertLM, NanoThink
from nano_think.ops.layout import Layout

LogProbFunction = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Bin:
    """Tokens of like confidence: their number, their mean confidence and the share that was right."""

    tokens: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Reliability of a model's likeliest tokens.

    Attributes:
        error: expected calibration error, the mean over tokens of |accuracy - confidence| of their bin.
        chance: what `error` is expected to be for a calibrated model with this many independent tokens; an
            error near it says nothing against the model.
        confidence, accuracy: means over all tokens; a model whose confidence is higher is over-confident.
        bins: from the least to the most confident.
    """

    error: float
    chance: float
    confidence: float
    accuracy: float
    tokens: int
    bins: tuple[Bin, ...]


def calibration_of(
    confidence: NDArray[np.floating], correct: NDArray[np.bool_], bins: int = 15
) -> Calibration:
    """Reliability from confidences (T,) in 0..1 and whether the token was right (T,).

    Raises:
        ValueError: no token.
    """
    if not len(confidence):
        raise ValueError("The batches hold no scored token: check the split and its size.")
    order = np.argsort(confidence, kind="stable")
    sure, right = confidence[order].astype(np.float64), correct[order].astype(np.float64)
    found, error, chance = [], 0.0, 0.0
    for part in np.array_split(np.arange(len(order)), min(bins, len(order))):
        mean, share = float(sure[part].mean()), float(right[part].mean())
        found.append(Bin(len(part), mean, share))
        error += len(part) * abs(share - mean)
        # E|normal| of the number of right tokens about its mean
        chance += math.sqrt(2 / math.pi * float((sure[part] * (1 - sure[part])).sum()))
    total = len(order)
    return Calibration(
        error / total, chance / total, float(sure.mean()), float(right.mean()), total, tuple(found)
    )


@torch.no_grad()
def calibration(
    log_probs: LogProbFunction, batches: Iterable[Batch], bins: int = 15, rows: int = 2
) -> Calibration:
    """Reliability over the scored tokens of the batches; of a token five bytes are kept, not its distribution.

    Args:
        log_probs: maps a batch to (B, L, V) log-probabilities.
        batches: dicts of tensors whose first dimension is B, labels (B, L) among them.
        rows: rows of a batch that are computed at a time, for `rows` tables of L x V are held.

    Raises:
        ValueError: no batch holds a scored token.
    """
    confidence, correct = [], []
    for batch in batches:
        for start in range(0, len(batch["labels"]), rows):
            part = {name: value[start : start + rows] for name, value in batch.items()}
            labels = part["labels"]
            scored = labels >= 0
            if scored.any():
                top, token = log_probs(part)[scored].max(-1)
                confidence.append(top.float().exp().cpu().numpy())
                correct.append((token == labels[scored]).cpu().numpy())
    if not confidence:
        raise ValueError("The batches hold no scored token: check the split and its size.")
    return calibration_of(np.concatenate(confidence), np.concatenate(correct), bins)


def model_log_probs(
    model: ExpertLM | NanoThink, slots: Callable[[Mapping[str, Tensor]], Any] | None = None
) -> LogProbFunction:
    """log p of every next token (B, L, V), fp32; slots: the memory of a batch, of a fused model that has one."""

    def log_probs(batch: Batch) -> Tensor:
        layout = Layout(batch["positions"], batch["segments"])
        if isinstance(model, NanoThink):
            output = model(batch["tokens"], layout, slots(batch) if slots else None)
        else:
            output = model(batch["tokens"], layout)
        return F.log_softmax(output.logits.float(), dim=-1)

    return log_probs
