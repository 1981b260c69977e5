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
