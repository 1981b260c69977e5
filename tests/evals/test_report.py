import io
import json
import math
import os

import numpy as np
import pytest
import torch
from rich.console import Console

from nano_think.evals.bootstrap import Interval
from nano_think.evals.report import Report, Table, plain, render_table


def test_markdown_table():
    table = Table(["model", "loss"], [["a|b\nc", 1.23456], ["d", None], ["e", math.nan]], title="Test")
    assert table.markdown().splitlines() == [
        "**Test**",
        "",
        "| model | loss |",
        "| :--- | ---: |",
        "| a\\|b c | 1.235 |",
        "| d | – |",
        "| e | – |",
    ]


def test_formats_align_and_values_that_format_themselves():
    rows = [["x", 12345, Interval(1.0, 0.5, 1.5, 3)]]
    table = Table(["n", "count", "ppl"], rows, align=["c", "l", "r"], formats=["", ",", ".2f"])
    assert table.cells() == [["x", "12,345", "1.00 [0.50, 1.50]"]]
    assert "| :---: | :--- | ---: |" in table.markdown()
    assert Table(["a"], []).markdown() == "| a |\n| :--- |"


@pytest.mark.parametrize(
    "bad", [{"rows": [[1]]}, {"rows": [], "align": ["l"]}, {"rows": [], "formats": [""]}]
)
def test_ragged_tables_are_refused(bad):
    with pytest.raises(ValueError, match="equally long"):
        Table(["a", "b"], **bad)


def test_terminal_shows_brackets_as_they_are():
    output = io.StringIO()
    table = Table(["[bold]x"], [[Interval(1.0, 0.5, 1.5, 3)], ["[red]y[/red]"]], formats=[".1f"])
    render_table(table, Console(file=output, width=80))
    for text in ("[bold]x", "1.0 [0.5, 1.5]", "[red]y[/red]"):
        assert text in output.getvalue()


def test_plain_values_are_valid_json():
    value = {
        "array": np.arange(3),
        "tensor": torch.tensor(1.5),
        "scalar": np.float64("nan"),
        "interval": Interval(1.0, math.nan, math.inf, 3),
        2: (1, True, None, "x"),
    }
    text = json.dumps(plain(value), allow_nan=False)
    assert json.loads(text) == {
        "array": [0, 1, 2],
        "tensor": 1.5,
        "scalar": None,
        "interval": {"estimate": 1.0, "low": None, "high": None, "documents": 3, "level": 0.95},
        "2": [1, True, None, "x"],
    }


def test_report_is_written_in_order_with_relative_figures(tmp_path):
    figure = tmp_path / "plots" / "loss.png"
    figure.parent.mkdir()
    figure.write_bytes(b"png")
    report = Report("Title").text("First.").heading("Part").table(["a"], [[1.0]], title="T")
    report.figure(figure, "A loss").json({"best": np.float32(0.5)})
    path = report.write(tmp_path / "out")
    assert path.read_text() == (
        "# Title\n\nFirst.\n\n## Part\n\n**T**\n\n| a |\n| ---: |\n| 1 |\n\n"
        "![A loss](<../plots/loss.png>)\n\n*A loss*\n"
    )
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data == {
        "title": "Title",
        "best": 0.5,
        "tables": [{"title": "T", "headers": ["a"], "rows": [[1.0]]}],
    }
    assert sorted(os.listdir(tmp_path / "out")) == ["report.html", "report.json", "report.md"]
    assert report.tables[0].title == "T"


def test_missing_figure_leaves_nothing_behind(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        Report("T").figure(tmp_path / "no.png", "x").write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
