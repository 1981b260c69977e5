from __future__ import annotations

import json

import pytest

from nano_think.data.corpus import Corpus, Record
from nano_think.data.split import SPLITS
from nano_think.errors import UserError


def write_corpus(root):
    for number, split in enumerate(SPLITS):
        (root / split).mkdir(parents=True)
        record = {
            "uid": number,
            "cluster": number,
            "text": f"Zeile {number}\nü",
            "domain": "b",
            "source": "s",
            "id": "x",
        }
        for domain in ("b", "a"):
            (root / split / f"{domain}.jsonl").write_text(json.dumps(record | {"domain": domain}) + "\n")
    (root / "manifest.json").write_text(json.dumps({"domains": ["a", "b"], "hash": "abc"}))


def test_records_come_back_as_written(tmp_path):
    write_corpus(tmp_path)
    corpus = Corpus(tmp_path)
    assert corpus.domains == ["a", "b"]
    assert corpus.hash == "abc"
    assert list(corpus.documents("test", "b")) == [Record(3, 3, "Zeile 3\nü", "b", "s", "x")]


@pytest.mark.parametrize(("split", "domain"), [("train", "a"), ("test", "c"), ("../x", "a")])
def test_unknown_names_are_refused_before_reading(tmp_path, split, domain):
    write_corpus(tmp_path)
    with pytest.raises(ValueError, match="splits are expert_train"):
        Corpus(tmp_path).documents(split, domain)


def test_a_folder_without_manifest_is_no_corpus(tmp_path):
    with pytest.raises(UserError, match="phase=data"):
        Corpus(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"uid": 1}',
        b"[" * 100_000,
        b'{"uid": "1", "cluster": 1, "text": "a", "domain": "a", "source": "s", "id": "x"}',
        b'{"uid": 1, "cluster": -1, "text": "a", "domain": "a", "source": "s", "id": "x"}',
        b'{"uid": 1, "cluster": 1, "text": ["a"], "domain": "a", "source": "s", "id": "x"}',
        b'{"uid": 1, "cluster": 1, "text": "a", "domain": "a", "source": "s", "id": "x", "more": 1}',
    ],
    ids=range(9),
)
def test_a_line_that_is_no_record_is_named_by_file_and_place(tmp_path, line):
    write_corpus(tmp_path)
    file = tmp_path / "test" / "a.jsonl"
    before = file.read_bytes()
    file.write_bytes(before + line + b"\n")
    records = Corpus(tmp_path).documents("test", "a")
    with pytest.raises(UserError, match=rf"a\.jsonl is damaged \(at byte {len(before)}: .*phase=data"):
        list(records)


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        '{"hash": "h"}',
        '{"domains": "ab", "hash": "h"}',
        '{"domains": ["a"]}',
        '{"domains": ["../a"], "hash": "h"}',
        '{"domains": [".."], "hash": "h"}',
        '{"domains": ["a\\u0000"], "hash": "h"}',
        '{"domains": ["gone"], "hash": "h"}',
        '{"domains": ["' + "a" * 3000 + '"], "hash": "h"}',
        '{"domains": ["a"], "hash": "h", "files": {"test/a.jsonl": "another"}}',
        '{"domains": ["a"], "hash": "h", "files": ["test/a.jsonl"]}',
    ],
    ids=range(12),
)
def test_a_manifest_of_something_else_is_damage(tmp_path, manifest):
    write_corpus(tmp_path)
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match="is damaged"):
        _read_first_domain(tmp_path)


def _read_first_domain(path):
    corpus = Corpus(path)
    return list(corpus.documents("test", corpus.domains[0]))
