"""Table, JSON and figure of invented rounds."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from benchmarks.harness.case import Case, Group, Missing
from benchmarks.harness.report import memory_table, settings, show, write
from benchmarks.harness.statistics import Measured, Round, Sample, from_json

PEAKS = {"fp32": 100.0, "bf16": 200.0, "read": 10.0}


def measured(flops: float = 40.0) -> Measured:
    """Ours at half of the speed of a peer."""

    def case(name: str, peers: tuple[str, ...] = ()) -> Case:
        return Case(name, lambda: lambda: None, tokens=8, flops=flops, peers=peers)

    group = Group(
        "a step",
        [case("ours", ("theirs", "gone")), case("theirs")],
        [Missing("gone", "pip install gone")],
        ["FLOPs are invented."],
        {"slope": lambda m: 1.25},
    )
    samples = {"ours": Sample(1.0, 2.0, 1), "theirs": Sample(0.5, 0.6, 1)}
    return Measured(group, [Round(PEAKS, samples)] * 2)


def shown(what: Measured) -> str:
    console = Console(file=io.StringIO(), width=140)
    show(what, console)
    return console.file.getvalue()


def test_the_screen_says_plainly_who_is_slower_and_what_is_missing() -> None:
    text = shown(measured())
    assert "SLOWER than the peer" in text
    assert "0.50" in text
    assert "not here: gone: pip install gone" in text
    assert "FLOPs are invented." in text
    assert "1.250" in text


def test_json_holds_settings_medians_and_every_raw_number(tmp_path: Path) -> None:
    path = write("step", measured(), settings(1, kept_memory=False), {"ours": {"peak_mb": 1.0}}, tmp_path)
    data = json.loads(path.read_text())
    assert path == tmp_path / "step.json"
    assert {"threads", "machine", "commit", "packages", "float32_matmul_precision"} <= set(data)
    assert data["rounds"] == 2
    assert data["cases"][0]["ratios"] == {"theirs": 0.5}
    assert data["cases"][0]["share"] == 0.4
    assert data["missing"] == [{"name": "gone", "why": "pip install gone"}]
    assert (data["derived"], data["memory"]) == ({"slope": 1.25}, {"ours": {"peak_mb": 1.0}})
    again = Measured(measured().group, from_json(data["raw"]))
    assert again.rows() == measured().rows()


def test_the_figure_is_a_png_with_and_without_shares(tmp_path: Path) -> None:
    for name, flops in (("with", 40.0), ("without", 0.0)):
        write(name, measured(flops), {}, None, tmp_path)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_memory_table_shows_what_the_work_took() -> None:
    table = memory_table({"ours": {"before_mb": 500.0, "peak_mb": 1700.4, "work_mb": 1200.4}})
    assert table.cells() == [["ours", "500", "1,700", "1,200"]]
