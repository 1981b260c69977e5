"""From rows in a Hub set's own schema to documents.

Each joiner takes the rows of one set and a counter for the rows it refuses, and yields (samples, id, text):
how many of the set's samples the document holds, and its id. "a#b" means part b of the work a.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

Row = dict[str, Any]
Joined = Iterator[tuple[int, str, str]]

# SPDX-like names as the code set writes them; copyleft licences are not taken.
PERMISSIVE = frozenset(("apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "isc", "mit", "unlicense"))
# Library of Congress: B philosophy, BC logic, BD speculative, BH aesthetics, BJ ethics. (BF is psychology, BL
# to BX religion.)
PHILOSOPHY_CLASSES = frozenset(("B", "BC", "BD", "BH", "BJ"))
PASSAGES_PER_BOOK = 25
PASSAGE_CHARACTERS = 8_000

# "= Title =" but not "== Section ==": WikiText writes sections as " = = Section = = ".
_ARTICLE = re.compile(r"^\s*=\s+[^=\s](?:.*[^=\s])?\s+=\s*$")
_SPACED_PUNCTUATION = re.compile(r" ([.,;:!?)\]])")


def _text(value: Any) -> str:
    """A column's text, "" where it holds none; half of a surrogate pair becomes "?"."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else ""


def abstract(rows: Iterable[Row], refused: Counter[str]) -> Joined:
    """Title, blank line, abstract with its line breaks joined."""
    for row in rows:
        title, body = (" ".join(_text(row[name]).split()) for name in ("title", "abstract"))
        if not title or not body:
            refused["without_title_or_abstract"] += 1
            continue
        yield 1, _text(str(row.get("id") or "")), f"{title}\n\n{body}"


def plain(rows: Iterable[Row], refused: Counter[str]) -> Joined:
    """The column "text" as it is."""
    for row in rows:
        text = _text(row["text"]).strip()
        if text:
            yield 1, "", text
        else:
            refused["blank"] += 1


def wikitext(rows: Iterable[Row], refused: Counter[str]) -> Joined:
    """Rows up to the next " = Title = " are one article; the spaced punctuation of the set is undone."""
    lines: list[str] = []
    for row in rows:
        line = _text(row["text"]).strip()
        if not line:
            continue
        if _ARTICLE.match(line) and lines:
            yield len(lines), "", "\n".join(lines)
            lines = []
        lines.append(_detokenise(line))
    if lines:
        yield len(lines), "", "\n".join(lines)


def _detokenise(line: str) -> str:
    if line.startswith("="):
        return line.replace("= =", "==").replace("= =", "==")
    for mark in ("-", ",", "."):
        line = line.replace(f" @{mark}@ ", mark)
    return _SPACED_PUNCTUATION.sub(r"\1", line).replace("( ", "(").replace(" 's", "'s")


def code(rows: Iterable[Row], refused: Counter[str]) -> Joined:
    """Source files under a permissive licence."""
    for row in rows:
        licence, content = _text(row["license"]).lower() or "none", _text(row["content"])
        if licence not in PERMISSIVE:
            refused[f"licence_{licence}"] += 1
        elif not content.strip():
            refused["blank"] += 1
        else:
            yield 1, _text(f"{row['repo_name']}#{row['path']}"), content


def philosophy(rows: Iterable[Row], refused: Counter[str]) -> Joined:
    """Passages of whole paragraphs from books catalogued as philosophy."""
    for row in rows:
        try:
            book = json.loads(row["METADATA"] or "{}")
            classes = {name.strip() for name in re.split(r"[;,]", str(book.get("locc") or ""))}
        except (ValueError, TypeError, AttributeError, RecursionError):
            refused["unreadable_metadata"] += 1
            continue
        if not classes & PHILOSOPHY_CLASSES:
            refused["not_philosophy"] += 1
            continue
        title = _text(str(book.get("title") or book.get("text_id") or "untitled")).replace("#", "")
        for number, passage in enumerate(_passages(_text(row["TEXT"]))):
            yield 1, f"{title}#{number}", passage


def _passages(book: str) -> Iterator[str]:
    """Yield the first full passages of a book, cut between paragraphs."""
    paragraphs: list[str] = []
    size = done = 0
    for paragraph in re.split(r"\n\s*\n", book.replace("\r\n", "\n")):
        joined = " ".join(paragraph.split())
        if not joined:
            continue
        paragraphs.append(joined)
        size += len(joined)
        if size >= PASSAGE_CHARACTERS:
            yield "\n\n".join(paragraphs)
            paragraphs, size, done = [], 0, done + 1
            if done == PASSAGES_PER_BOOK:
                return
    if paragraphs and not done:
        yield "\n\n".join(paragraphs)


def bible(rows: Iterable[Row], refused: Counter[str]) -> Joined:
    """One chapter a document: "Book N", blank line, one numbered verse a line."""
    for (book, chapter), verses in groupby(
        rows, key=lambda row: (_text(str(row["book"])).strip(), _text(str(row["chapter"])))
    ):
        read = ((row["verse"], " ".join(_text(row["text"]).split())) for row in verses)
        lines = [_text(f"{verse} {text}") for verse, text in read if text]
        if lines:
            yield len(lines), f"{book}#{chapter}", f"{book} {chapter}\n\n" + "\n".join(lines)
        else:
            refused["blank"] += 1


JOINERS: dict[str, Callable[[Iterable[Row], Counter[str]], Joined]] = {
    "abstract": abstract,
    "plain": plain,
    "wikitext": wikitext,
    "code": code,
    "philosophy": philosophy,
    "bible": bible,
}
