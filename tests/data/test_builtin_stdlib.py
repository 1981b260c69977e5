from __future__ import annotations

import sysconfig
from pathlib import Path

from nano_think.data import builtin_stdlib
from nano_think.data.builtin_stdlib import MAX_BYTES, MIN_BYTES, code_documents, docstrings, prose_documents

MODULE = '''
"""A module docstring that is long enough to be worth reading on its own, with more than eighty characters."""

class Thing:
    """The thing is documented at length as well, so that it is taken: eighty characters are quickly reached."""

    def short(self):
        """Too short."""

    async def method(self):
        """
        This method has a docstring with its own indentation, and it goes on for a while:

            an indented example stays indented
        """
'''


def test_docstrings_carry_the_name_of_what_they_document():
    text = docstrings(MODULE)
    parts = text.split("\n\n")
    assert parts[0].startswith("A module docstring")
    assert parts[1].startswith("Thing\nThe thing is documented")
    assert parts[2].startswith("Thing.method\nThis method has")
    assert "\n    an indented example" in text
    assert "Too short" not in text
    assert docstrings("def broken(:") == ""


def test_code_is_the_standard_library_without_tests_and_tables():
    root = Path(sysconfig.get_path("stdlib"))
    documents = {document.id: document for document in code_documents()}
    assert len(documents) > 200
    assert documents["textwrap.py"].text == (root / "textwrap.py").read_text(encoding="utf-8")
    for name, document in documents.items():
        assert not {"test", "tests", "idlelib", "site-packages", "__pycache__", "encodings"} & set(
            name.split("/")[:-1]
        )
        assert MIN_BYTES <= (root / name).stat().st_size <= MAX_BYTES
        assert document.source == "python:stdlib"


def test_prose_has_topics_and_docstrings():
    documents = list(prose_documents())
    by_source = {
        source: [d for d in documents if d.source == source] for source in {d.source for d in documents}
    }
    assert set(by_source) == {"python:help_topics", "python:docstrings"}
    assert sum(len(document.text) for document in documents) > 800_000
    assert any("lambda" in document.text for document in by_source["python:help_topics"])


def test_missing_and_unreadable_files_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "pkg" / "test").mkdir(parents=True)
    for name, data in {
        "good.py": b"# fine\n" * 50,
        "latin.py": b"# caf\xe9\n" * 50,
        "tiny.py": b"x = 1\n",
        "pkg/test/t.py": b"# test\n" * 50,
        "pkg/_sysconfigdata_x.py": b"# build\n" * 50,
    }.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere.py")
    monkeypatch.setattr(builtin_stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [document.id for document in code_documents()] == ["good.py"]
    monkeypatch.setattr(builtin_stdlib.sysconfig, "get_path", lambda name: str(tmp_path / "absent"))
    assert list(code_documents()) == []
