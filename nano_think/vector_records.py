"""What a record of the vector store is made of, and who may read it.

Letters: n records, Q queries, k neighbours, d width, m tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nano_think.arrays import read_npy, read_npz
from nano_think.files import hash_bytes

SPLITS = ("expert_train", "fusion_train", "validation", "test")
# The session of the corpus, which everyone may read.
SHARED = 0
# Metadata of a record: dtype and the value of a record that does not say.
COLUMNS: dict[str, tuple[str, int]] = {
    "doc_uid": ("int64", -1),
    "cluster": ("int64", -1),
    "chunk": ("int32", 0),
    "domain": ("int32", -1),
    "split": ("int8", 0),
    "generation": ("int32", 0),
    "token_offset": ("int64", 0),
    "session": ("int64", SHARED),
}


# What a store keeps of each record besides: how often its place was overwritten, and when it was last used.
BOOKKEEPING = {"wrap": "int64", "used": "int64"}
# Beyond these, a width or a length is no longer one of a language model.
WIDEST, LONGEST = 1 << 20, 1 << 24


def session_id(name: str) -> int:
    """The positive 63-bit number of a named session."""
    return (int(hash_bytes(name.encode())[:16], 16) >> 1) or 1


@dataclass(frozen=True)
class Records:
    """Records on their way into a store: `store.add(r.keys, r.values, **r.meta)`.

    keys, values: (n, d) float32; meta: columns (n,) or single values, and tokens (n, m).
    """

    keys: Tensor
    values: Tensor
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Hits:
    """Neighbours, the nearest first; where `valid` is False, value and score are 0 and the id is -1.

    values (Q, k, d) float32, scores (Q, k) cosines, ids (Q, k) int64 logical ids, valid (Q, k) bool.
    """

    values: Tensor
    scores: Tensor
    ids: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Reader:
    """Who asks. A record is visible if all of these hold:

    - its document and its near-duplicate cluster are not the reader's (negative: unknown, excludes nothing),
    - it was written in a generation before `generation` (None: whatever is stored),
    - it is of the shared corpus and of one of `splits`, or it is of the reader's own `session`.

    doc_uid, cluster: int64, one number a query: (Q,) for `VectorStore.search`, (B, L) for
    `Retriever.retrieve`, (B,) for `Retriever.init_state`.
    """

    doc_uid: Tensor | None = None
    cluster: Tensor | None = None
    generation: int | None = None
    splits: tuple[str, ...] = ("expert_train",)
    session: int = SHARED

    def readable(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """(n,) bool: the part of the rule that is the same for all queries."""
        readable = (columns["session"] == SHARED) & np.isin(columns["split"], split_numbers(self.splits))
        if self.session != SHARED:
            readable |= columns["session"] == self.session
        if self.generation is not None:
            readable &= columns["generation"] < self.generation
        return readable

    def own(self, count: int) -> dict[str, np.ndarray]:
        """doc_uid and cluster as (count,) arrays; raises ValueError for another shape."""
        own = {}
        for name, column in (("doc_uid", self.doc_uid), ("cluster", self.cluster)):
            own[name] = np.full(count, -1, np.int64) if column is None else as_numpy(column)
            if own[name].shape != (count,):
                raise ValueError(
                    f"a reader of {count} queries needs {name} ({count},), got {own[name].shape}"
                )
        return own


def as_numpy(array: Any) -> np.ndarray:
    """A detached NumPy copy or view; floating tensors become float32, integers keep every bit."""
    if not isinstance(array, Tensor):
        return np.asarray(array)
    array = array.detach().cpu()
    return (array.to(torch.float32) if array.is_floating_point() else array).numpy()


def split_numbers(names: Iterable[str]) -> list[int]:
    """Positions in SPLITS; raises ValueError for an unknown name."""
    names = list(names)
    if unknown := set(names) - set(SPLITS):
        raise ValueError(f"unknown split {sorted(unknown)}: choose from {SPLITS}")
    return [SPLITS.index(name) for name in names]


def metadata_columns(count: int, width: int, meta: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every column of `count` records from what is given; tokens padded with -1 to `width`.

    Raises:
        ValueError: an unknown column or split, or tokens that are not (count, up to width).
    """
    if unknown := set(meta) - set(COLUMNS) - {"tokens"}:
        raise ValueError(f"unknown metadata {sorted(unknown)}: choose from {[*COLUMNS, 'tokens']}")
    given = dict(meta)
    if isinstance(given.get("split"), str):
        given["split"] = split_numbers([given["split"]])[0]
    columns = {
        name: np.broadcast_to(as_numpy(given.get(name, default)).astype(dtype), (count,))
        for name, (dtype, default) in COLUMNS.items()
    }
    columns["tokens"] = np.full((count, width), -1, np.int32)
    if "tokens" in given:
        tokens = as_numpy(given["tokens"])
        if tokens.ndim != 2 or len(tokens) != count or tokens.shape[1] > width:
            raise ValueError(f"tokens must be ({count}, up to {width}), got {tokens.shape}")
        columns["tokens"][:, : tokens.shape[1]] = tokens
    return columns


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError for the manifest of a store that cannot be one of ours."""
    numbers = ("d_model", "capacity", "chunk", "count", "written", "clock", "generation")
    for name in numbers:
        if type(manifest[name]) is not int or not 0 <= manifest[name] < 1 << 62:
            raise ValueError(f"{name} is {manifest[name]!a:.40}")
    d_model, capacity, chunk, count, written = (manifest[name] for name in numbers[:5])
    if not (1 <= d_model <= WIDEST and chunk <= LONGEST and count <= min(capacity, written)):
        raise ValueError(f"{count} of {written} records of width {d_model} do not fit into {capacity}")
    near = manifest["near_duplicate"]
    if near is not None and (
        isinstance(near, bool) or not isinstance(near, int | float) or not -1 <= near <= 2
    ):
        raise ValueError(f"near_duplicate is {near!a:.40}")
    for name in ("backend", "policy", "value_dtype", "fingerprint"):
        if not isinstance(manifest[name], str):
            raise ValueError(f"{name} is {manifest[name]!a:.40}")


def read_columns(folder: Path, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    """All that the files of a store say of its records but their keys.

    Raises OSError or ValueError where a file is missing, of other shapes than a checked manifest says, or holds
    what no record has.
    """
    count, width = manifest["count"], manifest["d_model"]
    kinds = {name: (dtype, (count,)) for name, (dtype, _) in COLUMNS.items()}
    kinds |= {name: (dtype, (count,)) for name, dtype in BOOKKEEPING.items()}
    columns = read_npz(folder / "meta.npz", {**kinds, "tokens": ("int32", (count, manifest["chunk"]))})
    columns["values"] = read_npy(folder / "values.npy", (manifest["value_dtype"], (count, width)))
    ranges = {"split": (0, len(SPLITS) - 1), "used": (0, manifest["clock"]), "wrap": (0, manifest["written"])}
    ranges |= {
        "tokens": (-1, LONGEST),
        "session": (0, None),
        "generation": (0, None),
        "token_offset": (0, None),
    }
    for name, (lowest, highest) in ranges.items():
        column = columns[name]
        if column.size and (column.min() < lowest or (highest is not None and column.max() > highest)):
            raise ValueError(f"meta.npz: {name} lies outside {lowest} to {highest}")
    if not np.isfinite(columns["values"]).all():
        raise ValueError("values.npy: a value is not finite")
    return columns
