from __future__ import annotations

import json
import random
import shutil
import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nano_think.data.corpus import Corpus
from nano_think.data.documents import Document
from nano_think.data.leakage import _Known, leakage_report
from nano_think.data.normalize import fold
from nano_think.data.prepare import prepare_corpus
from nano_think.data.split import SPLITS, own_split
from nano_think.data.spool import content_uid
from nano_think.errors import UserError


class ListSource:
    """Documents from a list."""

    def __init__(self, documents, key="list"):
        self.documents = documents
        self.key = key

    def __iter__(self):
        return iter(self.documents)

    def fingerprint(self):
        return self.key

    def describe(self):
        return {"name": "list", "domains": ["general"], "licences": {}, "synthetic": {"code": True}}

    def skipped(self):
        return {"malformed_lines": 3}


def words(rng, count=60):
    return [f"w{rng.randrange(10**6)}" for _ in range(count)]


def pool(seed=0, count=300, domains=("general", "code")):
    rng = random.Random(seed)
    return [
        Document(" ".join(words(rng)), domain, f"set{seed}", f"{domain}-{i}")
        for domain in domains
        for i in range(count)
    ]


def near_copy(document, rng, source="other", domain=None, edits=1):
    changed = document.text.split()
    for _ in range(edits):
        changed[rng.randrange(len(changed))] = f"edit{rng.randrange(10**6)}"
    return Document(" ".join(changed), domain or document.domain, source, f"near-{document.id}")


def placement(corpus):
    """{folded text: split} of all kept documents."""
    return {
        fold(record.text): split
        for split in SPLITS
        for domain in corpus.domains
        for record in corpus.documents(split, domain)
    }


def test_records_counts_and_hash_describe_the_files(tmp_path):
    documents = pool()
    corpus = prepare_corpus(ListSource(documents), tmp_path / "corpus")
    manifest = corpus.manifest
    assert corpus.domains == ["code", "general"]
    assert manifest["synthetic"] == {"code": True, "general": False}
    assert manifest["skipped"] == {"malformed_lines": 3}
    assert manifest["totals"]["documents"] == len(documents)
    assert manifest["totals"]["bytes"] == sum(len(document.text.encode()) for document in documents)
    seen = {}
    for split in SPLITS:
        for domain in corpus.domains:
            records = list(corpus.documents(split, domain))
            entry = manifest["splits"][split][domain]
            assert entry["documents"] == len(records) > 0
            assert entry["bytes"] == sum(len(record.text.encode()) for record in records)
            assert [record.uid for record in records] == sorted(record.uid for record in records)
            for record in records:
                assert record.uid == content_uid(record.text) == record.cluster
                assert 0 <= record.uid < 2**63
                assert split == SPLITS[own_split(fold(record.text))]
                seen[record.id] = record
    assert len(seen) == len(documents)
    for document in documents:
        record = seen[document.id]
        assert (record.text, record.domain, record.source) == (
            document.text,
            document.domain,
            document.source,
        )


def test_planted_exact_near_and_cross_set_copies_end_in_one_split(tmp_path):
    rng = random.Random(1)
    documents = pool()
    exact = [Document(f" {d.text.upper()}\r\n", d.domain, "shouted", f"exact-{d.id}") for d in documents[:20]]
    across = [Document(d.text, "academic", "third set", f"across-{d.id}") for d in documents[20:40]]
    near = [near_copy(d, rng, domain="academic") for d in documents[300:600]]
    corpus = prepare_corpus(ListSource([*documents, *exact, *across, *near]), tmp_path / "corpus")

    removed = corpus.manifest["removed"]
    assert removed["exact_copies"] == 20
    assert removed["exact_copies_across_domains"] == 20

    split_of_cluster, ids = {}, {}
    for split in SPLITS:
        for domain in corpus.domains:
            for record in corpus.documents(split, domain):
                assert split_of_cluster.setdefault(record.cluster, split) == split
                ids.setdefault(record.cluster, set()).add(record.id)
    excluded = {entry["id"]: entry for entry in corpus.leakage["excluded"]}
    assert removed["near_copies_across_splits"] == len(excluded) > 50
    for original, copy in zip(documents[300:600], near, strict=True):
        clusters = {c for c, members in ids.items() if members & {original.id, copy.id}}
        assert len(clusters) == 1
        (cluster,) = clusters
        assert cluster == min(content_uid(original.text), content_uid(copy.text))
        own = {d.id: SPLITS[own_split(fold(d.text))] for d in (original, copy)}
        winner = max(own.values(), key=SPLITS.index)
        assert split_of_cluster[cluster] == winner
        for name, split in own.items():
            if split == winner:
                assert name in ids[cluster]
            else:
                assert excluded[name]["own_split"] == split
                assert excluded[name]["cluster_split"] == winner
                assert excluded[name]["cluster"] == cluster
    assert corpus.leakage["exact_overlap"] == corpus.leakage["clusters_in_two_splits"] == 0


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), copies=st.integers(0, 40), strangers=st.integers(0, 5))
def test_adding_documents_moves_no_other(tmp_path, seed, copies, strangers):
    rng = random.Random(seed)
    documents = pool(count=150)
    base = tmp_path / "base"
    before = prepare_corpus(ListSource(documents), base)
    added = [near_copy(rng.choice(documents), rng, edits=rng.randrange(4)) for _ in range(copies)]
    added += [Document(" ".join(words(rng)), "general", "new", f"new-{i}") for i in range(strangers)]
    mixed = [*documents, *added]
    rng.shuffle(mixed)
    shutil.rmtree(tmp_path / "more", ignore_errors=True)
    after = prepare_corpus(ListSource(mixed), tmp_path / "more")

    old, new = placement(before), placement(after)
    lost = {entry["id"] for entry in after.leakage["excluded"]}
    for document in documents:
        text = fold(document.text)
        if text in new:
            assert new[text] == old[text]
        else:
            assert document.id in lost


def test_the_result_depends_on_neither_order_nor_time_nor_place(tmp_path):
    rng = random.Random(3)
    documents = pool()
    documents += [near_copy(d, rng) for d in documents[:30]]
    documents += [Document(d.text.title(), "code", "twin", f"twin-{d.id}") for d in documents[:10]]
    first = prepare_corpus(ListSource(documents), tmp_path / "first")
    rng.shuffle(documents)
    second = prepare_corpus(ListSource(documents), tmp_path / "deep" / "second")
    assert first.hash == second.hash
    assert first.manifest == second.manifest
    files = sorted(path.relative_to(first.path) for path in first.path.rglob("*") if path.is_file())
    assert len(files) == 3 + 2 * len(SPLITS)
    for file in files:
        assert (first.path / file).read_bytes() == (second.path / file).read_bytes(), file
    other_salt = prepare_corpus(ListSource(documents), tmp_path / "salted", salt="pepper")
    assert other_salt.hash != first.hash
    assert placement(other_salt).keys() & placement(first).keys()


def test_any_number_of_processes_writes_the_same_bytes(tmp_path, monkeypatch):
    rng = random.Random(4)
    documents = [Document(" \n", "code", "s", "blank"), *pool()]
    documents += [near_copy(d, rng) for d in documents[1:60]]
    documents += [Document(d.text.title(), "code", "twin", f"twin-{d.id}") for d in documents[5:20]]
    alone = prepare_corpus(ListSource(documents), tmp_path / "alone", processes=1)
    monkeypatch.setattr("nano_think.data.workers.INLINE_ITEMS", 1)
    monkeypatch.setattr("nano_think.data.spool._BATCH_DOCUMENTS", 7)
    monkeypatch.setattr("nano_think.data.corpus.BLOCK_BYTES", 3000)
    for processes in (1, 2, 3):
        other = prepare_corpus(ListSource(documents), tmp_path / str(processes), processes=processes)
        files = sorted(path for path in alone.path.rglob("*") if path.is_file())
        for path in files:
            assert (other.path / path.relative_to(alone.path)).read_bytes() == path.read_bytes(), path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "alone"]


def test_memory_does_not_grow_with_the_texts(tmp_path, monkeypatch):
    """Four times the text in as many documents, so that what is kept of each does not count."""
    monkeypatch.setattr("nano_think.data.spool._BATCH_CHARACTERS", 1 << 16)
    monkeypatch.setattr("nano_think.data.corpus.BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr("nano_think.data.leakage._BATCH_NGRAMS", 1000)

    class Growing(ListSource):
        def __iter__(self):
            rng = random.Random(0)
            for i in range(200):
                yield Document(" ".join(words(rng, self.documents)), "general", "s", str(i))

    def peak(count):
        prepare_corpus(Growing(10), tmp_path / f"warm{count}", processes=1)
        tracemalloc.start()
        prepare_corpus(Growing(count), tmp_path / str(count), processes=1)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    small, large = peak(500), peak(2000)
    assert (tmp_path / "2000" / "expert_train" / "general.jsonl").stat().st_size > 2_000_000
    assert large < 1.5 * small, (small, large)  # holding the texts would make it 2.3


def test_a_file_is_a_line_of_json_for_each_record(tmp_path):
    documents = [*pool(), Document('quotes " and \\ and \u2028 ☕ ' * 9, "general", "sé", "odd")]
    corpus = prepare_corpus(ListSource(documents), tmp_path / "corpus")
    for split in SPLITS:
        lines = (corpus.path / split / "general.jsonl").read_bytes().split(b"\n")
        records = list(corpus.documents(split, "general"))
        expected = [json.dumps(asdict(record), ensure_ascii=False).encode() for record in records]
        assert lines == [*expected, b""]


def test_a_second_call_reuses_the_same_corpus_and_refuses_another(tmp_path):
    out = tmp_path / "corpus"
    prepare_corpus(ListSource(pool()), out)
    stamp = (out / "manifest.json").stat().st_mtime_ns
    reads = []
    prepare_corpus(ListSource(pool()), out, progress=reads.append)
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    assert not reads
    for arguments in (
        {"source": ListSource(pool(), key="other")},
        {"source": ListSource(pool()), "salt": "other"},
        {"source": ListSource(pool()), "jaccard": 0.5},
    ):
        with pytest.raises(UserError, match="other data or settings"):
            prepare_corpus(out_dir=out, **arguments)
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError, match="not a prepared corpus"):
        prepare_corpus(ListSource(pool()), tmp_path / "notes")


def test_a_domain_that_misses_a_split_is_named_and_nothing_is_left_behind(tmp_path):
    documents = [*pool(domains=("general",)), *pool(seed=5, count=3, domains=("tiny",))]
    with pytest.raises(
        UserError, match=r"'tiny' has 3 documents and none of them falls into the split"
    ) as error:
        prepare_corpus(ListSource(documents), tmp_path / "corpus")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no document"):
        prepare_corpus(ListSource([Document(" \n\x00", "general", "s", "1")]), tmp_path / "corpus")

    def failing():
        yield from pool()
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError):
        prepare_corpus(ListSource(failing()), tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == []


def test_empty_documents_are_counted_and_progress_grows_to_the_text_size(tmp_path):
    documents = [*pool(), Document(" \t\n", "general", "s", "blank")]
    steps = []
    corpus = prepare_corpus(ListSource(documents), tmp_path / "corpus", progress=steps.append)
    assert corpus.manifest["removed"]["empty"] == 1
    assert steps == sorted(steps)
    assert steps[-1] >= corpus.manifest["totals"]["bytes"]


def test_overlap_of_13_grams_equals_brute_force(tmp_path):
    rng = random.Random(7)
    phrases = [" ".join(words(rng, 15)) for _ in range(10)]
    documents = [
        Document(
            " ".join([*words(rng, 40), rng.choice(phrases), *words(rng, 40)]), domain, "s", f"{domain}{i}"
        )
        if i % 3 == 0
        else Document(" ".join(words(rng, rng.choice([5, 80]))), domain, "s", f"{domain}{i}")
        for domain in ("a", "b")
        for i in range(200)
    ]
    corpus = prepare_corpus(ListSource(documents), tmp_path / "corpus")

    def grams(record):
        tokens = record.text.split()
        return [tuple(tokens[i : i + 13]) for i in range(len(tokens) - 12)]

    train = {
        gram
        for domain in "ab"
        for record in corpus.documents("expert_train", domain)
        for gram in grams(record)
    }
    for domain in "ab":
        test = [grams(record) for record in corpus.documents("test", domain)]
        row = corpus.leakage["overlap_13gram"][domain]
        hits = [sum(gram in train for gram in document) for document in test]
        assert row["documents"] == len(test)
        assert row["ngrams"] == sum(map(len, test))
        assert row["documents_share"] == pytest.approx(sum(hit > 0 for hit in hits) / len(test), abs=1e-6)
        assert row["ngrams_share"] == pytest.approx(sum(hits) / row["ngrams"], abs=1e-6)
        assert 0 < row["ngrams_share"] < 1
    summary = (corpus.path / "leakage.md").read_text()
    assert f"{corpus.leakage['overlap_13gram']['a']['documents_share']:.2%}" in summary


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, unique=True), st.lists(st.integers(0, 2**64 - 1)))
def test_known_hashes_are_found_and_no_others(known, others):
    table = _Known(np.array(sorted(known), dtype=np.uint64))
    found = table.places(np.array([*others, *known[::2], *known[::2]], dtype=np.uint64))
    assert set(table.hashes[found].tolist()) == set(known) & {*others, *known[::2]}
    assert len(set(found.tolist())) == len(found)


def test_the_audit_sees_leaks_that_someone_put_into_the_files(tmp_path):
    corpus = prepare_corpus(ListSource(pool()), tmp_path / "corpus")
    record = next(corpus.documents("expert_train", "general"))
    line = {
        "uid": 1,
        "cluster": record.cluster,
        "text": record.text.upper(),
        "domain": "general",
        "source": "",
        "id": "",
    }
    with open(corpus.path / "test" / "general.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=r"general\.jsonl is damaged \(not the file that was made\)"):
        leakage_report(Corpus(corpus.path), [])
    manifest = {name: value for name, value in corpus.manifest.items() if name != "files"}
    (corpus.path / "manifest.json").write_text(json.dumps(manifest))
    report = leakage_report(Corpus(corpus.path), [])
    assert report["exact_overlap"] == 1
    assert report["clusters_in_two_splits"] == 1
    assert report["overlap_13gram"]["general"]["documents_share"] > 0
