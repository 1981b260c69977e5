"""Indexes against brute force, on the CPU and with a simulated GPU."""

from __future__ import annotations

import types
import warnings

import faiss
import numpy as np
import pytest
import torch

from nano_think import vector_index
from nano_think.vector_index import FlatIndex, IVFIndex, TorchIndex, make_index

EXACT = ("faiss", "torch")


def unit(count: int, d_model: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, d_model)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(queries: np.ndarray, keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.astype(np.float64) @ keys.astype(np.float64).T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, ids, 1), ids


@pytest.fixture(autouse=True)
def forget_warnings():
    vector_index.warn_once.cache_clear()


@pytest.mark.parametrize("index", [FlatIndex(32), TorchIndex(32, block=700), IVFIndex(32)])
def test_thousand_queries_agree_with_brute_force(index):
    keys, queries = unit(5000, 32), unit(1000, 32, seed=1)
    for part in np.array_split(keys, 7):
        index.add(part)
    scores, ids = index.search(queries, 4)
    true_scores, true_ids = brute_force(queries, keys, 4)
    np.testing.assert_array_equal(ids, true_ids)
    # The largest deviation from exact cosines that we claim.
    assert np.abs(scores - true_scores).max() < 1e-6


@pytest.mark.parametrize("backend", [*EXACT, "ivf"])
def test_more_neighbours_than_vectors(backend):
    index = make_index(backend, 8)
    assert index.search(unit(2, 8), 3)[1].tolist() == [[-1] * 3] * 2
    index.add(unit(2, 8))
    scores, ids = index.search(unit(2, 8), 5)
    assert ids[:, 0].tolist() == [0, 1]
    assert (np.sort(ids[:, :2], 1) == [0, 1]).all()
    assert (ids[:, 2:] == -1).all()
    assert np.isneginf(scores[:, 2:]).all()
    assert index.search(unit(2, 8), 0)[1].shape == (2, 0)
    assert index.search(unit(2, 8)[:0], 3)[1].shape == (0, 3)
    index.reset()
    assert len(index) == 0


@pytest.mark.parametrize("backend", EXACT)
def test_replace_changes_only_its_slots(backend):
    index, new = make_index(backend, 8), unit(2, 8, seed=5)
    index.add(unit(6, 8))
    index.replace(np.array([4, 1]), new)
    expected = unit(6, 8)
    expected[[4, 1]] = new
    np.testing.assert_array_equal(index.vectors(), expected)
    assert index.search(new, 1)[1].tolist() == [[4], [1]]


@pytest.mark.parametrize("backend", EXACT)
def test_bad_vectors_are_refused(backend):
    index = make_index(backend, 4)
    for bad in (np.full((1, 4), np.nan), np.zeros((1, 4)), np.ones((1, 5)), np.ones(4)):
        with pytest.raises(ValueError):
            index.add(bad)
    with pytest.raises(ValueError):
        index.search(np.ones((1, 5)), 1)
    assert len(index) == 0


def test_torch_search_ignores_autocast():
    index, keys = TorchIndex(64), unit(500, 64)
    index.add(keys)
    expected = index.search(keys[:50], 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = index.search(keys[:50], 4)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.fixture(scope="module")
def clustered_ivf() -> tuple[IVFIndex, np.ndarray]:
    rng = np.random.default_rng(0)
    keys = unit(200, 16)[rng.integers(0, 200, 30_000)] + 0.2 * rng.standard_normal((30_000, 16))
    keys = (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float32)
    index = IVFIndex(16)
    index.add(keys)
    return index, keys


def test_ivf_trains_on_the_store_and_reaches_its_recall(clustered_ivf):
    index, keys = clustered_ivf
    assert index.settings()["trained_on"] == 0
    queries = keys[::100] + 0.01
    _, ids = index.search(queries, 10)
    report = index.settings()
    assert report["trained_on"] == 30_000
    assert report["nlist"] == int(4 * 30_000**0.5)
    assert report["nprobe"] < report["nlist"] / 2
    assert report["recall@10"] >= 0.95
    _, truth = brute_force(queries, keys, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids, truth, strict=True)])
    assert recall >= 0.93


def test_ivf_answers_in_full_and_follows_changes(clustered_ivf, tmp_path):
    index, keys = clustered_ivf
    _, ids = index.search(keys[:2], 3000)
    assert (ids >= 0).all()
    new = unit(1, 16, seed=77)
    index.add(new)
    index.replace(np.array([17]), -new)
    assert index.search(np.concatenate((new, -new)), 1)[1].tolist() == [[30_000], [17]]
    index.save(tmp_path)
    other = IVFIndex(16)
    other.restore(tmp_path, len(index))
    for mine, theirs in zip(index.search(keys[:300], 5), other.search(keys[:300], 5), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert other.settings() == index.settings()


def test_small_ivf_is_exact():
    index = IVFIndex(8)
    index.add(unit(500, 8))
    np.testing.assert_array_equal(
        index.search(unit(20, 8, 1), 5)[1], brute_force(unit(20, 8, 1), unit(500, 8), 5)[1]
    )
    assert index.settings()["trained_on"] == 0


def fake_gpu_faiss(moves: list[str]) -> types.SimpleNamespace:
    """FAISS with the GPU functions of a GPU build, which here leave the index where it is."""
    names = {name: getattr(faiss, name) for name in ("IndexFlatIP", "rev_swig_ptr", "omp_set_num_threads")}
    return types.SimpleNamespace(
        **names,
        StandardGpuResources=object,
        get_num_gpus=lambda: 1,
        index_cpu_to_gpu=lambda resources, device, index: (moves.append("to gpu"), index)[1],
        index_gpu_to_cpu=lambda index: (moves.append("to cpu"), index)[1],
    )


@pytest.mark.parametrize(("gpu", "expected"), [(None, True), (True, True), (False, False)])
def test_gpu_index_is_used_where_there_is_one(monkeypatch, gpu, expected):
    moves: list[str] = []
    monkeypatch.setattr(vector_index, "import_faiss", lambda: fake_gpu_faiss(moves))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = make_index("faiss", 8, gpu=gpu)
    assert bool(moves) == expected
    assert index.settings()["gpu"] == expected
    index.add(unit(3000, 8))
    index.replace(np.array([5]), unit(1, 8, seed=9))
    keys = unit(3000, 8)
    keys[5] = unit(1, 8, seed=9)
    np.testing.assert_array_equal(index.vectors(), keys)
    np.testing.assert_array_equal(index.search(keys[:9], 4)[1], brute_force(keys[:9], keys, 4)[1])
    # More neighbours than a GPU index selects.
    assert (index.search(keys[:2], 2500)[1] >= 0).all()


def asked_for_twice(backend: str, gpu: bool | None, match: str) -> list[type]:
    with pytest.warns(UserWarning, match=match) as caught:
        kinds = [type(make_index(backend, 8, gpu=gpu)) for _ in range(2)]
    assert len(caught) == 1
    return kinds


def test_missing_gpu_and_missing_faiss_warn_once(monkeypatch):
    for backend in EXACT:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_index(backend, 8)
    assert asked_for_twice("faiss", gpu=True, match="GPU") == [FlatIndex, FlatIndex]

    def missing():
        raise ImportError("faiss")

    monkeypatch.setattr(vector_index, "import_faiss", missing)
    assert asked_for_twice("ivf", gpu=None, match="faiss is not installed") == [TorchIndex, TorchIndex]


def test_many_queries_take_the_product_and_few_the_scan_with_the_same_ids(monkeypatch):
    keys = unit(4000, 32)
    keys[1000:1500] = keys[2000:2500]  # copies
    index = FlatIndex(32)
    index.add(keys[:3000])
    index.add(keys[3000:])
    index.replace(np.arange(10, 20), 3 * keys[20:30])
    keys[10:20] = 3 * keys[20:30]
    asked = []
    plain = vector_index.exact_top_k
    monkeypatch.setattr(
        vector_index, "exact_top_k", lambda *args: asked.append(args[-1]) or plain(*args), raising=True
    )
    queries = keys[:2200:10]
    scores, ids = index.search(queries, 5)
    assert asked == [pytest.approx(3, rel=1e-5)]
    true_scores, true_ids = brute_force(queries, keys, 5)
    np.testing.assert_array_equal(ids, true_ids)
    np.testing.assert_allclose(scores, true_scores, atol=3e-6)
    few = [index.search(query[None], 5) for query in queries[:40]]
    index.search(queries, 100)  # more than a few percent of the store
    assert len(asked) == 1
    np.testing.assert_allclose(np.concatenate([s for s, _ in few]), scores[:40], atol=3e-6)
