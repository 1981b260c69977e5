"""Retrieval memory: (key, value) records with metadata, visibility rules, a bounded size and atomic files.

A record is a chunk of text: the key says what the chunk is about (a unit vector, compared by cosine), the
value is what the model gets to read, the metadata says who may read it. Reading never changes the store,
except that the "lru" policy notes what was used; writing is always an explicit call. One process writes; any
number read the generation that CURRENT names.

Letters: Q queries, k neighbours, d width, m tokens of a chunk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nano_think.errors import UserError, brief
from nano_think.generations import current_generation, new_generation
from nano_think.vector_index import VectorIndex, checked_vectors, make_index
from nano_think.vector_records import (
    COLUMNS,
    Hits,
    Reader,
    as_numpy,
    check_manifest,
    metadata_columns,
    read_columns,
)

_FORMAT = 1
_OVERFETCH = 4
_MAX_CANDIDATES = 1 << 22  # candidates looked at together, which bounds the memory of a search
_WRITE_BLOCK = 1024


class VectorStore:
    """Bounded memory of records. Sessions share its capacity with the corpus.

    The logical id of a record is slot + wrap * capacity; wrap counts how often the slot was overwritten.

    Args:
        capacity: most records held.
        backend: "faiss" or "torch" (exact), "ivf" (approximate, for more than about a million records).
        policy: what a full store does: "fifo" overwrites the oldest record, "reservoir" keeps a uniform
            sample of everything written, "lru" overwrites the record whose last use lies farthest back.
        chunk: tokens kept of every record, m.
        value_dtype: "float32", or "float16" for half the memory.
        near_duplicate: a key with a larger cosine than this to a record of the same document is skipped;
            None keeps all. Records without a document are never skipped.
        fingerprint: of the encoder that makes the keys; `load` compares it.
        gpu: see `make_index`.

    Raises:
        ValueError: an unknown backend, policy or value_dtype, or a capacity below 1.
    """

    def __init__(
        self,
        d_model: int,
        *,
        capacity: int = 1_000_000,
        backend: str = "faiss",
        policy: str = "fifo",
        chunk: int = 64,
        value_dtype: str = "float32",
        near_duplicate: float | None = 0.98,
        fingerprint: str = "",
        gpu: bool | None = None,
    ) -> None:
        if policy not in ("fifo", "reservoir", "lru"):
            raise ValueError(f"unknown store policy {policy!r}: choose fifo, reservoir or lru")
        if value_dtype not in ("float16", "float32"):
            raise ValueError(f"unknown value_dtype {value_dtype!r}: choose float16 or float32")
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.d_model, self.capacity, self.policy, self.chunk = d_model, capacity, policy, chunk
        self.backend, self.value_dtype, self.near_duplicate = backend, value_dtype, near_duplicate
        self.fingerprint, self.generation = fingerprint, 0
        self._index: VectorIndex = make_index(backend, d_model, gpu=gpu)
        self.reset()

    def __len__(self) -> int:
        return self._size

    def count(self, session: int) -> int:
        """Records of one session, 0 being the shared corpus."""
        return int((self._data["session"][: self._size] == session).sum())

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Metadata (n,) and tokens (n, m) of all records as they lie in the store: copies, for analysis."""
        return {name: self._data[name][: self._size].copy() for name in (*COLUMNS, "tokens")}

    def settings(self) -> dict[str, Any]:
        """What the index reports about itself: backend, and for "ivf" nlist, nprobe and measured recall."""
        return self._index.settings()

    def publish(self) -> int:
        """Begin the next generation and return its number: `Reader(generation=that)` sees all until now."""
        self.generation += 1
        return self.generation

    # Writing

    def add(
        self, keys: Tensor | np.ndarray, values: Tensor | np.ndarray | None = None, **meta: Any
    ) -> np.ndarray:
        """Append records and return their logical ids (n,), -1 for those the policy or a duplicate left out.

        `add(vectors)` alone stores the normalised vectors as keys and values, as a plain vector store does.

        Args:
            keys: (n, d), normalised here.
            values: (n, d), kept as they are.
            meta: doc_uid, cluster, chunk, domain, split, generation, token_offset, session (numbers or (n,);
                `split` also a name), tokens (n, up to m), short ones padded with -1.

        Raises:
            ValueError: wrong width, NaN, a zero key, unknown metadata, or values too large for float16.
        """
        unit = checked_vectors(as_numpy(keys), self.d_model)
        unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
        with np.errstate(over="ignore"):
            kept = (unit if values is None else as_numpy(values)).astype(self.value_dtype)
        if kept.shape != unit.shape or not np.isfinite(kept).all():
            raise ValueError(f"values must be finite in {self.value_dtype} and of shape {unit.shape}")
        meta = {"generation": self.generation} | {name: v for name, v in meta.items() if v is not None}
        columns = metadata_columns(len(unit), self.chunk, meta) | {"values": kept}
        ids = np.full(len(unit), -1, np.int64)
        step = min(_WRITE_BLOCK, self.capacity)
        for start in range(0, len(unit), step):
            part = slice(start, start + step)
            ids[part] = self._write(unit[part], {name: column[part] for name, column in columns.items()})
        return ids

    def reset(self, session: int | None = None) -> None:
        """Forget everything, or one session without a trace; logical ids then count anew."""
        if session is None:
            self._index.reset()
            self._data = {name: np.empty(0, dtype) for name, (dtype, _) in COLUMNS.items()}
            self._data |= {"wrap": np.empty(0, np.int64), "used": np.empty(0, np.int64)}
            self._data["tokens"] = np.empty((0, self.chunk), np.int32)
            self._data["values"] = np.empty((0, self.d_model), self.value_dtype)
            self._size = self._written = self._clock = 0
            return
        oldest = self._written % self.capacity if self._size == self.capacity else 0
        order = np.roll(np.arange(self._size), -oldest)
        order = order[self._data["session"][order] != session]
        keys = self._index.vectors()[order]
        self._data = {name: column[order] for name, column in self._data.items()}
        self._data["wrap"][:] = 0
        self._size = self._written = len(order)
        self._index.reset()
        if len(keys):
            self._index.add(keys)

    def _write(self, keys: np.ndarray, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Place at most `capacity` records and return their logical ids."""
        ids = np.full(len(keys), -1, np.int64)
        fresh = np.flatnonzero(~self._repeated(keys, columns["doc_uid"]))
        slots = self._choose_slots(len(fresh))
        # Of records that drew the same slot the last one stays; new slots come in rising order.
        slots, last = np.unique(slots[::-1], return_index=True)
        rows = fresh[::-1][last][slots >= 0]
        slots = slots[slots >= 0]
        old = slots < self._size
        if old.any():
            self._index.replace(slots[old], keys[rows[old]])
        if not old.all():
            self._index.add(keys[rows[~old]])
        self._grow(self._size + int((~old).sum()))
        self._data["wrap"][slots] = np.where(old, self._data["wrap"][slots] + 1, 0)
        self._clock += 1
        self._data["used"][slots] = self._clock
        for name, column in columns.items():
            self._data[name][slots] = column[rows]
        ids[rows] = slots + self._data["wrap"][slots] * self.capacity
        return ids

    def _repeated(self, keys: np.ndarray, doc_uid: np.ndarray) -> np.ndarray:
        """(n,) bool: the key nearly equals an earlier one of the same document, stored or in this batch."""
        if self.near_duplicate is None or (doc_uid < 0).all():
            return np.zeros(len(keys), bool)
        same = (doc_uid[:, None] == doc_uid) & (doc_uid >= 0)
        repeated = np.tril(same & (keys @ keys.T > self.near_duplicate), -1).any(axis=1)
        stored = np.flatnonzero(np.isin(self._data["doc_uid"][: self._size], doc_uid[doc_uid >= 0]))
        if len(stored):
            same = doc_uid[:, None] == self._data["doc_uid"][stored]
            close = keys @ self._index.vectors()[stored].T > self.near_duplicate
            repeated |= (same & close).any(axis=1)
        return repeated

    def _choose_slots(self, count: int) -> np.ndarray:
        """Slots (count,) for new records: free ones, then those the policy gives up; -1 is "not kept"."""
        free = min(count, self.capacity - self._size)
        rest, order = count - free, self._written + np.arange(free, count)
        if self.policy == "fifo":
            given_up = order % self.capacity
        elif self.policy == "lru":
            given_up = np.argsort(self._data["used"][: self._size], kind="stable")[:rest]
        else:
            # Algorithm R (Vitter 1985); seeded by the count written, so a loaded store goes on the same way.
            drawn = np.random.default_rng(self._written).integers(0, order + 1)
            given_up = np.where(drawn < self.capacity, drawn, -1)
        self._written += count
        return np.concatenate((self._size + np.arange(free), given_up))

    def _grow(self, size: int) -> None:
        room = len(self._data["doc_uid"])
        if size > room:
            room = min(self.capacity, max(size, 2 * room))
            for name, column in self._data.items():
                self._data[name] = np.zeros((room, *column.shape[1:]), column.dtype)
                self._data[name][: self._size] = column[: self._size]
        self._size = size

    # Reading

    def search(self, queries: Tensor | np.ndarray, k: int, reader: Reader) -> Hits:
        """The k nearest records that `reader` may see, for queries (Q, d) of any length but zero.

        Looks at 4k candidates, and at more, up to the whole store, for queries that may see too few of them.
        A query of zeros has no neighbours.

        Raises:
            ValueError: wrong width, NaN in a query, k < 0, or reader ids that are not (Q,).
        """
        asked = as_numpy(queries).astype(np.float32)
        if asked.ndim != 2 or asked.shape[1] != self.d_model or not np.isfinite(asked).all() or k < 0:
            raise ValueError(f"need finite queries (Q, {self.d_model}) and k >= 0, got {asked.shape}, k={k}")
        norms = np.linalg.norm(asked, axis=1, keepdims=True)
        asked /= np.where(norms > 0, norms, 1)
        count = len(asked)
        own = reader.own(count)
        slots, scores = np.full((count, k), -1, np.int64), np.zeros((count, k), np.float32)
        readable = reader.readable({name: self._data[name][: self._size] for name in COLUMNS})
        pending = np.flatnonzero(norms) if k and readable.any() else np.empty(0, np.int64)
        fetch = min(self._size, _OVERFETCH * k)
        while len(pending):
            unmet = []
            for rows in np.array_split(pending, -(-len(pending) * fetch // _MAX_CANDIDATES)):
                mine = {name: column[rows] for name, column in own.items()}
                scores[rows], slots[rows] = self._visible(asked[rows], fetch, k, readable, mine)
                unmet.append(rows[(slots[rows] < 0).any(axis=1)])
            pending = np.concatenate(unmet) if fetch < self._size else np.empty(0, np.int64)
            fetch = min(self._size, _OVERFETCH * fetch)
        return self._hits(slots, scores, queries.device if isinstance(queries, Tensor) else None)

    def draw(self, count: int, k: int, reader: Reader, seed: int = 0) -> Hits:
        """k different records drawn at random of all that `reader` may see, for each of `count` queries.

        What a memory is worth beside the same amount of any text; scores are 0. Raises ValueError as `search`.
        """
        own = reader.own(count)
        generator = np.random.default_rng(seed)
        readable = reader.readable({name: self._data[name][: self._size] for name in COLUMNS})
        slots = np.full((count, k), -1, np.int64)
        for row in range(count):
            visible = readable.copy()
            for name, mine in own.items():
                if mine[row] >= 0:
                    visible &= self._data[name][: self._size] != mine[row]
            candidates = np.flatnonzero(visible)
            some = generator.choice(len(candidates), min(k, len(candidates)), replace=False)
            slots[row, : len(some)] = candidates[some]
        return self._hits(slots, np.zeros((count, k), np.float32), None)

    def nearest(self, query: Tensor, k: int) -> Tensor:
        """Stored values nearest to `query` (d,) or (Q, d), as (k', d) or (Q, k', d), k' = min(k, records).

        The plain call of a vector store: the shared expert_train records, no document excluded.
        """
        hits = self.search(query.reshape(-1, self.d_model), k, Reader())
        found = hits.values[:, : int(hits.valid.sum(1).max()) if len(hits.valid) else 0]
        return found[0] if query.dim() == 1 else found

    def lookup(self, ids: Tensor | np.ndarray) -> dict[str, np.ndarray]:
        """Metadata and tokens of logical ids of any shape; all columns are -1 where the id is -1.

        Raises:
            ValueError: a record that has been overwritten or never existed.
        """
        ids = as_numpy(ids)
        slots, none = ids % self.capacity, ids < 0
        known = none | (slots < self._size)
        wrap = self._data["wrap"][np.where(none | ~known, 0, slots)] if self._size else 0
        if not (known & (none | (wrap * self.capacity + slots == ids))).all():
            raise ValueError("a record asked for has left the store: look hits up before writing again")
        found = {}
        for name in (*COLUMNS, "tokens"):
            column = self._data[name]
            found[name] = np.full(ids.shape + column.shape[1:], -1, column.dtype)
            found[name][~none] = column[slots[~none]]
        return found

    def _visible(
        self, asked: np.ndarray, fetch: int, k: int, readable: np.ndarray, own: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and slots (Q, k) of the first k of `fetch` candidates that pass the visibility rule."""
        scores, slots = self._index.search(asked, fetch)
        visible = (slots >= 0) & readable[slots]
        for name, mine in own.items():
            visible &= (mine[:, None] < 0) | (self._data[name][slots] != mine[:, None])
        order = np.argsort(~visible, axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(visible, order, 1)
        missing = ((0, 0), (0, k - kept.shape[1]))
        scores = np.where(kept, np.take_along_axis(scores, order, 1), 0)
        slots = np.where(kept, np.take_along_axis(slots, order, 1), -1)
        return np.pad(scores, missing), np.pad(slots, missing, constant_values=-1)

    def _hits(self, slots: np.ndarray, scores: np.ndarray, device: torch.device | None) -> Hits:
        valid = slots >= 0
        values = np.zeros((*slots.shape, self.d_model), np.float32)
        ids = np.full(slots.shape, -1, np.int64)
        found = slots[valid]
        values[valid] = self._data["values"][found]
        ids[valid] = found + self._data["wrap"][found] * self.capacity
        if self.policy == "lru":
            self._clock += 1
            self._data["used"][found] = self._clock
        return Hits(*(torch.from_numpy(array).to(device) for array in (values, scores, ids, valid)))

    # Files

    def save(self, directory: str | Path) -> None:
        """Write everything as the new generation of `directory` (see `generations.py`)."""
        names = ("d_model", "capacity", "policy", "chunk", "value_dtype", "near_duplicate", "backend")
        manifest = {name: getattr(self, name) for name in (*names, "fingerprint", "generation")}
        manifest |= {
            "format": _FORMAT,
            "metric": "inner_product",
            "count": self._size,
            "written": self._written,
        }
        manifest |= {"clock": self._clock, "index": self.settings()}
        data: dict[str, Any] = {name: column[: self._size] for name, column in self._data.items()}
        with new_generation(directory, manifest) as folder:
            self._index.save(folder)
            np.save(folder / "values.npy", data.pop("values"))
            np.savez(folder / "meta.npz", **data)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        fingerprint: str | None = None,
        d_model: int | None = None,
        backend: str | None = None,
        gpu: bool | None = None,
    ) -> VectorStore:
        """The store that CURRENT names; `backend` replaces the saved one.

        Raises:
            UserError: no store, a damaged one, or one made with another encoder (`fingerprint`) or width.
        """
        folder, manifest = current_generation(directory)
        if manifest.get("format") != _FORMAT:
            raise UserError(f"{directory} is not a vector store of format {_FORMAT}: build it again")
        try:
            check_manifest(manifest)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder}/manifest.json is damaged ({brief(error)}): build the store again"
            ) from error
        if d_model is not None and manifest["d_model"] != d_model:
            raise UserError(
                f"the store in {directory} has width {manifest['d_model']}, the model {d_model}: "
                "build the store again with this model"
            )
        if fingerprint is not None and manifest["fingerprint"] != fingerprint:
            raise UserError(
                f"the store in {directory} was written with another chunk encoder: "
                "build it again with this one, or load the checkpoint it was built with"
            )
        names = ("capacity", "policy", "chunk", "value_dtype", "near_duplicate", "fingerprint")
        settings = {name: manifest[name] for name in names}
        try:
            store = cls(manifest["d_model"], backend=backend or manifest["backend"], gpu=gpu, **settings)
            store._data = read_columns(folder, manifest)
            store._index.restore(folder, manifest["count"])
        except (OSError, ValueError) as error:
            raise UserError(
                f"the store in {folder} cannot be read ({brief(error)}): build it again"
            ) from error
        store._size, store._written = manifest["count"], manifest["written"]
        store._clock, store.generation = manifest["clock"], manifest["generation"]
        return store
