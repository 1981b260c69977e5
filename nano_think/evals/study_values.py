"""Evidence of a study as tables: plain JSON values in, intervals and tables out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nano_think.evals.bootstrap import Interval
from nano_think.evals.report import Report, Table

Values = Mapping[str, Any]


def as_interval(value: Any) -> Interval | None:
    """{"estimate", "low", "high", "documents"} as an Interval, a number as one without ends, else None."""
    if isinstance(value, Mapping) and {"estimate", "low", "high"} <= value.keys():
        low, high, estimate = (number(value[name]) for name in ("low", "high", "estimate"))
        return Interval(estimate, low, high, int(value.get("documents") or 0))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Interval(float(value), math.nan, math.nan, 0)
    return None


def number(value: Any) -> float:
    """A number, or NaN for null."""
    return math.nan if value is None else float(value)


def cell(value: Any) -> Any:
    """What a table shows for a value: intervals, numbers and words as they are, lists joined."""
    if isinstance(value, Mapping):
        interval = as_interval(value)
        if interval is None:
            return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
        return f"{shown(interval)}, {value['verdict']}" if "verdict" in value else interval
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(shown(item) for item in value)
    return value


def shown(value: Any) -> str:
    """`cell` as text with four digits."""
    value = cell(value)
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float | Interval) else str(value)


def table(
    headers: Sequence[str], rows: Sequence[Sequence[Any]], title: str, formats: Sequence[str] | None = None
) -> Table:
    """A Table of evidence values."""
    return Table(headers, [[cell(value) for value in row] for row in rows], formats=formats, title=title)


def matrix(values: Mapping[str, Values], rows: Sequence[str], columns: Sequence[str]) -> NDArray[np.float64]:
    """values[row][column] as numbers (R, C), the estimate of intervals; NaN where there is none."""
    found = np.full((len(rows), len(columns)), math.nan)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            interval = as_interval(values.get(row, {}).get(column))
            if interval is not None:
                found[i, j] = interval.estimate
    return found


def leaves(value: Values, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; intervals and lists count as values."""
    for key, item in value.items():
        if isinstance(item, Mapping) and as_interval(item) is None:
            yield from leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def generic(report: Report, value: Any, title: str, words: Mapping[str, str] = MappingProxyType({})) -> None:
    """Any evidence: a table of its values, and one for each list of objects; words: what parts of names mean."""

    def said(name: str) -> str:
        return ", ".join(words.get(part, part.replace("_", " ")) for part in name.split("."))

    if not isinstance(value, Mapping):
        value = {title: value}
    rows, lists = [], {}
    for name, item in leaves(value):
        if isinstance(item, list) and item and all(isinstance(one, Mapping) for one in item):
            lists[name] = item
        else:
            rows.append([said(name), shown(item)])
    if rows:
        report.table(["value", "measured"], rows, align=["l", "r"], title=title)
    for name, items in lists.items():
        headers = list(dict.fromkeys(key for item in items for key in item))
        cells = [[shown(item.get(key)) for key in headers] for item in items]
        headers, align = [said(key) for key in headers], ["r"] * len(headers)
        report.table(headers, cells, align=align, title=f"{title}: {said(name)}")


def over_seeds(report: Report, by_seed: Mapping[int, Values], names: Mapping[str, str], title: str) -> None:
    """Some values of every seed side by side: names[text] is a path of keys and indices joined by "/"."""
    rows = []
    for text, path in names.items():
        values = [_follow(value, path.split("/")) for value in by_seed.values()]
        if any(value is not None for value in values):
            rows.append([text, *(shown(value) for value in values)])
    if rows and len(by_seed) > 1:
        headers = ["", *(f"seed {seed}" for seed in by_seed)]
        report.table(headers, rows, align=["l", *["r"] * len(by_seed)], title=title)


def _follow(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        if isinstance(value, list):
            value = value[int(key)] if int(key) < len(value) else None
        else:
            value = value.get(key) if isinstance(value, Mapping) else None
    return value
