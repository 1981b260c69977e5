"""The visibility rule against a loop over records, eviction and sessions against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_think import generations, vector_store
from nano_think.vector_records import SPLITS, Reader, session_id
from nano_think.vector_store import VectorStore

EXACT = ("faiss", "torch")


def unit(count: int, d_model: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, d_model)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_wrong_names_are_refused():
    for wrong in ({"backend": "annoy"}, {"policy": "random"}, {"value_dtype": "int8"}, {"capacity": 0}):
        with pytest.raises(ValueError):
            VectorStore(4, **wrong)


@pytest.mark.parametrize("backend", EXACT)
def test_plain_vector_store(backend):
    store = VectorStore(16, backend=backend)
    vectors = torch.from_numpy(unit(10, 16)) * torch.arange(1, 11).unsqueeze(1)
    store.add(vectors)
    assert len(store) == 10
    hits = store.search(vectors, 3, Reader())
    assert hits.ids[:, 0].tolist() == list(range(10))
    torch.testing.assert_close(hits.scores[:, 0], torch.ones(10))
    found = store.nearest(vectors[2], 4)
    assert found.shape == (4, 16)
    torch.testing.assert_close(found[0], vectors[2] / 3)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    similarity = found @ vectors[2]
    assert (similarity.diff() < 0).all()
    assert store.nearest(vectors, 99).shape == (10, 10, 16)
    store.reset()
    assert len(store) == 0
    assert store.nearest(vectors[2], 4).shape == (0, 16)
    assert not store.search(vectors, 3, Reader()).valid.any()


def test_values_are_kept_as_they_are():
    keys, values = torch.from_numpy(unit(5, 8)), 30 * torch.from_numpy(unit(5, 8, 1))
    hits = {}
    for dtype in ("float32", "float16"):
        store = VectorStore(8, value_dtype=dtype)
        store.add(keys, values)
        hits[dtype] = store.search(keys, 1, Reader()).values[:, 0]
    assert torch.equal(hits["float32"], values)
    assert torch.equal(hits["float16"], values.half().float())
    with pytest.raises(ValueError, match="float16"):
        store.add(keys, values * 1e6)
    with pytest.raises(ValueError, match="shape"):
        store.add(keys, values[:3])


def test_bad_input_is_refused_and_leaves_the_store_alone():
    store = VectorStore(4, chunk=3)
    store.add(unit(3, 4))
    good = unit(2, 4)
    for keys, meta in (
        (np.zeros((1, 4)), {}),
        (np.full((1, 4), np.inf), {}),
        (unit(2, 5), {}),
        (good, {"colour": 1}),
        (good, {"split": "train"}),
        (good, {"tokens": np.zeros((2, 4))}),
        (good, {"doc_uid": np.zeros(3)}),
    ):
        with pytest.raises(ValueError):
            store.add(keys, **meta)
    with pytest.raises(ValueError):
        store.search(torch.full((1, 4), torch.nan), 1, Reader())
    with pytest.raises(ValueError):
        store.search(torch.ones(2, 4), 1, Reader(doc_uid=torch.ones(3, dtype=torch.int64)))
    assert len(store) == 3
    zero = store.search(torch.zeros(1, 4), 2, Reader())
    assert not zero.valid.any()


def test_large_ids_survive_and_tokens_can_be_shown():
    store = VectorStore(4, chunk=5)
    uid = torch.tensor([2**62 + 1, 2**62 + 3])
    ids = store.add(unit(2, 4), doc_uid=uid, cluster=uid, tokens=torch.tensor([[1, 2], [3, 4]]), domain=7)
    found = store.lookup(np.array([[ids[1], -1]]))
    assert found["doc_uid"].tolist() == [[2**62 + 3, -1]]
    assert found["domain"].tolist() == [[7, -1]]
    assert found["tokens"].tolist() == [[[3, 4, -1, -1, -1], [-1] * 5]]
    mine = Reader(doc_uid=torch.tensor([2**62 + 3]), cluster=torch.tensor([5]))
    assert store.search(unit(2, 4)[1:], 2, mine).ids.tolist() == [[0, -1]]


def expected_hits(queries, store_rows, reader, k):
    """The rule of `Reader`, one record at a time."""
    result = []
    for q, query in enumerate(queries):
        seen = []
        for i, r in enumerate(store_rows):
            shared = r["session"] == 0 and SPLITS[r["split"]] in reader.splits
            own = reader.session != 0 and r["session"] == reader.session
            in_time = reader.generation is None or r["generation"] < reader.generation
            mine = reader.doc_uid is not None and int(reader.doc_uid[q]) == r["doc_uid"] >= 0
            near = reader.cluster is not None and int(reader.cluster[q]) == r["cluster"] >= 0
            if (shared or own) and in_time and not mine and not near:
                seen.append((-float(np.dot(query.astype(np.float64), r["key"].astype(np.float64))), i))
        result.append([i for _, i in sorted(seen)[:k]])
    return result


@pytest.mark.parametrize("backend", EXACT)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_visibility_equals_the_rule_record_by_record(backend, data):
    count = data.draw(st.integers(1, 60))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    columns = {
        "doc_uid": rng.integers(-1, 4, count),
        "cluster": rng.integers(-1, 4, count),
        "generation": rng.integers(0, 3, count),
        "split": rng.integers(0, 4, count),
        "session": rng.choice([0, 0, 0, 5, 6], count),
    }
    keys, queries = unit(count, 6, 1), unit(5, 6, 2)
    store = VectorStore(6, backend=backend, near_duplicate=None)
    store.add(keys, **columns)
    reader = Reader(
        doc_uid=data.draw(st.sampled_from([None, torch.from_numpy(rng.integers(-1, 4, 5))])),
        cluster=data.draw(st.sampled_from([None, torch.from_numpy(rng.integers(-1, 4, 5))])),
        generation=data.draw(st.sampled_from([None, 0, 1, 2, 3])),
        splits=tuple(data.draw(st.sets(st.sampled_from(SPLITS)))),
        session=data.draw(st.sampled_from([0, 5])),
    )
    k = data.draw(st.integers(0, 5))
    rows = [{name: column[i] for name, column in columns.items()} | {"key": keys[i]} for i in range(count)]
    hits = store.search(torch.from_numpy(queries), k, reader)
    found = [[i for i in row if i >= 0] for row in hits.ids.tolist()]
    assert found == expected_hits(queries, rows, reader, k)
    assert torch.equal(hits.valid, hits.ids >= 0)
    assert torch.equal(hits.valid, hits.values.norm(dim=-1) > 0)
    # Valid ones come first.
    assert (hits.valid.int().diff(dim=1) <= 0).all()


class Shelf:
    """What a store must be, as a list of records: the oldest first, the oldest dropped, every one asked."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.generation, self.serial = capacity, 0, 0
        self.records: list[dict] = []

    def add(self, count: int, **columns: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys (count, d) and numbers (count,) of new records."""
        numbers = np.arange(self.serial, self.serial + count)
        keys = np.concatenate([unit(1, 6, seed=1000 + number) for number in numbers.tolist()])
        for number, key in zip(numbers.tolist(), keys, strict=True):
            self.records.append({"number": number, "key": key, "generation": self.generation, **columns})
        self.records = self.records[-self.capacity :]
        self.serial += count
        return keys, numbers

    def numbers(self, queries: np.ndarray, k: int, reader: Reader) -> list[list[int]]:
        hits = expected_hits(queries, self.records, reader, k)
        return [[self.records[i]["number"] for i in row] for row in hits]


sessions = st.sampled_from([0, 0, 5, 6])
numbers = st.integers(-1, 2)
asked = st.sampled_from([None, *range(3)])
store_programs = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 6), numbers, numbers, st.sampled_from(SPLITS), sessions),
        st.tuples(st.just("publish")),
        st.tuples(st.just("forget"), sessions),
        st.tuples(
            st.just("read"),
            asked,
            asked,
            st.booleans(),
            st.sets(st.sampled_from(SPLITS), min_size=2),
            sessions,
        ),
    ),
    min_size=4,
    max_size=16,
)


@pytest.mark.parametrize("backend", EXACT)
@settings(max_examples=60)
@given(program=store_programs, capacity=st.sampled_from([5, 12, 100]))
def test_any_program_of_writing_publishing_forgetting_and_reading_equals_a_list(backend, program, capacity):
    """Numbers of the records found, in order; scores are fp32, random keys in 6 dimensions do not tie."""
    store = VectorStore(6, backend=backend, capacity=capacity, near_duplicate=None)
    shelf, queries = Shelf(capacity), unit(3, 6, seed=7)
    last = [
        ("read", None, None, published, set(SPLITS), session)
        for published, session in ((False, 5), (True, 0))
    ]
    for action, *given_ in [*program, *last]:
        if action == "add":
            count, uid, cluster, split, session = given_
            columns = {"doc_uid": uid, "cluster": cluster, "session": session}
            keys, serial = shelf.add(count, split=SPLITS.index(split), **columns)
            store.add(keys, chunk=serial, split=split, **columns)
        elif action == "publish":
            shelf.generation += 1
            assert store.publish() == shelf.generation
        elif action == "forget":
            store.reset(session=given_[0])
            shelf.records = [r for r in shelf.records if r["session"] != given_[0]]
        else:
            uid, cluster, published, splits, session = given_
            reader = Reader(
                doc_uid=None if uid is None else torch.tensor([uid, -1, 0]),
                cluster=None if cluster is None else torch.tensor([-1, cluster, 0]),
                generation=shelf.generation if published else None,
                splits=tuple(sorted(splits)),
                session=session,
            )
            hits = store.search(torch.from_numpy(queries), 3, reader)
            found = store.lookup(hits.ids)["chunk"]
            shown = [row[valid].tolist() for row, valid in zip(found, hits.valid.numpy(), strict=True)]
            assert shown == shelf.numbers(queries, 3, reader)
        assert len(store) == len(shelf.records)
        for session in (0, 5, 6):
            assert store.count(session) == sum(r["session"] == session for r in shelf.records)


def test_candidates_grow_until_k_are_visible(monkeypatch):
    monkeypatch.setattr(vector_store, "_MAX_CANDIDATES", 50)
    store = VectorStore(16, near_duplicate=None)
    near = unit(1, 16) + 0.01 * unit(300, 16, 1)
    store.add(near, doc_uid=9)
    far = store.add(-near[:2], doc_uid=8)
    queries = torch.from_numpy(unit(1, 16)).repeat(7, 1)
    hits = store.search(queries, 2, Reader(doc_uid=torch.full((7,), 9)))
    assert hits.valid.all()
    assert set(hits.ids.flatten().tolist()) == set(far)


def test_unpublished_generation_is_invisible():
    store = VectorStore(8)
    store.add(unit(1, 8))
    reader = Reader(generation=store.publish())
    store.add(unit(1, 8, 1))
    query = torch.from_numpy(unit(1, 8, 1))
    assert store.search(query, 2, reader).ids.tolist() == [[0, -1]]
    assert store.search(query, 2, Reader()).ids.tolist() == [[1, 0]]


def test_duplicates_across_documents_stay_and_within_one_go():
    key, other = unit(1, 8), unit(1, 8, 1)
    store = VectorStore(8)
    ids = store.add(np.concatenate((key, key, other)), doc_uid=np.array([1, 1, 1]))
    assert ids.tolist() == [0, -1, 1]
    assert store.add(key, doc_uid=1).tolist() == [-1]
    assert store.add(key, doc_uid=2).tolist() == [2]
    assert store.add(np.concatenate((key, key))).tolist() == [3, 4]
    hits = store.search(torch.from_numpy(key), 4, Reader())
    assert sorted(hits.ids[0].tolist()) == [0, 2, 3, 4]
    torch.testing.assert_close(hits.scores, torch.ones(1, 4))


@pytest.mark.parametrize("backend", [*EXACT, "ivf"])
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_fifo_keeps_the_newest(backend, batch):
    store, keys = VectorStore(8, capacity=7, backend=backend), unit(40, 8)
    ids = np.concatenate([store.add(part, chunk=0) for part in np.split(keys, range(batch, 40, batch))])
    assert ids.tolist() == list(range(40))
    assert len(store) == 7
    hits = store.search(torch.from_numpy(keys), 1, Reader())
    assert hits.ids[33:, 0].tolist() == list(range(33, 40))
    torch.testing.assert_close(hits.scores[33:, 0], torch.ones(7))
    assert (hits.scores[:33] < 0.999).all()
    assert store.lookup(np.arange(33, 40))["doc_uid"].shape == (7,)
    with pytest.raises(ValueError, match="left the store"):
        store.lookup(np.array([32]))


def stored_chunks(store: VectorStore) -> np.ndarray:
    hits = store.search(torch.ones(1, store.d_model), len(store), Reader())
    return store.lookup(hits.ids[0])["chunk"]


def test_reservoir_is_a_uniform_sample():
    kept = np.zeros(40)
    for trial in range(300):
        store = VectorStore(4, capacity=8, policy="reservoir", backend="torch")
        order = np.random.default_rng(trial).permutation(40)
        for part in np.split(order, (3, 12, 30)):
            store.add(unit(40, 4)[part], chunk=part)
        assert len(store) == 8
        kept[stored_chunks(store)] += 1
    # 300 trials, each item kept with probability 1/5: 60 +- 6.9.
    assert np.abs(kept - 60).max() < 4.5 * 6.9


def test_reservoir_keeps_late_as_often_as_early_records():
    late = 0
    for trial in range(200):
        store = VectorStore(4, capacity=50, policy="reservoir", backend="torch")
        store.add(unit(60 + trial, 4), chunk=np.arange(60 + trial))
        late += (stored_chunks(store) >= 50).sum() - 50 * (10 + trial) / (60 + trial)
    assert abs(late / 200) < 1


def test_lru_drops_what_was_used_longest_ago():
    store, keys = VectorStore(8, capacity=3, policy="lru"), unit(4, 8)
    for row in range(3):
        store.add(keys[row : row + 1])
    store.search(torch.from_numpy(keys[:1]), 1, Reader())
    assert store.add(keys[3:]).tolist() == [1 + 3]
    assert sorted(store.search(torch.from_numpy(keys[:1]), 3, Reader()).ids[0].tolist()) == [0, 2, 4]


def test_sessions_are_isolated_and_can_be_forgotten():
    mine, yours = session_id("mine"), session_id("yours")
    assert 0 < mine != yours > 0
    store, keys = VectorStore(8), unit(6, 8)
    store.add(keys[:2], chunk=0)
    store.add(keys[2:4], session=mine, split="test", chunk=1)
    store.add(keys[4:], session=yours, chunk=2)
    queries = torch.from_numpy(keys)

    def seen(session: int) -> set[int]:
        return set(store.search(queries, 6, Reader(session=session)).ids.flatten().tolist()) - {-1}

    assert seen(0) == {0, 1}
    assert seen(mine) == {0, 1, 2, 3}
    assert seen(yours) == {0, 1, 4, 5}
    store.reset(session=mine)
    assert len(store) == 4
    assert seen(mine) == {0, 1}
    assert store.lookup(torch.tensor(sorted(seen(yours))))["chunk"].tolist() == [0, 0, 2, 2]
    hits = store.search(queries[4:], 1, Reader(session=yours))
    torch.testing.assert_close(hits.values[:, 0], queries[4:])
    store.reset(session=0)
    store.reset(session=yours)
    assert len(store) == 0


def test_forgetting_in_a_full_ring_keeps_the_order_of_age():
    store, keys = VectorStore(8, capacity=5), unit(12, 8)
    for row in range(8):
        store.add(keys[row : row + 1], chunk=row, session=4 if row == 5 else 0)
    store.reset(session=4)
    store.add(keys[8:11], chunk=np.arange(8, 11))
    assert sorted(stored_chunks(store)) == [6, 7, 8, 9, 10]


def test_search_changes_nothing(tmp_path):
    store = VectorStore(8)
    store.add(unit(20, 8))
    store.save(tmp_path / "before")
    store.search(torch.from_numpy(unit(5, 8, 1)), 4, Reader())
    store.save(tmp_path / "after")
    hashes = [generations.current_generation(tmp_path / name)[1]["files"] for name in ("before", "after")]
    assert hashes[0] == hashes[1]
