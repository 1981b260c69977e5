"""Plain intervals over documents, for ratios of sums and for correlations of tokens.

Tokens of one document hang together, so every interval resamples whole documents (see `bootstrap`).

Letters: T tokens, M documents, C columns, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nano_think.evals.bootstrap import Interval, percentiles, ratio, resample

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Plain = dict[str, float | int | None]


def plain(interval: Interval) -> Plain:
    """An interval as JSON takes it: estimate, low, high, documents; None for what is not defined."""
    values = {name: getattr(interval, name) for name in ("estimate", "low", "high")}
    return {name: number(value) for name, value in values.items()} | {"documents": interval.documents}


def number(value: float) -> float | None:
    """A float, None where it is NaN or infinite."""
    return float(value) if math.isfinite(value) else None


def sums_of(values: Floats, group: Ints, count: int) -> Floats:
    """(count, C) sums of the rows of values (T, C) by group (T,)."""
    return np.stack([np.bincount(group, weights=column, minlength=count) for column in values.T], axis=1)


def interval(
    columns: Floats,
    statistic: Callable[[Floats], Floats],
    units: Floats,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Plain:
    """95% interval of a statistic of column sums over documents.

    Args:
        columns: (M, C) additive quantities of every document.
        statistic: (R, C) sums to (R,) values.
        units: (M,) tokens of every document; those without are left out.
    """
    columns, units = columns[units > 0], units[units > 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = float(statistic(columns.sum(0, keepdims=True))[0])
        if len(columns) < 2:
            return plain(Interval(estimate, math.nan, math.nan, len(columns)))
        values = resample(columns, statistic, n_resamples=n_resamples, seed=seed)
    # a resample in which the statistic is not defined says nothing
    values = values[np.isfinite(values)]
    low, high = percentiles(values, 0.95, units) if len(values) else (math.nan, math.nan)
    return plain(Interval(estimate, low, high, len(columns)))


def mean_interval(
    values: Floats, document: Ints, chosen: NDArray[np.bool_] | None = None, **bootstrap: int
) -> Plain:
    """Interval of the mean of values (T,) over the chosen tokens."""
    kept = np.ones(len(values), bool) if chosen is None else chosen
    if not kept.any():
        return plain(Interval(math.nan, math.nan, math.nan, 0))
    columns = np.column_stack([values[kept], np.ones(kept.sum())])
    sums = sums_of(columns, document[kept], int(document.max()) + 1)
    return interval(sums, ratio, sums[:, 1], **bootstrap)


def correlation_interval(
    x: Floats, y: Floats, document: Ints, group: Ints | None = None, **bootstrap: int
) -> Plain:
    """Pearson correlation of x and y (T,) over tokens; inside groups (T,) where these are given.

    Inside means that both have lost their mean of each group first, so that differences between groups count
    for nothing. Not defined (None) where one of them varies by no more than the rounding of a float32.
    """
    if min(np.ptp(x) / max(np.abs(x).max(), 1e-300), np.ptp(y) / max(np.abs(y).max(), 1e-300)) < 1e-6:
        return plain(Interval(math.nan, math.nan, math.nan, 0))
    group = np.zeros(len(x), np.int64) if group is None else group
    groups, documents = int(group.max()) + 1, int(document.max()) + 1
    x, y = x - x.mean(), y - y.mean()  # the sums below lose no digits to a common offset
    moments = np.column_stack([np.ones(len(x)), x, y, x * x, y * y, x * y])
    cells = sums_of(moments, document * groups + group, documents * groups)

    def statistic(sums: Floats) -> Floats:
        count, sx, sy, sxx, syy, sxy = np.moveaxis(sums.reshape(len(sums), groups, 6), -1, 0)
        count = np.maximum(count, 1)
        covariance = (sxy - sx * sy / count).sum(1)
        power = (sxx - sx * sx / count).sum(1) * (syy - sy * sy / count).sum(1)
        # what rounding leaves of a constant inside every group is no variance
        scale = sxx.sum(1) * syy.sum(1)
        return np.where(power > 1e-14 * scale, covariance / np.sqrt(np.maximum(power, 1e-300)), np.nan)

    cells = cells.reshape(documents, groups * 6)
    return interval(cells, statistic, cells[:, ::6].sum(1), **bootstrap)
