"""Losses and paired comparisons over several seeds of the whole pipeline, on the same documents in every seed.

Two things vary: which documents were drawn, and how training went. Document d of seed s has the difference
mu + a_s + b_d + e_sd (a crossed design). The seeds' means have the variance of a + e, so t of S - 1 degrees of
freedom over them covers both; what b adds comes from the bootstrap over documents of the seeds' mean, less the
share of e in it, which would else count twice. The two half-widths are added in quadrature: such an interval
does not cover less than its level (Banerjee 1961, Sankhya A 23). Satterthwaite's estimated degrees of freedom do:
92% instead of 95% for three seeds where these vary more than the documents.

Letters: S seeds, M documents, K strata.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nano_think.evals.bootstrap import (
    RESOLUTION,
    Interval,
    denominator,
    percentiles,
    ratio,
    resample,
    t_quantile,
)
from nano_think.evals.losses import DocumentLosses

Floats = NDArray[np.float64]
Average = Literal["micro", "macro"]

UNITS = {"loss": "nats a token", "bpb": "bits a byte"}


@dataclass(frozen=True)
class SeedInterval(Interval):
    """A mean over seeds with an interval over documents and seeds; of one seed, over documents alone.

    Attributes:
        per_seed: the value of each seed.
        document_error: standard error of the mean from the choice of documents.
        seed_error: standard error of the mean from the seeds; NaN of one seed.
        metric: `loss` or `bpb`.
    """

    per_seed: tuple[float, ...] = ()
    document_error: float = math.nan
    seed_error: float = math.nan
    metric: str = "loss"

    @property
    def seeds(self) -> int:
        """How many seeds stand behind the mean."""
        return len(self.per_seed)

    @property
    def basis(self) -> str:
        """What the interval knows of, in words."""
        if math.isnan(self.low):
            return "no interval: a domain with fewer than two documents"
        if self.seeds == 1:
            return f"{self.documents} documents, one seed: the interval knows nothing of seeds"
        return f"{self.documents} documents, {self.seeds} seeds"


@dataclass(frozen=True)
class SeedDifference(SeedInterval):
    """model - baseline, paired by document and seed.

    Attributes:
        minimum_effect: differences below it are not claimed, however sure their sign.
    """

    minimum_effect: float = 0.0

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.high < 0 or self.low > 0

    @property
    def least(self) -> float:
        """The smallest difference that is claimed: the minimum effect, or RESOLUTION where that is larger."""
        return max(self.minimum_effect, RESOLUTION)

    @property
    def verdict(self) -> str:
        """Return "better" or "worse" where the interval and the minimum effect allow it.

        Otherwise "not distinguishable".
        """
        if not self.significant or abs(self.estimate) < self.least:
            return "not distinguishable"
        return "better" if self.estimate < 0 else "worse"

    @property
    def words(self) -> str:
        """Difference, interval, what the interval knows of, and the verdict with its reason."""
        verdict = self.verdict
        if self.significant and verdict == "not distinguishable":
            verdict += f", significant but below the minimum effect of {self.least:.4f}"
        return f"{self:+.4f} {UNITS[self.metric]} ({self.basis}): {verdict}"


def loss_over_seeds(
    losses: Sequence[DocumentLosses],
    metric: str = "loss",
    *,
    domain: int | None = None,
    average: Average = "micro",
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> SeedInterval:
    """Mean over seeds of `loss` or `bpb`, with an interval.

    Args:
        losses: one a seed, of the same documents and tokens.
        domain: its documents alone; None for all.
        average: `micro` weighs every token alike, `macro` every domain.

    Raises:
        ValueError: no seed, other documents in another seed, another metric, or one domain's macro average.
    """
    _check(losses, metric, domain, average)
    sums = np.stack([value.sum_nll for value in losses])
    strata = _strata(losses[0], domain, average)
    return SeedInterval(*_over_seeds(sums, losses[0], metric, strata, n_resamples, level, seed))


def difference_over_seeds(
    models: Sequence[DocumentLosses],
    baselines: Sequence[DocumentLosses],
    metric: str = "loss",
    *,
    domain: int | None = None,
    average: Average = "micro",
    minimum_effect: float | None = None,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> SeedDifference:
    """Mean over seeds of model - baseline, where both of one seed are paired document by document.

    Args:
        models, baselines: one a seed, in the same order; a baseline without a seed is repeated.
        domain, average: as `loss_over_seeds`.
        minimum_effect: the smallest difference worth claiming; None for twice the seed deviation of these
            baselines, 0 where there is one seed. Measure it on more seeds than the comparison has if you can.

    Raises:
        ValueError: as `loss_over_seeds`, or not one baseline a model.
    """
    if len(models) != len(baselines):
        raise ValueError(
            f"{len(models)} models and {len(baselines)} baselines cannot be paired: give one of each a seed, "
            "repeating a baseline that has no seed."
        )
    _check([*models, *baselines], metric, domain, average)
    if minimum_effect is None:
        minimum_effect = 2 * seed_deviation(baselines, metric, domain=domain, average=average)
        minimum_effect = 0.0 if math.isnan(minimum_effect) else minimum_effect
    sums = np.stack([model.sum_nll - base.sum_nll for model, base in zip(models, baselines, strict=True)])
    strata = _strata(models[0], domain, average)
    values = _over_seeds(sums, models[0], metric, strata, n_resamples, level, seed)
    return SeedDifference(*values, minimum_effect)


def seed_deviation(
    losses: Sequence[DocumentLosses],
    metric: str = "loss",
    *,
    domain: int | None = None,
    average: Average = "micro",
) -> float:
    """Standard deviation over seeds (divisor S - 1) of a model's loss; NaN of one seed."""
    _check(losses, metric, domain, average)
    if len(losses) < 2:
        return math.nan
    return float(np.std([_value(value, metric, domain, average) for value in losses], ddof=1))


def _value(losses: DocumentLosses, metric: str, domain: int | None, average: Average) -> float:
    if average == "macro":
        return losses.macro(metric)
    return getattr(losses, metric)(domain)


def _check(losses: Sequence[DocumentLosses], metric: str, domain: int | None, average: Average) -> None:
    if not losses:
        raise ValueError("Give the losses of at least one seed.")
    if metric not in UNITS:
        raise ValueError(f"Compare loss or bpb, not {metric}.")
    if average not in ("micro", "macro"):
        raise ValueError(f"The average is micro or macro, not {average}.")
    if average == "macro" and domain is not None:
        raise ValueError("A macro average is over domains: give no domain with it.")
    if not all(losses[0].pairs_with(other) for other in losses):
        raise ValueError(
            "Seeds are compared on the same documents and tokens: score all of them on one split."
        )


def _strata(losses: DocumentLosses, domain: int | None, average: Average) -> list[NDArray[np.bool_]]:
    """The documents (M,) of each part whose values are averaged: all, one domain, or every domain in turn."""
    if average == "macro":
        return [losses.domain == one for one in np.unique(losses.domain)]
    return [np.ones(len(losses), dtype=bool) if domain is None else losses.domain == domain]


def _over_seeds(
    sums: Floats,
    losses: DocumentLosses,
    metric: str,
    strata: Sequence[NDArray[np.bool_]],
    n_resamples: int,
    level: float,
    seed: int,
) -> tuple[float, float, float, int, float, tuple[float, ...], float, float, str]:
    """The fields of a `SeedInterval`, of sums (S, M) over documents."""
    units = denominator(losses, metric)
    parts = [(sums[:, chosen], units[chosen]) for chosen in strata]
    per_seed = np.mean([_ratios(values, unit) for values, unit in parts], axis=0)
    estimate, seeds = float(per_seed.mean()), len(per_seed)
    documents = sum(len(unit) for _, unit in parts)
    seed_error = float(per_seed.std(ddof=1)) / math.sqrt(seeds) if seeds > 1 else math.nan
    smallest = min(len(unit) for _, unit in parts)
    low = high = document_error = math.nan
    if smallest >= 2:
        # domains are resampled apart, each from a stream of its own
        drawn = np.mean(
            [
                resample(
                    np.stack([values.mean(0), unit], 1), ratio, n_resamples=n_resamples, seed=seed + index
                )
                for index, (values, unit) in enumerate(parts)
            ],
            axis=0,
        )
        low, high = percentiles(drawn, level, min((unit for _, unit in parts), key=len))
        document_error = float(drawn.std())
        if seeds > 1:
            own = math.sqrt(_own_share(parts))
            document_error *= own
            half = t_quantile(level, seeds - 1) * seed_error
            low = estimate - math.hypot(own * (estimate - low), half)
            high = estimate + math.hypot(own * (high - estimate), half)
    every = tuple(per_seed.tolist())
    return estimate, low, high, documents, level, every, document_error, seed_error, metric


def _ratios(values: Floats, units: Floats) -> Floats:
    """Sums (S, M) over units (M,): one value a seed, NaN without documents."""
    total = units.sum()
    return values.sum(1) / total if total else np.full(len(values), math.nan)


def _own_share(parts: Sequence[tuple[Floats, Floats]]) -> float:
    """The share of documents in the variance between documents of the seeds' mean; the rest is e_sd.

    A document's mean over S seeds still varies by Var(e) / S, which is estimated from how the seeds differ
    inside each document once their means are taken off.
    """
    between = within = 0.0
    for values, units in parts:
        seeds, documents = values.shape
        residual = (values - _ratios(values, units)[:, None] * units) / units.sum()
        mean = residual.mean(0)
        between += (mean**2).sum() * documents / (documents - 1)
        within += ((residual - mean) ** 2).sum() / (seeds * (seeds - 1)) * documents / (documents - 1)
    return max(0.0, 1 - within / between) if between else 0.0
