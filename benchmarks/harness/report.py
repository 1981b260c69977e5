"""One measured group as a table on screen, a JSON file with every raw number, and a figure."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.harness.statistics import Measured, Row, as_json
from nano_think.evals.report import Table, plain, render_table
from nano_think.files import atomic_write, write_json
from nano_think.phases.machine import versions

RESULTS = Path(__file__).resolve().parents[2] / "experiments" / "results" / "bench"
PEERS = ("transformers", "litgpt", "mambapy", "tokenizers", "faiss-cpu", "llama-cpp-python")
COLOURS = {"ours": "#0072B2", "peers": "#999999"}


def settings(threads: int, kept_memory: bool) -> dict[str, Any]:
    """What the whole process runs with: the same for every case."""
    return {
        "threads": threads,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "freed_memory": "kept by the allocator" if kept_memory else "as the allocator likes",
        "load_average": round(os.getloadavg()[0], 2),
        **versions(),
        "peers": {name: version for name in PEERS if (version := _version(name))},
    }


def show(measured: Measured, console: Console | None = None) -> None:
    """The tables, the notes and what is missing."""
    console = console or Console()
    for table in tables(measured, measured.rows()):
        render_table(table, console)
    for missing in measured.group.missing:
        console.print(f"not here: {missing.name}: {missing.why}", markup=False)
    for note in measured.group.notes:
        console.print(note, markup=False)


def tables(measured: Measured, rows: list[Row]) -> list[Table]:
    """Cases, ratios to peers, and the group's own figures; those that there are."""
    found = [main_table(measured, rows)]
    if pairs := ratio_rows(rows):
        headers = ["case", "peer", "times as fast", ""]
        found.append(Table(headers, pairs, formats=["", "", ".2f", ""], title="same round, medians"))
    if derived := measured.derived():
        found.append(Table(["figure", "value"], list(derived.items()), formats=["", ".3f"]))
    return found


def main_table(measured: Measured, rows: list[Row]) -> Table:
    """One line a case; peaks of the same run in the title."""
    peaks = ", ".join(f"{name} {measured.peak(name) / 1e9:.0f}" for name in ("fp32", "bf16", "read"))
    clock = "CPU" if measured.group.device == "cpu" else "wall"
    unit = f"GFLOP (read: GB) per {clock} second"
    title = f"{measured.group.title}; {len(measured.rounds)} rounds; peaks {peaks} {unit}"
    headers = ["case", f"{clock} ms", f"tok/{clock} s", "quartiles", "tok/s wall", "of peak"]
    cells = [
        [r.name, r.milliseconds, r.rate, f"{_short(r.low)} to {_short(r.high)}", r.wall_rate, r.share]
        for r in rows
    ]
    return Table(
        headers, cells, align=list("lrrrrr"), formats=["", ".1f", ",.4g", "", ",.4g", ".2f"], title=title
    )


def ratio_rows(rows: list[Row]) -> list[list[Any]]:
    """Case, peer, ratio, and in words where a peer is the faster."""
    return [
        [row.name, peer, ratio, "SLOWER than the peer" if ratio < 1 else ""]
        for row in rows
        for peer, ratio in row.ratios.items()
    ]


def write(
    name: str,
    measured: Measured,
    made_with: Mapping[str, Any],
    memory: Mapping[str, Any] | None,
    folder: Path,
) -> Path:
    """<folder>/<name>.json with every number, .md with the tables, .png; returns the path of the first."""
    rows = measured.rows()
    data = {
        "group": name,
        "title": measured.group.title,
        **made_with,
        "rounds": len(measured.rounds),
        "median_peaks": {peak: measured.peak(peak) for peak in measured.rounds[0].peaks},
        "cases": rows,
        "derived": measured.derived(),
        "memory": memory,
        "missing": measured.group.missing,
        "notes": measured.group.notes,
        "raw": as_json(measured.rounds),
    }
    path = folder / f"{name}.json"
    write_json(path, plain(data))
    blocks = [f"# {name}", *(table.markdown() for table in tables(measured, rows)), *measured.group.notes]
    blocks += [memory_table(memory).markdown()] if memory else []
    blocks.append(f"`python -m benchmarks {' '.join(made_with.get('command', [name]))}`, {_made(made_with)}.")
    atomic_write(folder / f"{name}.md", "\n\n".join(blocks) + "\n")
    draw(measured, rows, folder / f"{name}.png")
    return path


def _made(made_with: Mapping[str, Any]) -> str:
    """Machine, code and threads in a few words."""
    known = {key: made_with[key] for key in ("machine", "commit", "threads") if key in made_with}
    return ", ".join(f"{key} {value}" for key, value in known.items())


def draw(measured: Measured, rows: list[Row], path: Path) -> None:
    """Bars: share of the peak where every case claims one, tokens per CPU second otherwise."""
    from matplotlib.figure import Figure

    shares = [row.share for row in rows if row.share is not None]
    as_share = len(shares) == len(rows)
    values = shares if as_share else [row.rate for row in rows]
    ours = {case.name for case in measured.group.cases if case.peers}
    figure = Figure(figsize=(7.5, 1.2 + 0.34 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    colours = [COLOURS["ours" if row.name in ours else "peers"] for row in rows]
    bars = axes.barh([row.name for row in rows], values, color=colours)
    axes.bar_label(bars, [f"{value:.2f}" if as_share else _short(value) for value in values], padding=3)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)
    clock = "CPU second" if measured.group.device == "cpu" else "second"
    axes.set_xlabel("share of the GEMM or read peak" if as_share else f"tokens per {clock}")
    axes.set_title(measured.group.title, fontsize=10, loc="left", wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def memory_table(memory: Mapping[str, Mapping[str, float]]) -> Table:
    """Peak memory of every case in a process of its own, beside what it held before the work."""
    columns = ("before_mb", "peak_mb", "work_mb")
    rows = [[name, *(line.get(column) for column in columns)] for name, line in memory.items()]
    headers = ["case", "loaded MB", "peak MB", "peak less loaded MB"]
    return Table(
        headers, rows, formats=["", ",.0f", ",.0f", ",.0f"], title="peak memory of a process of its own"
    )


def _short(value: float) -> str:
    digits = max(0, 2 - int(math.log10(value))) if value >= 1 else 3
    return f"{value:,.{digits}f}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
