"""docs/coverage.md: each row of the feature list once, and nothing called done that no test or result shows."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STATUSES = ("done", "partly", "different", "open")
SKIPS = ("skip", "skipif", "xfail")
ROWS = re.findall(
    r"^\| ([MA]\d{3}) \| (\S+) \| (.*) \|$", (ROOT / "docs" / "coverage.md").read_text(), flags=re.M
)
IDS = [f"M{i:03}" for i in range(1, 30)] + [f"A{i:03}" for i in range(1, 267)]


@lru_cache
def names_in(path: Path) -> dict[str, bool]:
    """Names of the tests of a file (`Class::name` in classes) and whether each is marked to be skipped."""
    found: dict[str, bool] = {}

    def marked(node: ast.AST) -> bool:
        return any(
            f".{skip}" in ast.unparse(d) for d in getattr(node, "decorator_list", []) for skip in SKIPS
        )

    def visit(body: list[ast.stmt], prefix: str, skipped: bool) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}::", skipped or marked(node))
            elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[prefix + node.name] = skipped or marked(node)

    visit(ast.parse(path.read_text()).body, "", False)
    return found


def problem(evidence: str) -> str | None:
    """What is wrong with a piece of evidence: a test, a file of tests, or a committed result."""
    file, _, name = evidence.partition("::")
    path = ROOT / file
    if not path.is_file():
        return "there is no such file"
    if not file.startswith("tests/"):
        return None if file.startswith("experiments/") and not name else "neither a test nor a result"
    tests = names_in(path)
    if not name:
        return None if tests else "holds no test"
    if name not in tests:
        return "there is no such test"
    return "is skipped" if tests[name] else None


def test_every_row_stands_once_in_order() -> None:
    assert [row[0] for row in ROWS] == IDS


def test_statuses_are_known_and_everything_else_has_words() -> None:
    for number, status, evidence in ROWS:
        assert status in STATUSES, number
        assert evidence.strip(), number
        if status in ("different", "open", "partly"):
            assert len(re.sub(r"`[^`]*`", "", evidence).split()) >= 3, f"{number}: say why or what is missing"


def test_done_is_shown_by_something_that_exists() -> None:
    problems = {}
    for number, status, evidence in ROWS:
        pieces = re.findall(r"`((?:tests|experiments)/[^`]+)`", evidence)
        if status == "done" and not pieces:
            problems[number] = "no evidence"
        problems |= {f"{number} {piece}": found for piece in pieces if (found := problem(piece))}
    assert problems == {}


def test_the_check_can_fail() -> None:
    assert problem("tests/contracts/test_coverage.py::test_nothing_of_this_name")
    assert problem("tests/contracts/missing.py")
    assert problem("README.md")
    assert problem("tests/contracts/test_coverage.py::test_the_check_can_fail") is None
