"""Code and technical prose that every Python brings along: its standard library and documentation."""

from __future__ import annotations

import ast
import functools
import importlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from nano_think.data.documents import Document

MIN_BYTES, MAX_BYTES = 200, 64 << 10
LICENCE = "PSF License Agreement (a few modules carry their own compatible notice)"
# Tests and data tables are no prose and no typical code; site-packages is not the standard library.
SKIPPED_FOLDERS = frozenset(
    (
        "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
        "site-packages", "test", "tests", "turtledemo",
    )
)  # fmt: skip
_MIN_DOCSTRING, _MIN_PROSE = 80, 400


def module_files() -> list[Path]:
    """Return the standard library's modules of usual size, sorted; empty if they are not plain files."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        build_config = path.name.startswith("_sysconfigdata") or any(f.startswith("config-") for f in folders)
        if not build_config and not SKIPPED_FOLDERS.intersection(folders):
            files.append(path)
    return files


def code_documents() -> Iterator[Document]:
    """Yield one document for each module; files that cannot be read are left out."""
    for name, text in _modules():
        yield Document(text, "code", "python:stdlib", name)


@functools.cache  # parsing the whole library takes seconds, its prose little memory
def prose_documents() -> tuple[Document, ...]:
    """Return the topics of the interactive help and, for each module, the docstrings it holds."""
    documents = [
        Document(text, "academic", "python:help_topics", name)
        for name, text in sorted(_help_topics().items())
    ]
    for name, text in _modules():
        prose = docstrings(text)
        if len(prose) >= _MIN_PROSE:
            documents.append(Document(f"{name}\n\n{prose}", "academic", "python:docstrings", name))
    return tuple(documents)


def docstrings(source: str) -> str:
    """Return the longer docstrings of a module, each under its object's name; "" if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    parts: list[str] = []
    _collect(tree, "", parts)
    return "\n\n".join(parts)


def _collect(node: ast.AST, prefix: str, parts: list[str]) -> None:
    text = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
    if text is not None and len(text) >= _MIN_DOCSTRING:
        parts.append(f"{prefix}\n{text}" if prefix else text)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DOCUMENTED):
            name = child.name  # type: ignore[union-attr]
            _collect(child, f"{prefix}.{name}" if prefix else name, parts)


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _modules() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in module_files():
        try:
            if MIN_BYTES <= path.stat().st_size <= MAX_BYTES:
                yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        except (OSError, UnicodeError):
            continue


def _help_topics() -> dict[str, str]:
    try:
        return dict(importlib.import_module("pydoc_data.topics").topics)
    except ImportError:
        return {}
