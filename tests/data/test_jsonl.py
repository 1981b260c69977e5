from __future__ import annotations

import gzip
import io
import json
import logging
import subprocess
import sys
import textwrap

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from nano_think.data import jsonl
from nano_think.data.documents import Document
from nano_think.data.jsonl import JsonlSource
from nano_think.errors import UserError


def put(root, name, *lines):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(line if isinstance(line, bytes) else (json.dumps(line) + "\n").encode() for line in lines)
    if name.endswith(".gz"):
        data = gzip.compress(data)
    elif name.endswith(".zst"):
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def test_layout_formats_and_default_names(tmp_path):
    put(tmp_path, "general/b.jsonl.gz", {"text": "zip", "source": "book", "id": 7})
    put(tmp_path, "general/a.jsonl", {"text": "plain", "domain": "ignored"}, {"text": "two"})
    put(tmp_path, "code/c.jsonl.zst", {"text": "zstd", "id": ""})
    put(tmp_path, "general/readme.txt", b"no data")
    put(tmp_path, ".hidden/x.jsonl", {"text": "no"})
    source = JsonlSource(tmp_path)
    assert list(source) == [
        Document("zstd", "code", "jsonl:code/c.jsonl.zst", "code/c.jsonl.zst:1"),
        Document("plain", "general", "jsonl:general/a.jsonl", "general/a.jsonl:1"),
        Document("two", "general", "jsonl:general/a.jsonl", "general/a.jsonl:2"),
        Document("zip", "general", "book", "7"),
    ]
    assert list(source) == list(source)
    assert source.describe()["domains"] == ["code", "general"]


BROKEN = [
    (b'{"text": "cut of\n', "not valid JSON"),
    (b'{"texts": "misspelt"}\n', "no field 'text'"),
    (b'["a list"]\n', "no field 'text'"),
    (b"17\n", "no field 'text'"),
    (b'{"text": ["list"]}\n', "is not a string"),
    (b'{"text": null}\n', "is not a string"),
    (b'{"text": "caf\xe9"}\n', "not valid UTF-8"),
    (b'{"text": "half \\ud800 pair"}\n', "not valid UTF-8"),
    (b"[" * 100_000 + b"\n", "not valid JSON"),
    (b'{"text": "' + b"x" * 5000 + b'"}\n', "above max_line_bytes=4096"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN)
def test_a_broken_line_is_skipped_and_reported_with_file_and_line(tmp_path, caplog, line, reason):
    limit = 4096 if "max_line" in reason else 1 << 20
    put(tmp_path, "general/a.jsonl", {"text": "first"}, b"\n", line, {"text": "last"})
    source = JsonlSource(tmp_path, max_line_bytes=limit)
    with caplog.at_level(logging.WARNING):
        assert [document.text for document in source] == ["first", "last"]
    assert f"{tmp_path}/general/a.jsonl:3: " in caplog.text
    assert reason in caplog.text
    assert source.skipped() == {"malformed_lines": 1, "by_file": {"general/a.jsonl": 1}}
    assert len(list(source)) == 2
    assert source.skipped()["malformed_lines"] == 1, "counts of two readings must not add up"


@pytest.mark.parametrize(("line", "reason"), BROKEN)
def test_a_broken_line_is_fatal_on_request(tmp_path, line, reason):
    limit = 4096 if "max_line" in reason else 1 << 20
    put(tmp_path, "general/a.jsonl", {"text": "first"}, b"\n", line, {"text": "last"})
    with pytest.raises(UserError) as error:
        list(JsonlSource(tmp_path, on_error="fatal", max_line_bytes=limit))
    message = str(error.value)
    assert f"{tmp_path}/general/a.jsonl:3: " in message
    assert reason in message
    assert "\n" not in message


def test_only_the_first_broken_lines_are_logged_one_by_one(tmp_path, caplog):
    put(tmp_path, "general/a.jsonl", {"text": "good"}, *[b"bad\n"] * 500)
    source = JsonlSource(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert len(list(source)) == 1
    assert len(caplog.records) == 21
    assert "500 broken lines" in caplog.text


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("on_error", ["skip", "fatal"])
def test_damaged_compressed_data_counts_as_a_broken_line(tmp_path, suffix, on_error):
    path = put(
        tmp_path, f"general/a.jsonl.{suffix}", *[{"text": f"text number {i * i}"} for i in range(2000)]
    )
    path.write_bytes(path.read_bytes()[:-200])
    put(tmp_path, "general/b.jsonl", {"text": "other file"})
    source = JsonlSource(tmp_path, on_error=on_error)
    if on_error == "fatal":
        with pytest.raises(UserError, match="damaged"):
            list(source)
    else:
        assert list(source)[-1].text == "other file"
        assert source.skipped()["by_file"] == {f"general/a.jsonl.{suffix}": 1}


def test_a_zstd_file_may_have_several_frames(tmp_path):
    path = put(tmp_path, "general/a.jsonl.zst", {"text": "one"})
    lines = [json.dumps({"text": "y" * n}).encode() + b"\n" for n in range(3000)]
    path.write_bytes(
        path.read_bytes() + zstandard.compress(b"".join(lines)) + zstandard.compress(b'{"text": "end"}')
    )
    texts = [document.text for document in JsonlSource(tmp_path)]
    assert texts == ["one", *("y" * n for n in range(3000)), "end"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_error(tmp_path):
    put(
        tmp_path,
        "general/a.jsonl",
        b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n   \r\n{"text": "three"}',
    )
    source = JsonlSource(tmp_path)
    assert [document.text for document in source] == ["one", "two", "three"]
    assert source.skipped()["malformed_lines"] == 0


def test_missing_and_empty_folders_say_what_is_expected(tmp_path):
    for make in (
        lambda: None,
        lambda: (tmp_path / "data").mkdir(),
        lambda: put(tmp_path / "data", "loose.jsonl", {"text": "not in a domain folder"}),
        lambda: (tmp_path / "data" / "general").mkdir(),
    ):
        make()
        with pytest.raises(UserError, match=r"ROOT/<domain>/\*\.jsonl") as error:
            JsonlSource(tmp_path / "data")
        assert "\n" not in str(error.value)
    put(tmp_path / "data", "general/empty.jsonl", b"\n")
    with pytest.raises(UserError, match="No document in"):
        list(JsonlSource(tmp_path / "data"))


def test_unknown_option_and_missing_zstandard(tmp_path, monkeypatch):
    put(tmp_path, "general/a.jsonl.zst", {"text": "x"})
    with pytest.raises(UserError, match="skip or fatal"):
        JsonlSource(tmp_path, on_error="ignore")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="pip install zstandard"):
        list(JsonlSource(tmp_path))


def test_the_fingerprint_follows_names_contents_and_options(tmp_path):
    path = put(tmp_path, "general/a.jsonl", {"text": "one"})
    first = JsonlSource(tmp_path).fingerprint()
    assert first == JsonlSource(str(tmp_path), on_error="fatal").fingerprint()
    keys = {first, JsonlSource(tmp_path, text_key="body").fingerprint()}
    path.rename(path.with_name("b.jsonl"))
    keys.add(JsonlSource(tmp_path).fingerprint())
    put(tmp_path, "general/b.jsonl", {"text": "ane"})
    keys.add(JsonlSource(tmp_path).fingerprint())
    assert len(keys) == 4


@given(
    st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b" ")), max_size=12),
    st.integers(1, 9),
    st.integers(0, 12),
    st.booleans(),
)
def test_lines_are_cut_right_wherever_a_block_ends(lines, chunk, limit, ended):
    data = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    expected = [
        (number, line if len(line) <= limit else len(line))
        for number, line in enumerate(data.split(b"\n"), start=1)
        if line or number <= data.count(b"\n")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "_CHUNK", chunk)
        assert list(jsonl._lines(io.BytesIO(data), limit)) == expected


READ_AND_MEASURE = """
    import json, resource, sys
    from nano_think.data.jsonl import JsonlSource

    def peak_mb():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def read(root):
        source = JsonlSource(root, max_line_bytes=1 << 20)
        total = sum(len(document.text) for document in source)
        return total, source.skipped()["malformed_lines"]

    read(sys.argv[1])
    before = peak_mb()
    total, skipped = read(sys.argv[2])
    print(json.dumps({"total": total, "skipped": skipped, "growth_mb": peak_mb() - before}))
"""


def read_in_new_process(small, big):
    script = textwrap.dedent(READ_AND_MEASURE)
    output = subprocess.run(
        [sys.executable, "-c", script, small, big], capture_output=True, text=True, check=True
    )
    return json.loads(output.stdout)


def write_big(root, megabytes):
    """Write ordinary lines of 10 kB and, in the middle, one line of a third of the file."""
    line = json.dumps({"text": "x" * 10_000}).encode() + b"\n"
    count = megabytes * 1_000_000 // len(line) // 3
    (root / "general").mkdir(parents=True)
    with open(root / "general" / "big.jsonl", "wb") as file:
        for _ in range(count):
            file.write(line)
        file.write(b'{"text": "')
        for _ in range(count):
            file.write(line.strip().replace(b'"', b"'"))
        file.write(b'"}\n')
        for _ in range(count):
            file.write(line)
    return 2 * count * 10_000


@pytest.mark.parametrize("megabytes", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_is_flat_in_the_size_of_file_and_line(tmp_path, megabytes):
    write_big(tmp_path / "small", 3)
    expected = write_big(tmp_path / "big", megabytes)
    result = read_in_new_process(tmp_path / "small", tmp_path / "big")
    assert result["total"] == expected
    assert result["skipped"] == 1
    assert result["growth_mb"] < 12
