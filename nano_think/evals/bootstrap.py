"""Intervals over documents, paired comparisons and a permutation test.

Tokens of one document are not independent, so documents are resampled, never tokens (percentile bootstrap:
Efron & Tibshirani 1993, chapter 13; ratio estimator sum nll / sum tokens inside each resample). Percentiles are
taken further out for few documents (Hesterberg 2015, arXiv 1411.5279, "expanded percentile").

Letters: M documents, R resamples, D domains, N experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray

from nano_think.evals.losses import DocumentLosses
from nano_think.metrics.information import mutual_information

Floats = NDArray[np.float64]

# Cells of one (resamples, documents) count matrix: 16 MB of float64.
_CHUNK_CELLS = 2_000_000
# nats a token: half of the last digit that reports print
RESOLUTION = 5e-4


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; low and high are NaN when fewer than two documents stand behind it.

    `format(interval, ".2f")` gives "1.23 [1.10, 1.35]".
    """

    estimate: float
    low: float
    high: float
    documents: int
    level: float = 0.95

    def __format__(self, spec: str) -> str:
        if math.isnan(self.low):
            return format(self.estimate, spec)
        return f"{self.estimate:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class Difference(Interval):
    """An interval of a difference `model - baseline` of losses."""

    @property
    def verdict(self) -> str:
        """Return "better" if the whole interval is below 0, "worse" if above, else "not distinguishable".

        A difference below RESOLUTION is none, however sure its sign.
        """
        if abs(self.estimate) < RESOLUTION:
            return "not distinguishable"
        if self.high < 0:
            return "better"
        if self.low > 0:
            return "worse"
        return "not distinguishable"


def resample(
    columns: Floats, statistic: Callable[[Floats], Floats], *, n_resamples: int = 2000, seed: int = 0
) -> Floats:
    """Bootstrap distribution of a statistic of column sums.

    Args:
        columns: (M, C) one row of additive quantities per document.
        statistic: maps (R, C) sums over resampled documents to (R,).

    Returns:
        (n_resamples,) values.
    """
    rng = np.random.default_rng(seed)
    documents = len(columns)
    chunk = max(1, _CHUNK_CELLS // documents)
    values = []
    for start in range(0, n_resamples, chunk):
        rows = min(chunk, n_resamples - start)
        drawn = rng.integers(documents, size=(rows, documents))
        drawn += np.arange(rows)[:, None] * documents
        times = np.bincount(drawn.ravel(), minlength=rows * documents).reshape(rows, documents)
        values.append(statistic(times @ columns))
    return np.concatenate(values)


def percentiles(values: Floats, level: float, units: Floats) -> tuple[float, float]:
    """The central interval of bootstrap values of documents with `units` (M,) tokens or bytes, M >= 2.

    The plain percentiles of n documents are those of a normal interval whose variance divides by n instead of
    n - 1: of 10 documents they miss the truth in 10% of cases instead of 5%. So the tails are cut where an
    interval of Student's t would end. A few long documents among short ones decide nearly alone, so n is Kish's
    effective number (sum units)^2 / sum units^2.
    """
    if not units.any():
        return math.nan, math.nan
    effective = max(2, int(units.sum() ** 2 / (units**2).sum() + 0.5))
    wider = t_quantile(level, effective - 1) * math.sqrt(effective / (effective - 1))
    tail = NormalDist().cdf(-wider)
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


@lru_cache(maxsize=256)
def t_quantile(level: float, df: int) -> float:
    """t with P(|T| <= t) = level for Student's T of df >= 1 degrees of freedom, to 1e-6.

    Finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4 in theta = atan(t / sqrt(df)), inverted by bisection; the
    expansion 26.7.5 above 200 degrees of freedom.
    """
    if df > 200:
        z = NormalDist().inv_cdf((1 + level) / 2)
        third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
        return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2) + third
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, df) < level else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _t_inside(theta: float, df: int) -> float:
    """P(|T| <= sqrt(df) tan theta)."""
    odd = df % 2
    term = total = 0.0 if df == 1 else (math.cos(theta) if odd else 1.0)
    for j in range(2 + odd, df, 2):
        term *= (j - 1) / j * math.cos(theta) ** 2
        total += term
    inside = math.sin(theta) * total
    return 2 / math.pi * (theta + inside) if odd else inside


def ratio(sums: Floats) -> Floats:
    """First column over second: (R, 2) to (R,)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(sums[:, 0], sums[:, 1], dtype=np.float64)


def bootstrap(
    losses: DocumentLosses,
    metric: str = "loss",
    *,
    domain: int | None = None,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of `loss`, `perplexity` or `bpb` over the documents of one or all domains."""
    estimate = getattr(losses, metric)(domain)
    chosen = slice(None) if domain is None else losses.domain == domain
    columns = np.stack([losses.sum_nll[chosen], denominator(losses, metric)[chosen]], axis=1)
    if len(columns) < 2:
        return Interval(estimate, math.nan, math.nan, len(columns), level)
    low, high = percentiles(
        resample(columns, ratio, n_resamples=n_resamples, seed=seed), level, columns[:, 1]
    )
    if metric == "perplexity":
        low, high = float(np.exp(low)), float(np.exp(high))
    return Interval(estimate, low, high, len(columns), level)


def denominator(losses: DocumentLosses, metric: str) -> Floats:
    """(M,) what the summed nats of each document are divided by: tokens, or bytes ln 2 for `bpb`."""
    per_unit = losses.num_bytes * math.log(2) if metric == "bpb" else losses.num_tokens
    return per_unit.astype(np.float64)


def paired_difference(
    model: DocumentLosses,
    baseline: DocumentLosses,
    metric: str = "loss",
    *,
    domain: int | None = None,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Interval of model - baseline in `loss` or `bpb`, resampling the same documents for both.

    Raises:
        ValueError: the two were not scored on the same tokens of the same documents, or another metric.
    """
    if metric not in ("loss", "bpb"):
        raise ValueError(f"Compare loss or bpb, not {metric}.")
    if not model.pairs_with(baseline):
        raise ValueError("A paired comparison needs both models scored on the same documents and tokens.")
    chosen = slice(None) if domain is None else model.domain == domain
    difference = (model.sum_nll - baseline.sum_nll)[chosen]
    columns = np.stack([difference, denominator(model, metric)[chosen]], axis=1)
    estimate = float(ratio(columns.sum(0, keepdims=True))[0])
    if len(columns) < 2:
        return Difference(estimate, math.nan, math.nan, len(columns), level)
    low, high = percentiles(
        resample(columns, ratio, n_resamples=n_resamples, seed=seed), level, columns[:, 1]
    )
    return Difference(estimate, low, high, len(columns), level)


@dataclass(frozen=True)
class PermutationTest:
    """An observed statistic beside its values under permuted labels."""

    observed: float
    null: Floats

    @property
    def p_value(self) -> float:
        """(1 + permutations at or above the observed value) / (1 + permutations)."""
        return float((1 + (self.null >= self.observed).sum()) / (1 + len(self.null)))


def domain_sums(values: Floats, domain: NDArray[np.int64], num_domains: int) -> Floats:
    """Sum the rows of (M, C) values by domain: (D, C)."""
    return np.eye(num_domains)[domain].T @ values


def routing_information(sum_weights: Floats, num_tokens: Floats) -> Floats:
    """I(domain; expert) in nats from weights (..., D, N) and tokens (..., D) summed per domain: (...)."""
    return mutual_information(torch.from_numpy(sum_weights), torch.from_numpy(num_tokens)).numpy()


def permutation_test(
    sum_weights: Floats,
    num_tokens: NDArray[np.int64],
    domain: NDArray[np.int64],
    num_domains: int,
    *,
    permutations: int = 200,
    seed: int = 0,
) -> PermutationTest:
    """I(domain; expert) against chance: domain labels are permuted over whole documents.

    Args:
        sum_weights: (M, N) router weights summed over the tokens of each document.
        num_tokens: (M,) tokens of each document.
        domain: (M,) domain index of each document.
    """
    rng = np.random.default_rng(seed)
    columns = np.column_stack([sum_weights, num_tokens]).astype(np.float64)
    labels = [domain, *(rng.permutation(domain) for _ in range(permutations))]
    sums = np.stack([domain_sums(columns, some, num_domains) for some in labels])
    values = routing_information(sums[..., :-1].copy(), sums[..., -1].copy())
    return PermutationTest(float(values[0]), values[1:])
