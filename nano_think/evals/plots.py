"""Figures of the reports: small PNG files, labelled axes, colours that colour-blind readers can tell apart.

Matplotlib is imported inside the functions and used without pyplot, so nothing global changes and no window
system is needed. Every function writes one file and returns its path.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from nano_think.evals.bootstrap import Interval
from nano_think.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008), without yellow, which is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STROKES = ("-", "--", ":")
_DPI = 90


def _axes(width: float = 6.4, height: float = 4.0) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, path: str | Path) -> Path:
    from PIL import Image  # matplotlib itself depends on it

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    # A palette of 128 colours looks the same and takes a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(128).save(small, format="png", optimize=True)
    atomic_write(path, small.getvalue())
    return Path(path)


def _lines(axes: Axes, curves: Mapping[str, tuple[ArrayLike, ArrayLike]], marker: bool, **style: Any) -> None:
    """One line per curve; colour and marker both differ, so that the lines also differ in grey."""
    for index, (name, (x, y)) in enumerate(curves.items()):
        symbol = MARKERS[index % len(MARKERS)] if marker else None
        stroke = STROKES[index // len(COLOURS) % len(STROKES)]
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(x, y, label=name, color=colour, marker=symbol, linestyle=stroke, **style)
    if curves:
        many = len(curves) > len(COLOURS)
        axes.legend(frameon=False, fontsize="x-small" if many else None, ncols=2 if many else 1)


def loss_curves(
    path: str | Path,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    title: str = "",
    y_label: str = "loss (nats per token)",
) -> Path:
    """Curves name -> (steps, values)."""
    figure, axes = _axes()
    _lines(
        axes, curves, marker=all(np.size(x) <= 30 for x, _ in curves.values()), markersize=3, linewidth=1.4
    )
    axes.set(xlabel="optimiser step", ylabel=y_label, title=title)
    return _save(figure, path)


def domain_bars(
    path: str | Path,
    values: Mapping[str, Mapping[str, Interval]],
    *,
    title: str = "",
    y_label: str = "loss (nats per token)",
) -> Path:
    """Grouped bars with intervals: values[model][domain]; domains that a model lacks stay empty."""
    domains = list(dict.fromkeys(domain for by_domain in values.values() for domain in by_domain))
    figure, axes = _axes(width=max(6.4, 0.35 * len(domains) * len(values) + 1.5))
    width = 0.8 / max(1, len(values))
    for index, (model, by_domain) in enumerate(values.items()):
        present = [(row, by_domain[domain]) for row, domain in enumerate(domains) if domain in by_domain]
        x = np.array([row for row, _ in present]) + (index - (len(values) - 1) / 2) * width
        estimate = np.array([interval.estimate for _, interval in present])
        # an interval need not contain its estimate, and an error bar cannot have a negative length
        below = np.array([max(0.0, i.estimate - i.low) for _, i in present])
        above = np.array([max(0.0, i.high - i.estimate) for _, i in present])
        colour = COLOURS[index % len(COLOURS)]
        bars = np.nan_to_num([below, above])
        hatch = ("", "//", "..")[index // len(COLOURS) % 3]  # an eighth model repeats the first one's colour
        style: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        axes.bar(x, estimate, width, yerr=bars, label=model, capsize=2, ecolor="#444444", **style)
    axes.set_xticks(range(len(domains)), domains)
    axes.set(xlabel="domain", ylabel=y_label, title=title)
    if values:
        columns = max(1, int(figure.get_figwidth() // (0.09 * max(map(len, values)) + 0.6)))
        figure.legend(
            loc="outside upper right", frameon=False, ncols=min(columns, len(values)), fontsize="small"
        )
    return _save(figure, path)


def routing_heatmap(
    path: str | Path, table: ArrayLike, experts: Sequence[str], domains: Sequence[str], *, title: str = ""
) -> Path:
    """Mean router weight, (D, N), written into the cells."""
    table = np.asarray(table, dtype=float)
    figure, axes = _axes(width=1.3 * len(experts) + 2.6, height=0.5 * len(domains) + 1.6)
    image = axes.imshow(table, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    axes.grid(False)
    axes.set_xticks(range(len(experts)), experts)
    axes.set_yticks(range(len(domains)), domains)
    for row, column in np.ndindex(*table.shape):
        value = table[row, column]
        text = "–" if np.isnan(value) else f"{value:.2f}"
        colour = "black" if value > 0.55 else "white"
        axes.text(column, row, text, ha="center", va="center", color=colour if text != "–" else "black")
    axes.set(xlabel="expert", ylabel="domain", title=title)
    figure.colorbar(image, ax=axes, label="mean router weight (0 to 1)")
    return _save(figure, path)


def weight_by_position(
    path: str | Path,
    curve: ArrayLike,
    bins: Sequence[tuple[int, int]],
    experts: Sequence[str],
    *,
    title: str = "",
) -> Path:
    """Mean router weight, (P, N), of position bins that double in width; see RoutingStats."""
    curve = np.asarray(curve, dtype=float)
    figure, axes = _axes()
    x = np.arange(len(bins))
    _lines(axes, {name: (x, curve[:, index]) for index, name in enumerate(experts)}, marker=True)
    names = [str(first) if first == last else f"{first}–{last}" for first, last in bins]
    axes.set_xticks(x, names, rotation=30 if len(bins) > 6 else 0)
    axes.set(xlabel="position in the document (tokens)", ylabel="mean router weight (0 to 1)", title=title)
    axes.set_ylim(0, 1)
    return _save(figure, path)


def denoising_steps(path: str | Path, curves: Mapping[str, Mapping[int, float]], *, title: str = "") -> Path:
    """Cross-entropy of the diffuser by its number of DDIM steps: curves[name][K]."""
    figure, axes = _axes()
    ordered = {name: (sorted(curve), [curve[k] for k in sorted(curve)]) for name, curve in curves.items()}
    _lines(axes, ordered, marker=True)
    steps = sorted({k for curve in curves.values() for k in curve})
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(k) for k in steps], minor=False)
    axes.set(xlabel="DDIM steps K", ylabel="cross-entropy (nats per token)", title=title)
    return _save(figure, path)


def error_by_noise(
    path: str | Path,
    curves: Mapping[str, ArrayLike],
    levels: Sequence[tuple[int, int]],
    *,
    title: str = "",
    relative: bool = True,
) -> Path:
    """Squared error of the denoiser by noise bucket: curves[name] (K,); see DenoisingError.

    With `relative` the values are shares of the error of predicting the mean, drawn as the line at 1.
    """
    figure, axes = _axes()
    x = np.arange(len(levels))
    if relative:
        axes.axhline(1, color="#444444", linestyle="--", linewidth=1, label="predict the mean")
    _lines(axes, {name: (x, np.asarray(values)) for name, values in curves.items()}, marker=True)
    axes.set_xticks(x, [f"{first}–{last}" for first, last in levels], rotation=30)
    unit = "share of predict-the-mean" if relative else "per feature"
    axes.set(xlabel="noise level τ (steps of the schedule)", ylabel=f"squared error ({unit})", title=title)
    axes.set_ylim(bottom=0)
    return _save(figure, path)


def line_chart(
    path: str | Path,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    x_scale: str = "linear",
    ticks: Sequence[str] = (),
    y_most: float | None = None,
) -> Path:
    """Curves name -> (x, y); `ticks` name the places 0, 1, 2... of the x axis, above `y_most` all is cut off."""
    figure, axes = _axes()
    few = all(np.size(x) <= 30 for x, _ in curves.values())
    _lines(axes, curves, marker=few, markersize=3.5, linewidth=1.3)
    axes.set_xscale(x_scale)
    places = np.unique(np.concatenate([np.asarray(x, dtype=float) for x, _ in curves.values()]))
    if x_scale == "log" and len(places) <= 8:
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
    if ticks:
        axes.set_xticks(range(len(ticks)), ticks, rotation=30 if len(ticks) > 6 else 0)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    if y_most is not None:
        axes.set_ylim(top=y_most)
    return _save(figure, path)


def intervals(
    path: str | Path,
    rows: Mapping[str, Interval],
    *,
    x_label: str,
    y_label: str = "",
    title: str = "",
    least: float = 0.0,
) -> Path:
    """A row each with its estimate and interval beside the line at 0: blue below it, red above, else grey.

    least: an estimate nearer to 0 than this is grey whatever its interval, and the axis shows at least twice as
    much on both sides.
    """
    figure, axes = _axes(height=0.32 * len(rows) + 1.3)
    axes.grid(False)
    axes.grid(axis="x", alpha=0.3)
    axes.axvline(0, color="#444444", linewidth=1)
    for place, interval in enumerate(rows.values()):
        side = 0 if interval.high < 0 else 1 if interval.low > 0 else None
        side = None if abs(interval.estimate) < least else side
        colour = "#666666" if side is None else COLOURS[side]
        if not np.isnan(interval.low):
            axes.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2)
        axes.plot(interval.estimate, place, marker="o" if side is None else "s", color=colour, markersize=5)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=6)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -2 * least), max(high, 2 * least))
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    return _save(figure, path)


def heatmap(
    path: str | Path,
    table: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
    title: str = "",
    around_zero: bool = False,
    digits: int = 2,
) -> Path:
    """A table (R, C) with its values written in; `around_zero` gives colours whose middle is 0."""
    table = np.asarray(table, dtype=float)
    figure, axes = _axes(width=1.15 * len(columns) + 3.2, height=0.45 * len(rows) + 1.6)
    finite = table[np.isfinite(table)]
    most = float(np.abs(finite).max()) if finite.size else 1.0
    low, high = -most, most
    if finite.size and not around_zero:
        low, high = float(finite.min()), float(finite.max())
    image = axes.imshow(
        table, cmap="RdBu_r" if around_zero else "cividis", vmin=low, vmax=high, aspect="auto"
    )
    axes.grid(False)
    axes.set_xticks(range(len(columns)), columns, rotation=30 if len(columns) > 5 else 0)
    axes.set_yticks(range(len(rows)), rows)
    for row, column in np.ndindex(*table.shape):
        value = float(table[row, column])
        share = 0.5 if high == low else (value - low) / (high - low)
        dark = abs(share - 0.5) > 0.33 if around_zero else share < 0.55
        text = f"{value:.{digits}f}" if np.isfinite(value) else "–"
        axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    # above the table, as beside the bar a long one would not fit a table of two rows
    axes.set_title(f"{title}\n{label}" if title else label, fontsize="medium")
    figure.colorbar(image, ax=axes)
    return _save(figure, path)


def interval_bars(
    path: str | Path, values: Mapping[str, Interval], *, y_label: str, x_label: str = "", title: str = ""
) -> Path:
    """One bar a name with its interval."""
    figure, axes = _axes(width=max(4.5, 0.95 * len(values) + 1.6))
    axes.axhline(0, color="#444444", linewidth=0.8)
    for place, interval in enumerate(values.values()):
        bars = [
            [max(0.0, np.nan_to_num(interval.estimate - interval.low))],
            [max(0.0, np.nan_to_num(interval.high - interval.estimate))],
        ]
        axes.bar(place, interval.estimate, 0.6, yerr=bars, color=COLOURS[place % len(COLOURS)], capsize=3)
    axes.set_xticks(range(len(values)), [textwrap.fill(name, 14) for name in values])
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    return _save(figure, path)
