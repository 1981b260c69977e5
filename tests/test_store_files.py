"""Files of a store that somebody changed together with their hashes: read as what they are, or refused."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from nano_think import generations
from nano_think.errors import UserError
from nano_think.vector_store import VectorStore


def filled(count: int) -> VectorStore:
    store = VectorStore(8, backend="torch", chunk=4, near_duplicate=None)
    keys = np.random.default_rng(0).standard_normal((count, 8))
    store.add(keys, tokens=np.arange(4 * count).reshape(count, 4), doc_uid=np.arange(count))
    return store


def _forged(root: Path, name: str, content: bytes) -> None:
    """Exchange a file of the newest generation, and the hash with it."""
    folder, manifest = generations.current_generation(root)
    (folder / name).write_bytes(content)
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _npz(**columns: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **columns)
    return buffer.getvalue()


def _packed(**columns: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **columns)
    return buffer.getvalue()


def _claiming(rows: int) -> bytes:
    """A file that says it holds so many rows."""
    array = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, 8)}
    np.lib.format.write_array_header_1_0(array, header)
    return array.getvalue() + bytes(64)


@pytest.mark.parametrize(
    ("name", "forge"),
    [
        ("values.npy", lambda v, c: _claiming(10**12)),
        ("keys.npy", lambda v, c: _claiming(10**12)),
        ("keys.npy", lambda v, c: _npy(np.zeros_like(v))),
        ("keys.npy", lambda v, c: _npy(v[:-1])),
        ("values.npy", lambda v, c: _npy(v * np.nan)),
        ("values.npy", lambda v, c: _npy(v.astype("float64"))),
        ("values.npy", lambda v, c: _npy(v.T)),
        ("values.npy", lambda v, c: b"\x93NUMPY\x01\x00v\x00__import__('os')"),
        ("values.npy", lambda v, c: pickle.dumps([1])),
        ("meta.npz", lambda v, c: _npz(**{**c, "split": c["split"] + 9})),
        ("meta.npz", lambda v, c: _npz(**{**c, "tokens": c["tokens"] - 9})),
        ("meta.npz", lambda v, c: _npz(**{**c, "wrap": c["wrap"] - 1})),
        ("meta.npz", lambda v, c: _npz(**{**c, "more": c["wrap"]})),
        ("meta.npz", lambda v, c: _npz(**{k: x for k, x in c.items() if k != "session"})),
        ("meta.npz", lambda v, c: _npz(**{**c, "session": np.array([None])})),
        ("meta.npz", lambda v, c: _packed(**c)),
        ("meta.npz", lambda v, c: b"PK\x03\x04"),
    ],
)
def test_files_with_the_right_hash_and_the_wrong_content_are_refused(tmp_path, name, forge) -> None:
    filled(count=5).save(tmp_path)
    folder, _ = generations.current_generation(tmp_path)
    with np.load(folder / "meta.npz") as found:
        columns = dict(found)
    content = forge(np.load(folder / "values.npy"), columns)
    _forged(tmp_path, name, content)
    with pytest.raises(UserError, match=r"cannot be read .*build it again"):
        VectorStore.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"count": -1},
        {"count": 10**9},
        {"count": True},
        {"d_model": 10**12},
        {"d_model": "8"},
        {"capacity": 1},
        {"chunk": 10**12},
        {"policy": None},
        {"policy": "newest"},
        {"backend": "os.system"},
        {"value_dtype": "object"},
        {"near_duplicate": "0.98"},
        {"clock": -1},
        {"written": 1},
    ],
    ids=str,
)
def test_a_manifest_that_no_store_has_is_refused(tmp_path, changes) -> None:
    filled(count=5).save(tmp_path)
    folder, manifest = generations.current_generation(tmp_path)
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    with pytest.raises(UserError, match=r"damaged|cannot be read"):
        VectorStore.load(tmp_path)


@pytest.mark.parametrize(
    "name", [b"../../etc", b"/etc", b"generation-1", b"\xff\xfe", b"", b"generation-000001/.."]
)
def test_current_names_a_generation_and_nothing_else(tmp_path, name) -> None:
    filled(count=5).save(tmp_path)
    (tmp_path / "CURRENT").write_bytes(name)
    with pytest.raises(UserError, match="CURRENT is damaged and names no generation"):
        VectorStore.load(tmp_path)


def test_a_file_that_nobody_listed_is_not_read(tmp_path) -> None:
    """Such as lists of FAISS, which its own reader would trust."""
    filled(count=5).save(tmp_path)
    folder, _ = generations.current_generation(tmp_path)
    (folder / "lists_settings.npy").write_bytes(_npy(np.ones(4)))
    with pytest.raises(UserError, match=r"is damaged \(lists_settings\.npy\): build it again"):
        VectorStore.load(tmp_path)
