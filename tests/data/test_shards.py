from __future__ import annotations

import json
import multiprocessing
import tracemalloc

import numpy as np
import pytest

from nano_think.data.corpus import Corpus
from nano_think.data.shards import SPLITS, Shards, build_shards
from nano_think.errors import UserError
from nano_think.tokenizer import Tokenizer, train_bpe

TEXTS = {
    "expert_train": {"code": ["x = 1\n", "", "naïve ☕"], "prose": ["one"]},
    "validation": {"code": ["y"], "prose": ["two", "three"]},
    "test": {"prose": ["four"]},
}


def test_streams_hold_every_document_between_bos_and_eos(make_shards, byte_tokenizer) -> None:
    shards = make_shards(TEXTS)
    assert shards.domains == ["code", "prose"]
    for split in SPLITS:
        for domain in shards.domains:
            expected = []
            for text in TEXTS.get(split, {}).get(domain, []):
                expected += [byte_tokenizer.bos_id, *text.encode(), byte_tokenizer.eos_id]
            stream = shards.tokens(split, domain)
            assert stream.tolist() == expected
            assert stream.dtype == np.uint16
            assert shards.num_tokens(split, domain) == len(expected)
    assert shards.num_tokens("validation") == 3 + 5 + 7


def test_document_table_finds_each_document_and_its_record(make_shards, write_corpus) -> None:
    shards = make_shards(TEXTS)
    docs = shards.docs("expert_train", "code")
    assert len(docs) == 3
    for index, text in enumerate(TEXTS["expert_train"]["code"]):
        start, length = int(docs.start[index]), int(docs.length[index])
        piece = shards.tokens("expert_train", "code")[start : start + length]
        assert bytes(piece[1:-1].astype(np.uint8)).decode() == text
        assert docs.num_bytes[index] == len(text.encode())
        assert (docs.uid[index], docs.cluster[index]) == (index + 1, index + 1001)
        line = shards.source_record("expert_train", "code", index)
        path = shards.directory.parent / "corpus" / "expert_train" / "code.jsonl"
        assert json.loads(path.read_text().splitlines()[line])["text"] == text
    assert len(shards.docs("test", "code")) == 0


def test_manifest_counts(make_shards, byte_tokenizer) -> None:
    manifest = make_shards(TEXTS).manifest
    assert manifest["splits"]["expert_train"]["code"] == {"documents": 3, "tokens": 22, "bytes": 16}
    assert manifest["splits"]["fusion_train"]["prose"] == {"documents": 0, "tokens": 0, "bytes": 0}
    assert manifest["tokenizer_hash"] == byte_tokenizer.hash
    assert manifest["corpus_hash"] == "hash of corpus"
    assert (manifest["vocab_size"], manifest["pad_id"]) == (259, 258)


def test_wide_vocabularies_take_four_bytes(write_corpus, byte_tokenizer, tmp_path) -> None:
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)][: (1 << 16) - 200]
    ranks = {token: rank for rank, token in enumerate([bytes([v]) for v in range(256)] + pairs)}
    wide = Tokenizer(ranks, byte_tokenizer.pattern)
    shards = build_shards(write_corpus(TEXTS), wide, tmp_path / "wide")
    stream = shards.tokens("expert_train", "prose")
    assert stream.dtype == np.uint32
    assert stream[0] == wide.bos_id > np.iinfo(np.uint16).max


def test_finished_shards_are_kept_and_not_built_again(write_corpus, byte_tokenizer, tmp_path) -> None:
    corpus = write_corpus(TEXTS)
    counted: list[int] = []
    build_shards(corpus, byte_tokenizer, tmp_path / "out", progress=counted.append)
    assert sum(counted) == 8
    build_shards(corpus, byte_tokenizer, tmp_path / "out", progress=counted.append)
    assert sum(counted) == 8


def test_another_tokenizer_is_refused(write_corpus, byte_tokenizer, tmp_path) -> None:
    corpus, other = write_corpus(TEXTS), train_bpe(["abab"], 260)
    shards = build_shards(corpus, byte_tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="were made by tokenizer"):
        build_shards(corpus, other, tmp_path / "out")
    with pytest.raises(UserError, match="were made by tokenizer"):
        shards.check_tokenizer(other.hash)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failure_leaves_nothing_behind(
    processes, write_corpus, byte_tokenizer, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("nano_think.data.workers.INLINE_ITEMS", 0)
    corpus = write_corpus(TEXTS)
    with open(corpus.path / "test" / "prose.jsonl", "a") as file:
        file.write("{broken")
    with pytest.raises(UserError, match=r"prose\.jsonl is damaged \(at byte \d+: Expecting property name"):
        build_shards(corpus, byte_tokenizer, tmp_path / "out", processes)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_any_number_of_processes_writes_the_same_bytes(
    write_corpus, byte_tokenizer, tmp_path, monkeypatch
) -> None:
    corpus = write_corpus(
        {"expert_train": {"a": [f"text {i} \u00e9" for i in range(300)], "b": []}, "test": {"b": ["x"]}}
    )
    once = build_shards(corpus, byte_tokenizer, tmp_path / "once", processes=1)
    monkeypatch.setattr("nano_think.data.workers.INLINE_ITEMS", 1)
    monkeypatch.setattr("nano_think.data.corpus.BLOCK_BYTES", 500)
    for processes in (1, 2, 3):
        other = build_shards(corpus, byte_tokenizer, tmp_path / str(processes), processes)
        for path in once.directory.rglob("*.*"):
            assert (other.directory / path.relative_to(once.directory)).read_bytes() == path.read_bytes()


def test_missing_shards_and_unknown_names_are_explained(make_shards, tmp_path) -> None:
    with pytest.raises(UserError, match="no token shards in"):
        Shards(tmp_path)
    shards = make_shards(TEXTS)
    with pytest.raises(UserError, match="no shard expert_train/poetry"):
        shards.tokens("expert_train", "poetry")
    with pytest.raises(UserError, match="no shard train/code"):
        shards.docs("train", "code")


def _build(corpus_path: str, out: str, barrier) -> None:
    barrier.wait()
    build_shards(Corpus(corpus_path), train_bpe(["x"], 259), out, processes=1)


def test_two_processes_may_build_the_same_shards(write_corpus, tmp_path) -> None:
    corpus = write_corpus({"expert_train": {"a": ["some text"] * 2000}})
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    jobs = [context.Process(target=_build, args=(corpus.path, tmp_path / "out", barrier)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert Shards(tmp_path / "out").num_tokens("expert_train") == 2000 * 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


def test_memory_does_not_grow_with_the_corpus(write_corpus, byte_tokenizer, tmp_path) -> None:
    def peak(count: int) -> int:
        corpus = write_corpus({"expert_train": {"a": ["word " * 400] * count}}, f"corpus{count}")
        tracemalloc.start()
        build_shards(corpus, byte_tokenizer, tmp_path / str(count), processes=1)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    small, large = peak(1500), peak(6000)
    assert large < 1.25 * small


def _rewritten(shards, **changes):
    """The manifest with changes, and without the hashes, as somebody else may have written it."""
    manifest = {name: value for name, value in shards.manifest.items() if name != "files"} | changes
    (shards.directory / "manifest.json").write_text(json.dumps(manifest))
    return Shards(shards.directory)


def _all_read(shards):
    for split in shards.manifest["splits"]:
        for domain in shards.domains:
            shards.tokens(split, domain)
            shards.docs(split, domain)


@pytest.mark.parametrize("name", ["tokens.bin", "docs.npy"])
def test_a_bit_that_is_no_longer_the_one_written_is_noticed(make_shards, name) -> None:
    shards = make_shards(TEXTS)
    _all_read(shards)
    file = shards.directory / "test" / f"prose.{name}"
    data = bytearray(file.read_bytes())
    data[-1 if name == "docs.npy" else 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} is damaged .*`python train.py phase=data` again"):
        _all_read(Shards(shards.directory))


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 0},
        {"vocab_size": "259"},
        {"vocab_size": 10**12},
        {"pad_id": 259},
        {"dtype": "object"},
        {"dtype": "float64"},
        {"domains": "prose"},
        {"domains": ["../prose"]},
        {"domains": []},
        {"splits": {}, "domains": None},
        {"splits": {"..": {}}},
        {"tokenizer_hash": None},
        {"files": [1]},
    ],
    ids=str,
)
def test_a_manifest_that_cannot_be_ours_is_damage(make_shards, changes) -> None:
    shards = make_shards(TEXTS)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        _rewritten(shards, **changes)


def test_tokens_beyond_the_vocabulary_and_tables_of_other_documents_are_damage(make_shards) -> None:
    shards = make_shards(TEXTS)
    with pytest.raises(UserError, match=r"holds tokens beyond its vocabulary of 257"):
        _all_read(_rewritten(shards, vocab_size=257, pad_id=0))
    file = shards.directory / "expert_train" / "code.docs.npy"
    table = np.load(file)
    for change in (lambda t: t[:, :-1], lambda t: t.astype("float64"), lambda t: t + 1, lambda t: t[:, ::-1]):
        np.save(file, change(table))
        with pytest.raises(UserError, match=r"docs\.npy is damaged"):
            _all_read(_rewritten(shards))
