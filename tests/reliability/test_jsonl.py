"""JSON lines from anywhere: each broken line is counted and located, none is lost, none brings the reader down."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import logging
import random
from pathlib import Path

import pytest
import zstandard

from nano_think.data import jsonl
from nano_think.data.hub import HUB_SETS, HubSource
from nano_think.data.jsonl import JsonlSource
from nano_think.data.spool import digest_batch
from nano_think.errors import UserError
from tests.reliability.mutations import HOSTILE_VALUES, Case, campaign, change_bytes, change_json, patience

RECORDS = [
    {"text": "In the beginning was the Word.", "source": "book", "id": 1},
    {
        "text": "def add(a, b):\n    return a + b\n",
        "id": "x/1",
        "meta": {"stars": [1, 2.5, None], "ok": True},
    },
    {"text": "Ünïcödé — 漢字 🙂", "source": "", "id": None, "nested": [[{"deep": "er"}]]},
    {"text": "the last one"},
]
PACKED = {"": bytes, ".gz": lambda data: gzip.compress(data, 1), ".zst": zstandard.compress}


def lines_of(records: list) -> bytes:
    return b"".join(
        json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass") + b"\n" for record in records
    )


def drawn(rng: random.Random) -> Case:
    """(bytes of a file, its suffix, whether it is valid): some valid, half changed as JSON, the rest bytes."""
    suffix, kind = rng.choice(list(PACKED)), rng.random()
    records = [json.loads(json.dumps(record)) for record in rng.sample(RECORDS, rng.randint(1, len(RECORDS)))]
    if kind < 0.1:
        return Case((PACKED[suffix](lines_of(records)), suffix, True), False)
    if kind < 0.5:
        place = rng.randrange(len(records))
        records[place] = change_json(records[place], rng)
        return Case((PACKED[suffix](lines_of(records)), suffix, False), True)
    if kind < 0.75:
        return Case((PACKED[suffix](change_bytes(lines_of(records), rng)), suffix, False), True)
    if kind < 0.95:
        return Case((change_bytes(PACKED[suffix](lines_of(records)), rng), suffix, False), True)
    return Case((rng.randbytes(rng.randrange(300)), suffix, False), False)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_line_is_read_or_counted_whatever_it_is(tmp_path, caplog, count):
    folder = tmp_path / "general"
    folder.mkdir()
    caplog.set_level(logging.CRITICAL)

    def judge(data: tuple[bytes, str, bool], reached) -> None:
        content, suffix, valid = data
        path = folder / f"a.jsonl{suffix}"
        path.write_bytes(content)
        try:
            source = JsonlSource(tmp_path, max_line_bytes=20_000)
            source.fingerprint()
            documents = []
            with contextlib.suppress(UserError):  # that there is no document
                for document in source:
                    documents.append(document)
            skipped = source.skipped()["malformed_lines"]
            assert len(digest_batch(documents, "salt")) == len(documents)
            if documents:
                reached()
            if not suffix and not content.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
                assert len(documents) + skipped == len(not_blank(content))
            assert not valid or (documents and not skipped)
            if skipped:
                list(JsonlSource(tmp_path, on_error="fatal", max_line_bytes=20_000))
                raise AssertionError("on_error=fatal took what on_error=skip counts as broken")
            if not documents:
                raise UserError("no document")
        finally:
            path.unlink()

    tally = campaign("JSON lines", drawn, judge, count)
    print(f"\n{tally.line()}")
    assert tally.findings == []
    assert tally.mutated > tally.tried / 2 < tally.reached
    assert tally.taken > tally.tried / 10 < tally.refused
    assert tally.growth_mb < 30


def not_blank(content: bytes) -> list[bytes]:
    """The lines that say something; a first one may begin with a byte order mark."""
    lines = content.split(b"\n")
    return [line for line in lines if line.strip()]


def read(root: Path, **options) -> tuple[list[str], dict]:
    source = JsonlSource(root, **options)
    return [document.text for document in source], source.skipped()["by_file"]


def put(root: Path, content: bytes, name: str = "general/a.jsonl") -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("line", "taken"),
    [
        (b'{"text": "kept", "id": NaN, "x": [Infinity, -Infinity, 1e999]}', "kept"),
        (b'{"text": "first", "text": "second"}', "second"),
        (b'{"text": "kept", "id": ' + b"9" * 4000 + b"}", "kept"),
        (b'{"text": "nul \\u0000 inside"}', "nul \x00 inside"),
        (b'\xef\xbb\xbf{"text": "marked"}\r', "marked"),
        (b'{"text": "kept", "id": "half \\ud800", "source": "\\udfff"}', "kept"),
        (b'{"text": "kept", "id": [[1]], "source": {"a": 1}}', "kept"),
        (b'{"text": ""}', ""),
        (b'{"text": "kept", "x": ' + b"9" * 5000 + b"}", None),
        (b'{"text": "kept", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}", None),
        (b'{"text": "kept"} {"text": "and another"}', None),
        (b'{"text": "raw \x00 byte"}', None),
        (b'{"text": "\xed\xa0\x80"}', None),
        (b'\xff\xfe{\x00"\x00', None),
        (b"\x00" * 50, None),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_json_leaves_open_is_settled(tmp_path, line, taken):
    put(tmp_path, line + b'\n{"text": "next"}\n')
    texts, skipped = read(tmp_path)
    assert texts == ([] if taken is None else [taken]) + ["next"]
    assert skipped == ({"general/a.jsonl": 1} if taken is None else {})
    digest_batch(list(JsonlSource(tmp_path)), "salt")


def test_a_packed_file_with_a_plain_name_is_one_report(tmp_path, caplog):
    for pack in (gzip.compress, zstandard.compress):
        put(tmp_path, pack(lines_of(RECORDS * 500)))
        put(tmp_path, b'{"text": "other"}\n', "general/b.jsonl")
        assert read(tmp_path) == (["other"], {"general/a.jsonl": 1})
        assert (
            "general/a.jsonl:1: compressed, file not read: its name should end in .gz or .zst" in caplog.text
        )
    put(tmp_path, lines_of(RECORDS), "general/c.jsonl.gz")
    put(tmp_path, lines_of(RECORDS), "general/d.jsonl.zst")
    assert read(tmp_path)[1] == {f"general/{name}": 1 for name in ("a.jsonl", "c.jsonl.gz", "d.jsonl.zst")}


def test_names_that_are_no_files_are_reported_not_passed_over(tmp_path, caplog):
    put(tmp_path, b'{"text": "kept"}\n')
    (tmp_path / "general" / "folder.jsonl").mkdir()
    (tmp_path / "general" / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "general" / "gone.jsonl.gz").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "again").symlink_to(tmp_path / "general")
    texts, skipped = read(tmp_path)
    assert texts == ["kept", "kept"]
    names = ("folder.jsonl", "gone.jsonl.gz", "loop.jsonl")
    assert skipped == {f"{domain}/{name}": 1 for domain in ("again", "general") for name in names}
    assert "general/folder.jsonl:0: a folder, a broken link or a device" in caplog.text
    with pytest.raises(UserError, match=r"again/folder\.jsonl:0: .*on_error=skip"):
        read(tmp_path, on_error="fatal")


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    put(tmp_path, b'{"text": "kept"}\n')
    source = JsonlSource(tmp_path)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "general/a.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr(jsonl, "hash_file", refused)
        with pytest.raises(UserError, match=r"Cannot read general/a\.jsonl: Permission denied"):
            source.fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(jsonl, "_open", refused)
        with pytest.raises(UserError, match=r"Cannot read .*general/a\.jsonl: Permission denied"):
            list(source)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refused)
        with pytest.raises(UserError, match="Permission denied"):
            JsonlSource(tmp_path)


def test_names_of_files_and_domains_need_not_be_text(tmp_path):
    odd = b"caf\xe9\n.jsonl".decode(errors="surrogateescape")
    put(tmp_path, b'{"text": "kept"}\nbroken\n', f"general/{odd}")
    (document,) = source = JsonlSource(tmp_path)
    assert document.id == r"general/caf\udce9\n.jsonl:1"
    assert source.skipped()["by_file"] == {r"general/caf\udce9\n.jsonl": 1}
    assert len(source.fingerprint()) == 32
    digest_batch([document], "salt")
    for name in (b"caf\xe9".decode(errors="surrogateescape"), "two\nlines", "漢" * 80):
        path = put(tmp_path, b'{"text": "kept"}\n', f"{name}/a.jsonl")
        with pytest.raises(UserError, match=r"cannot name a domain: use printable") as error:
            JsonlSource(tmp_path)
        assert len(str(error.value).splitlines()) == 1
        str(error.value).encode()
        path.unlink()


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_leaves_no_line_is_refused(tmp_path, limit):
    put(tmp_path, b'{"text": "kept"}\n')
    with pytest.raises(UserError, match=f"max_line_bytes={limit} leaves no line"):
        JsonlSource(tmp_path, max_line_bytes=limit)


def test_a_zstd_file_that_grows_a_thousandfold_is_read_in_pieces(tmp_path, monkeypatch):
    bomb = zstandard.compress(b'{"text": "' + b"x" * (64 << 20) + b'"}\n{"text": "next"}\n')
    assert len(bomb) < 64 << 10
    put(tmp_path, bomb, "general/a.jsonl.zst")
    largest: list[int] = []
    taken = jsonl._ZstdReader.read
    monkeypatch.setattr(jsonl._ZstdReader, "read", lambda self, size: noted(taken(self, size), largest))
    assert read(tmp_path) == (["next"], {"general/a.jsonl.zst": 1})
    assert max(largest) <= 33 << 20


def noted(block: bytes, sizes: list[int]) -> bytes:
    sizes.append(len(block))
    return block


@pytest.mark.parametrize("count", [60, pytest.param(10_000, marks=pytest.mark.slow)])
def test_rows_of_hub_sets_are_read_or_counted(caplog, count):
    caplog.set_level(logging.CRITICAL)  # what is captured would be held in memory
    columns = {
        "text": "= A Title =", "title": "On x", "abstract": "We study x.", "id": "0704.1", "content": "x = 1\n",
        "license": "mit", "repo_name": "a/b", "path": "c.py", "TEXT": "A paragraph.\n\nOne more.", "book": "I",
        "METADATA": json.dumps({"locc": "B", "title": "Ethics"}), "chapter": 1, "verse": 2,
    }  # fmt: skip

    def draw(rng: random.Random) -> Case:
        rows = [dict(columns), dict(columns)]
        if rng.random() < 0.1:
            return Case((rows, True), False)
        rows[0][rng.choice(list(columns))] = rng.choice(HOSTILE_VALUES)
        if rng.random() < 0.3:
            rows[0] = rng.choice(HOSTILE_VALUES)
        if rng.random() < 0.3:
            rows[1]["METADATA"] = json.dumps(rng.choice(HOSTILE_VALUES)) + rng.choice(("", "}", "["))
        return Case((rows, False), True)

    def judge(data: tuple[list, bool], reached) -> None:
        rows, valid = data
        source = HubSource(load=lambda hub_set: iter(rows))
        documents = list(source)
        if documents:
            reached()
        assert len(documents) >= len(HUB_SETS) if valid else True
        digest_batch(documents, "salt")
        if not documents:
            raise UserError("no document")

    tally = campaign("rows of Hub sets", draw, judge, count)
    print(f"\n{tally.line()}")
    assert tally.findings == []
    assert tally.taken > tally.tried / 2 < tally.reached
    assert tally.growth_mb < 30


@pytest.mark.parametrize(
    "content", [b"{", b"[" * 5000, b'"\xff"', b'{"text": ' + b"9" * 5000 + b"}", b"\x1f\x8b"]
)
def test_a_broken_fixture_is_located(tmp_path, content):
    good = b'{"id": "1", "title": "a", "abstract": "b"}\n'
    (tmp_path / "arxiv_abstracts.jsonl").write_bytes(good + content + b"\n" + good)
    with pytest.raises(UserError, match=r"arxiv_abstracts\.jsonl:[12]: cannot be read .*mend it") as error:
        list(HubSource(fixtures=tmp_path))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf")])
def test_a_scale_that_takes_no_sample_is_refused(scale):
    with pytest.raises(UserError, match="positive and finite"):
        HubSource(scale=scale)


def test_a_long_line_is_passed_over_without_a_copy_of_it():
    """No block of it is kept: what `_lines` holds on to is at most the limit and one block."""

    class Endless(io.RawIOBase):
        left = 3000

        def read(self, size: int = -1) -> bytes:
            self.left -= 1
            return b"x" * size if self.left > 0 else b"\nnext\n" if self.left == 0 else b""

    with patience(60):
        (first, length), (second, line) = jsonl._lines(Endless(), 1 << 20)
    assert (first, length, second, line) == (1, 2999 << 20, 2, b"next")
