"""Reports: Markdown and one self-contained HTML file to read, JSON to compute with, the tables on the terminal."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nano_think.evals.report_html import html_page
from nano_think.files import atomic_write, write_json


@dataclass(frozen=True)
class Table:
    """Headers, rows of raw values, and how to show them.

    Attributes:
        headers: one per column.
        rows: raw values; None is shown as a dash.
        align: "l", "c" or "r" per column; by default right for columns that hold a number, else left.
        formats: format spec per column, "" for plain text; by default ".4g" for floats. Values that know
            their own format, as Interval does, follow the spec too.
        title: shown above the table.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    align: Sequence[str] | None = None
    formats: Sequence[str] | None = None
    title: str = ""

    def __post_init__(self) -> None:
        widths = {len(self.headers), *(len(row) for row in self.rows)}
        widths |= {len(given) for given in (self.align, self.formats) if given is not None}
        if len(widths) > 1:
            raise ValueError(f"Table {self.title!r}: headers, rows, align and formats must be equally long.")

    def cells(self) -> list[list[str]]:
        """The rows as text."""
        specs = self.formats or [""] * len(self.headers)
        return [[_cell(value, spec) for value, spec in zip(row, specs, strict=True)] for row in self.rows]

    def alignment(self) -> list[str]:
        """ "l", "c" or "r" per column."""
        if self.align is not None:
            return list(self.align)
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.headers)
        return ["l" if all(isinstance(v, str | None) for v in column) else "r" for column in columns]

    def markdown(self) -> str:
        """A GitHub-flavoured Markdown table."""
        rules = {"l": ":---", "c": ":---:", "r": "---:"}
        lines = [list(self.headers), [rules[a] for a in self.alignment()], *self.cells()]
        lines = [[_escape(text) for text in line] for line in lines]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"**{self.title}**\n\n{body}" if self.title else body


def _cell(value: Any, spec: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, str):
        return value
    return format(value, spec or (".4g" if isinstance(value, float) else ""))


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def render_table(table: Table, console: Any = None) -> None:
    """Print a table on the terminal.

    Args:
        console: a rich Console; a new one on standard output by default.
    """
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    sides: dict[str, Literal["left", "center", "right"]] = {"l": "left", "c": "center", "r": "right"}
    rich_table = RichTable(title=table.title or None)
    for header, side in zip(table.headers, table.alignment(), strict=True):
        rich_table.add_column(Text(header), justify=sides[side])
    for row in table.cells():
        # Text, because a plain string would be read as rich markup: "[0.1, 0.2]" must stay as it is
        rich_table.add_row(*(Text(cell) for cell in row))
    (console or Console()).print(rich_table)


def plain(value: Any) -> Any:
    """`value` as JSON data: dataclasses as objects, arrays as lists, NaN and infinities as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


class Report:
    """A report in order of its parts; every method returns the report, so calls can be chained."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str | Table | tuple[Path, str]] = []
        self._data: dict[str, Any] = {}

    def heading(self, text: str, level: int = 2) -> Report:
        """A heading below the title."""
        self._parts.append(f"{'#' * level} {text}")
        return self

    def text(self, markdown: str) -> Report:
        """A paragraph of Markdown."""
        self._parts.append(markdown.strip())
        return self

    def table(
        self,
        headers: Sequence[str] | Table,
        rows: Sequence[Sequence[Any]] = (),
        *,
        align: Sequence[str] | None = None,
        formats: Sequence[str] | None = None,
        title: str = "",
    ) -> Report:
        """A table, either as a Table or by its parts; its raw values also go to the JSON file."""
        if not isinstance(headers, Table):
            headers = Table(headers, rows, align, formats, title)
        self._parts.append(headers)
        return self

    def figure(self, path: str | Path, caption: str) -> Report:
        """An image, linked relative to the report's folder."""
        self._parts.append((Path(path), caption))
        return self

    def json(self, data: Mapping[str, Any]) -> Report:
        """Values for the JSON file only."""
        self._data |= data
        return self

    @property
    def tables(self) -> list[Table]:
        """The tables in order, for example to print them."""
        return [part for part in self._parts if isinstance(part, Table)]

    def markdown(self, directory: str | Path = ".") -> str:
        """The report as Markdown that will lie in `directory`."""
        blocks = [f"# {self.title}"]
        for part in self._parts:
            if isinstance(part, Table):
                blocks.append(part.markdown())
            elif isinstance(part, tuple):
                path, caption = part
                relative = Path(os.path.relpath(path, directory)).as_posix()
                blocks.append(f"![{_escape(caption)}](<{relative}>)\n\n*{caption}*")
            else:
                blocks.append(part)
        return "\n\n".join(blocks) + "\n"

    def html(self) -> str:
        """The report as one HTML file with its figures inside.

        Raises:
            FileNotFoundError: a figure does not exist.
        """
        return html_page(self.title, self._parts)

    def write(self, directory: str | Path) -> Path:
        """Write report.md, report.html and report.json; returns the path of report.md.

        Raises:
            FileNotFoundError: a figure does not exist.
        """
        directory = Path(directory)
        page = self.html()  # first, because it refuses figures that do not exist
        tables = [{"title": t.title, "headers": t.headers, "rows": t.rows} for t in self.tables]
        write_json(directory / "report.json", plain({"title": self.title, **self._data, "tables": tables}))
        atomic_write(directory / "report.html", page)
        atomic_write(directory / "report.md", self.markdown(directory))
        return directory / "report.md"
