"""Files of the vector store against kills, damage and other models."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nano_think import files, generations
from nano_think.errors import UserError
from nano_think.vector_records import Reader
from nano_think.vector_store import VectorStore

EXACT = ("faiss", "torch")


def unit(count: int, d_model: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, d_model)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(backend: str = "torch", count: int = 30) -> VectorStore:
    store = VectorStore(8, capacity=25, backend=backend, chunk=4, fingerprint="abc", value_dtype="float16")
    tokens = np.arange(count * 4).reshape(count, 4)
    store.add(unit(count, 8), 3 * unit(count, 8, 1), doc_uid=np.arange(count), session=2, tokens=tokens)
    return store


@pytest.mark.parametrize("other", [None, "torch", "faiss"])
@pytest.mark.parametrize("backend", EXACT)
def test_saved_and_loaded_store_answers_the_same(tmp_path, backend, other):
    store = filled(backend)
    store.publish()
    store.save(tmp_path)
    loaded = VectorStore.load(tmp_path, fingerprint="abc", d_model=8, backend=other)
    queries = torch.from_numpy(unit(9, 8, 3))
    reader = Reader(doc_uid=torch.arange(9) + 10, session=2)
    for mine, theirs in zip(
        vars(store.search(queries, 4, reader)).values(),
        vars(loaded.search(queries, 4, reader)).values(),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0 if other in (None, backend) else 1e-6)
    assert loaded.generation == 1
    for each in (store, loaded):
        assert each.add(unit(3, 8, 7)).tolist() == [30, 31, 32]
    assert np.array_equal(store._index.vectors(), loaded._index.vectors())
    lookups = [each.lookup(np.arange(8, 33)) for each in (store, loaded)]
    assert all(np.array_equal(lookups[0][name], lookups[1][name]) for name in lookups[0])


def test_empty_store_can_be_saved(tmp_path):
    VectorStore(8).save(tmp_path)
    assert len(VectorStore.load(tmp_path)) == 0


def test_only_the_last_two_generations_stay(tmp_path):
    for count in (3, 4, 5, 6):
        filled(count=count).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "CURRENT",
        "generation-000003",
        "generation-000004",
    ]
    assert len(VectorStore.load(tmp_path)) == 6
    (tmp_path / "CURRENT").write_text("generation-000003\n")
    assert len(VectorStore.load(tmp_path)) == 5


def test_wrong_or_damaged_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="build it first"):
        VectorStore.load(tmp_path / "nowhere")
    filled().save(tmp_path)
    with pytest.raises(UserError, match="another chunk encoder"):
        VectorStore.load(tmp_path, fingerprint="xyz")
    with pytest.raises(UserError, match="width 8"):
        VectorStore.load(tmp_path, d_model=9)
    folder = tmp_path / "generation-000001"
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == {
        "keys.npy",
        "values.npy",
        "meta.npz",
    }
    content = bytearray((folder / "values.npy").read_bytes())
    content[-1] ^= 1
    (folder / "values.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged \(values.npy\): build it again"):
        VectorStore.load(tmp_path)
    (folder / "values.npy").unlink()
    with pytest.raises(UserError, match="damaged"):
        VectorStore.load(tmp_path)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        VectorStore.load(tmp_path)


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test may run clean-up that counts on it."""


def save_growing(root: Path, done: list[int]) -> None:
    for count in (3, 4, 5):
        filled(count=count).save(root)
        done.append(count)


def test_kill_at_any_step_leaves_a_loadable_store(tmp_path, monkeypatch):
    steps: list[str] = []
    limit = [10**9]

    def dying(name, function):
        def call(*args, **kwargs):
            if len(steps) >= limit[0]:
                raise Killed
            steps.append(name)
            return function(*args, **kwargs)

        return call

    for module, name in (
        (os, "rename"),
        (os, "replace"),
        (os, "fsync"),
        (np, "save"),
        (np, "savez"),
        (shutil, "rmtree"),
    ):
        monkeypatch.setattr(module, name, dying(name, getattr(module, name)))
    # A killed process does not tidy up after itself either.
    monkeypatch.setattr(files.Path, "unlink", dying("unlink", files.Path.unlink))
    root = tmp_path / "count"
    save_growing(root, [])
    total = len(steps)
    assert steps.count("rename") == 4  # three generations, and the first one on its way out
    assert steps.count("replace") == 3
    seen = set()
    for limit[0] in range(total):
        root = tmp_path / str(limit[0])
        steps.clear()
        done: list[int] = []
        with pytest.raises(Killed):
            save_growing(root, done)
        limit[0], saved = 10**9, done[-1] if done else 0
        if saved or (root / "CURRENT").exists():
            size = len(VectorStore.load(root))
            assert size in (saved, saved + 1 if saved else 3)
            seen.add(size)
        filled(count=9).save(root)
        assert len(VectorStore.load(root)) == 9
        leftovers = [path.name for path in root.iterdir() if path.is_dir() and path.name.endswith(".tmp")]
        assert leftovers == []
        shutil.rmtree(root)
    assert seen == {3, 4, 5}


def test_generations_write_any_folder(tmp_path):
    with generations.new_generation(tmp_path, {"kind": "notes"}) as folder:
        (folder / "a.txt").write_text("a")
    folder, manifest = generations.current_generation(tmp_path)
    assert manifest["kind"] == "notes"
    assert (folder / "a.txt").read_text() == "a"
