"""Inner-product indexes behind one protocol: exact by FAISS, exact by torch, approximate by inverted lists.

All speak float32 NumPy arrays; the position of a vector is its id. FAISS is imported only when one of its
indexes is made. FAISS and torch each bring an OpenMP runtime, so the threads of FAISS follow torch's, and an
index belongs to the process that made it: never hand one to a forked DataLoader worker.

Letters: N stored vectors, Q queries, d width.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from nano_think.arrays import read_npy
from nano_think.ops.top_k import GROUP, exact_top_k

# The GPU indexes of FAISS select at most this many neighbours.
GPU_MAX_K = 2048
# From so many queries, and so many pairs of query and vector, one matrix product is faster than FAISS's scan of
# all vectors for each query (`python -m benchmarks search`).
PRODUCT_QUERIES, PRODUCT_PAIRS = 4, 1 << 16


class VectorIndex(Protocol):
    """What the store needs from an index; ids are positions 0 .. N - 1 in the order of adding."""

    d_model: int

    def add(self, vectors: np.ndarray) -> None:
        """Append vectors (n, d)."""

    def replace(self, slots: np.ndarray, vectors: np.ndarray) -> None:
        """Overwrite the vectors at different positions `slots` (n,) with vectors (n, d)."""

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (Q, k) float32, highest first, and ids (Q, k) int64; missing ones are -inf and -1."""

    def vectors(self) -> np.ndarray:
        """All vectors (N, d) float32; do not write to it."""

    def reset(self) -> None:
        """Forget everything."""

    def settings(self) -> dict[str, Any]:
        """Plain values for the report and the manifest."""

    def save(self, directory: Path) -> None:
        """Write keys.npy, and whatever else restores the same answers, into an existing directory."""

    def restore(self, directory: Path, count: int) -> None:
        """Take over what `save` wrote of `count` vectors; keys.npy of any other backend will do.

        Raises OSError or ValueError for files that are missing or hold anything else.
        """

    def __len__(self) -> int: ...


@functools.cache
def warn_once(message: str) -> None:
    """Warn about `message` the first time only."""
    warnings.warn(message, stacklevel=3)


def checked_vectors(vectors: np.ndarray, d_model: int) -> np.ndarray:
    """`vectors` (n, d) as contiguous float32.

    Raises:
        ValueError: another width, NaN or infinity, or a row of zeros (it has no direction to search by).
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != d_model:
        raise ValueError(f"expected vectors of shape (n, {d_model}), got {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise ValueError("a vector holds NaN or infinity: drop such rows before adding or searching")
    if not np.any(vectors, axis=1).all():
        raise ValueError("a vector is all zeros and has no direction: drop such rows before adding")
    return vectors


def _checked_query(queries: np.ndarray, k: int, d_model: int) -> np.ndarray:
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != d_model:
        raise ValueError(f"expected queries of shape (Q, {d_model}), got {queries.shape}")
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    return queries


def _padded(scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Widen to k columns and mark every missing entry the same way, whatever the backend used."""
    missing = ((0, 0), (0, k - ids.shape[1]))
    ids = np.pad(ids.astype(np.int64, copy=False), missing, constant_values=-1)
    scores = np.pad(scores, missing, constant_values=-np.inf)
    return np.where(ids < 0, np.float32(-np.inf), scores), ids


def _add_in_chunks(index: VectorIndex, directory: Path, count: int) -> None:
    index.reset()
    keys = read_npy(directory / "keys.npy", ("float32", (count, index.d_model)), mapped=True)
    for start in range(0, len(keys), 65_536):
        index.add(np.array(keys[start : start + 65_536]))


class TorchIndex:
    """Exact search by blocked matrix products: the oracle of the other indexes, and free of dependencies.

    Args:
        block: stored vectors scored at a time, which bounds the memory of a search to Q x block scores.
    """

    def __init__(self, d_model: int, *, device: torch.device | str = "cpu", block: int = 65_536) -> None:
        self.d_model, self.block, self._size = d_model, block, 0
        self._buffer = torch.empty(0, d_model, device=device)

    def __len__(self) -> int:
        return self._size

    def add(self, vectors: np.ndarray) -> None:
        """See `VectorIndex.add`; raises ValueError as `checked_vectors` does."""
        new = torch.from_numpy(checked_vectors(vectors, self.d_model))
        needed = self._size + len(new)
        if needed > len(self._buffer):
            grown = self._buffer.new_empty(max(needed, 2 * len(self._buffer)), self.d_model)
            grown[: self._size] = self._buffer[: self._size]
            self._buffer = grown
        self._buffer[self._size : needed] = new
        self._size = needed

    def replace(self, slots: np.ndarray, vectors: np.ndarray) -> None:
        new = torch.from_numpy(checked_vectors(vectors, self.d_model))
        self._buffer[torch.from_numpy(slots).to(self._buffer.device)] = new.to(self._buffer.device)

    @torch.no_grad()
    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        keys = self._buffer[: self._size]
        asked = torch.from_numpy(_checked_query(queries, k, self.d_model)).to(keys.device)
        scores = asked.new_empty(len(asked), 0)
        ids = torch.empty(len(asked), 0, dtype=torch.int64, device=keys.device)
        # Under the trainer's bf16 autocast the product would lose the digits that tell neighbours apart.
        with torch.autocast(keys.device.type, enabled=False):
            for start in range(0, self._size, self.block):
                part = asked @ keys[start : start + self.block].T
                part, found = part.topk(min(k, part.shape[1]), dim=1)
                scores, ids = torch.cat((scores, part), 1), torch.cat((ids, found + start), 1)
                scores, order = scores.topk(min(k, scores.shape[1]), dim=1)
                ids = ids.gather(1, order)
        return _padded(scores.cpu().numpy(), ids.cpu().numpy(), k)

    def vectors(self) -> np.ndarray:
        return self._buffer[: self._size].cpu().numpy()

    def reset(self) -> None:
        self._buffer, self._size = self._buffer.new_empty(0, self.d_model), 0

    def settings(self) -> dict[str, Any]:
        return {"backend": "torch"}

    def save(self, directory: Path) -> None:
        np.save(directory / "keys.npy", self.vectors())

    def restore(self, directory: Path, count: int) -> None:
        _add_in_chunks(self, directory, count)


class FlatIndex:
    """FAISS `IndexFlatIP`: exact inner products (the cosine, for unit vectors).

    Many queries on the CPU are answered by `exact_top_k` from FAISS's own memory instead: FAISS multiplies
    matrices only from 128,000 queries on.

    Args:
        on_gpu: keep the vectors on the first GPU (a FAISS built for GPUs is needed, see `gpu_ready`).
    """

    def __init__(self, d_model: int, *, on_gpu: bool = False) -> None:
        self.d_model, self._faiss = d_model, import_faiss()
        self._faiss.omp_set_num_threads(torch.get_num_threads())
        self._resources = self._faiss.StandardGpuResources() if on_gpu else None
        self.reset()

    def __len__(self) -> int:
        return self._index.ntotal

    def reset(self) -> None:
        self._index = self._to_device(self._faiss.IndexFlatIP(self.d_model))
        self._largest_norm = 0.0

    def _to_device(self, index: Any) -> Any:
        if self._resources is None:
            return index
        return self._faiss.index_cpu_to_gpu(self._resources, 0, index)

    def _on_cpu(self) -> Any:
        return self._index if self._resources is None else self._faiss.index_gpu_to_cpu(self._index)

    def _memory(self, index: Any) -> np.ndarray:
        """The vectors of a CPU index without a copy; valid until the index next grows."""
        return self._faiss.rev_swig_ptr(index.get_xb(), index.ntotal * self.d_model).reshape(-1, self.d_model)

    def add(self, vectors: np.ndarray) -> None:
        """See `VectorIndex.add`; raises ValueError as `checked_vectors` does."""
        self._index.add(self._noted(checked_vectors(vectors, self.d_model)))

    def replace(self, slots: np.ndarray, vectors: np.ndarray) -> None:
        # Written in place, because remove_ids would shift every later id. A GPU index makes a round trip.
        index = self._on_cpu()
        self._memory(index)[slots] = self._noted(checked_vectors(vectors, self.d_model))
        self._index = index if self._resources is None else self._to_device(index)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        queries = _checked_query(queries, k, self.d_model)
        wanted = min(k, len(self))
        if wanted == 0 or len(queries) == 0:
            return _padded(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0)), k)
        if self._product_is_faster(len(queries), wanted):
            keys = torch.from_numpy(self._memory(self._index))
            found = exact_top_k(torch.from_numpy(queries), keys, wanted, self._largest_norm)
            return _padded(found[0].numpy(), found[1].numpy(), k)
        index = self._on_cpu() if wanted > GPU_MAX_K else self._index
        scores, ids = index.search(queries, wanted)
        return _padded(scores, ids, k)

    def _product_is_faster(self, queries: int, k: int) -> bool:
        return (
            self._resources is None
            and queries >= PRODUCT_QUERIES
            and queries * len(self) >= PRODUCT_PAIRS
            and k * GROUP <= len(self)
        )

    def _noted(self, vectors: np.ndarray) -> np.ndarray:
        """The vectors; the longest norm ever stored is what the rounding of a product is bounded by."""
        longest = float(np.linalg.norm(vectors, axis=1).max(initial=0.0))
        self._largest_norm = max(self._largest_norm, longest)
        return vectors

    def vectors(self) -> np.ndarray:
        if len(self) == 0:
            return np.empty((0, self.d_model), np.float32)
        return (
            self._memory(self._index) if self._resources is None else self._index.reconstruct_n(0, len(self))
        )

    def settings(self) -> dict[str, Any]:
        return {"backend": "faiss", "gpu": self._resources is not None}

    def save(self, directory: Path) -> None:
        np.save(directory / "keys.npy", self.vectors())

    def restore(self, directory: Path, count: int) -> None:
        _add_in_chunks(self, directory, count)


class IVFIndex:
    """FAISS `IndexIVFFlat`: looks only into the `nprobe` lists of vectors nearest to the query.

    nlist is about 4 sqrt(N); the lists are trained at the first search for which N >= 39 nlist (FAISS's rule
    for k-means), and again once the store has grown fourfold, never on the first batch written, which would
    not look like the rest. Until then, and for queries whose lists hold fewer than k vectors, the exact index
    kept beside them answers. `nprobe` is the smallest power of two that reaches `target_recall`; the recall
    measured is in `settings()`.

    Args:
        target_recall: share of the exact `recall_k` neighbours that must be found for sampled queries.
    """

    def __init__(self, d_model: int, *, target_recall: float = 0.95, recall_k: int = 10) -> None:
        self.d_model, self.target_recall, self.recall_k = d_model, target_recall, recall_k
        self.exact, self._faiss = FlatIndex(d_model), import_faiss()
        self._forget()

    def _forget(self) -> None:
        self._lists: Any = None
        self.trained_on, self.recall = 0, float("nan")

    def __len__(self) -> int:
        return len(self.exact)

    def reset(self) -> None:
        self.exact.reset()
        self._forget()

    def add(self, vectors: np.ndarray) -> None:
        """See `VectorIndex.add`; raises ValueError as `checked_vectors` does."""
        self.exact.add(vectors)
        if self._lists is not None:
            self._lists.add(checked_vectors(vectors, self.d_model))

    def replace(self, slots: np.ndarray, vectors: np.ndarray) -> None:
        self.exact.replace(slots, vectors)
        if self._lists is not None:
            self._lists.update_vectors(slots, checked_vectors(vectors, self.d_model))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        queries = _checked_query(queries, k, self.d_model)
        self._train_if_due()
        if self._lists is None or k == 0 or len(queries) == 0:
            return self.exact.search(queries, k)
        wanted = min(k, len(self))
        scores, ids = self._lists.search(queries, wanted)
        short = (ids < 0).any(axis=1)
        scores, ids = _padded(scores, ids, k)
        if short.any():
            scores[short], ids[short] = self.exact.search(queries[short], k)
        return scores, ids

    def _train_if_due(self) -> None:
        size = len(self)
        num_lists = int(4 * size**0.5)
        if size < 39 * num_lists or size < 4 * self.trained_on or size == 0:
            return
        lists = self._empty_lists(num_lists)
        self._fill(lists)
        self._lists, self.trained_on = lists, size
        self._choose_nprobe(self.exact.vectors())

    def _choose_nprobe(self, vectors: np.ndarray) -> None:
        sample = np.random.default_rng(0).choice(len(vectors), min(256, len(vectors)), replace=False)
        # A stored vector finds itself in any case, so it counts neither for nor against the recall.
        _, truth = self.exact.search(vectors[sample], self.recall_k + 1)
        self._lists.nprobe = 1
        while True:
            _, found = self._lists.search(vectors[sample], self.recall_k + 1)
            hits = [
                len((set(t) & set(f)) - {i}) / len(set(t) - {i})
                for i, t, f in zip(sample, truth, found, strict=True)
            ]
            self.recall = float(np.mean(hits))
            if self.recall >= self.target_recall or self._lists.nprobe >= self._lists.nlist:
                return
            self._lists.nprobe = min(2 * self._lists.nprobe, self._lists.nlist)

    def vectors(self) -> np.ndarray:
        return self.exact.vectors()

    def settings(self) -> dict[str, Any]:
        if self._lists is None:
            return {"backend": "ivf", "trained_on": 0}
        return {
            "backend": "ivf",
            "trained_on": self.trained_on,
            "nlist": self._lists.nlist,
            "nprobe": self._lists.nprobe,
            f"recall@{self.recall_k}": self.recall,
        }

    def save(self, directory: Path) -> None:
        self.exact.save(directory)
        if self._lists is not None:
            # FAISS's own files are read by code that trusts them; the lists follow from their centres
            centres = self._lists.quantizer.reconstruct_n(0, self._lists.nlist)
            np.save(directory / "lists.npy", np.ascontiguousarray(centres, np.float32))
            numbers = [self._lists.nlist, self._lists.nprobe, self.trained_on, self.recall]
            np.save(directory / "lists_settings.npy", np.array(numbers, np.float64))

    def restore(self, directory: Path, count: int) -> None:
        self._forget()
        self.exact.restore(directory, count)
        if not (directory / "lists_settings.npy").is_file():
            return  # nothing was trained, or by a version that kept lists in a file of FAISS: trained again if due
        num_lists, nprobe, trained_on, recall = read_npy(directory / "lists_settings.npy", ("float64", (4,)))
        if not (
            1 <= nprobe <= num_lists <= max(1, count) and 0 <= trained_on <= 1 << 40 and 0 <= recall <= 1
        ):
            raise ValueError("lists_settings.npy holds settings that no index has")
        centres = read_npy(directory / "lists.npy", ("float32", (int(num_lists), self.d_model)))
        self._lists = self._empty_lists(int(num_lists))
        self._lists.quantizer.add(checked_vectors(centres, self.d_model))
        self._fill(self._lists)
        self._lists.nprobe, self.trained_on, self.recall = int(nprobe), int(trained_on), float(recall)

    def _empty_lists(self, num_lists: int) -> Any:
        faiss = self._faiss
        quantizer = faiss.IndexFlatIP(self.d_model)
        return faiss.IndexIVFFlat(quantizer, self.d_model, num_lists, faiss.METRIC_INNER_PRODUCT)

    def _fill(self, lists: Any) -> None:
        """Train what is not trained, and put all vectors into their lists."""
        lists.train(self.exact.vectors())
        lists.add(self.exact.vectors())
        lists.make_direct_map(True)  # `replace` needs to find a vector's list


def import_faiss() -> Any:
    """The faiss module; raises ImportError where it is not installed."""
    return importlib.import_module("faiss")


def gpu_ready(faiss: Any) -> bool:
    """Whether this FAISS was built for GPUs and sees one."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def make_index(backend: str, d_model: int, *, gpu: bool | None = None) -> VectorIndex:
    """The index for `backend`: "faiss" (exact), "torch" (exact) or "ivf" (inverted lists, on the CPU).

    Args:
        gpu: None takes a GPU that FAISS can use, False never does, True warns once if there is none.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in ("faiss", "torch", "ivf"):
        raise ValueError(f"unknown store backend {backend!r}: choose faiss, torch or ivf")
    if backend != "torch":
        try:
            faiss = import_faiss()
        except ImportError:
            warn_once("faiss is not installed: the vector store uses the exact torch index instead")
            backend = "torch"
    if backend == "torch":
        if gpu and not torch.cuda.is_available():
            warn_once("no GPU is present: the vector store stays on the CPU")
        return TorchIndex(d_model, device="cuda" if gpu and torch.cuda.is_available() else "cpu")
    ready = backend == "faiss" and gpu_ready(faiss)
    if gpu and not ready:
        warn_once("no GPU that FAISS can use with this index: the vector store stays on the CPU")
    if backend == "ivf":
        return IVFIndex(d_model)
    return FlatIndex(d_model, on_gpu=ready and gpu is not False)
