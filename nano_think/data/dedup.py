"""Near-duplicate clusters by MinHash and locality-sensitive hashing.

A document is the set of its word 5-grams ("shingles"). The share of equal entries in two MinHash signatures
is an unbiased estimate of the Jaccard index of the sets (Broder 1997). Signatures of 128 entries are cut into
25 bands of 5 rows; two documents with an equal band are candidates, which at Jaccard 0.8 happens with
probability 1 - (1 - 0.8^5)^25 = 0.99995. Candidates whose estimate is not hopeless are then verified by the
exact Jaccard index, so the threshold is exact and only the recall is probabilistic. Signatures may lie in a
file, and texts are asked for one pair at a time.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import BinaryIO

import numpy as np

SHINGLE_WORDS = 5
NUM_PERMUTATIONS = 128
BANDS = 25
ROWS = 5
# Four standard errors of the estimate at Jaccard 0.8: sqrt(0.8 * 0.2 / 128) = 0.035.
ESTIMATE_MARGIN = 0.14

_BLOCK = 1024  # shingles hashed at a time; 128 values of 4 bytes each stay in the cache
_PIECE = 1 << 18  # characters whose words are hashed at a time
_LONGEST_WORD = 1 << 19  # characters; a longer one counts as several
_BETWEEN_WORDS = re.compile(r"\W")
_SIGNATURES_READ = 1 << 14

# An odd number has an inverse modulo 2^64.
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Bijective scrambling of 64-bit integers (finaliser of splitmix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(2)
def _letter_hashes(count: int) -> np.ndarray:
    """A hash for each of the first `count` code points, 0 for those that are no part of a word (`\\w`)."""
    words = np.array([code for code in range(count) if chr(code).isalnum() or chr(code) == "_"])
    hashes = np.zeros(count, dtype=np.uint64)
    hashes[words] = _mix(words.astype(np.uint64) + np.uint64(1))
    return hashes


@lru_cache(2)
def _powers(base: int, count: int) -> np.ndarray:
    """base^0 .. base^(count - 1) modulo 2^64."""
    factors = np.full(count, base, dtype=np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _pieces(folded: str) -> Iterator[str]:
    """The text in pieces of about `_PIECE` characters, cut between words."""
    start = 0
    while start < len(folded):
        longest = start + _PIECE + _LONGEST_WORD
        border = _BETWEEN_WORDS.search(folded, start + _PIECE, longest)
        end = border.start() if border else longest
        yield folded[start:end]
        start = end


def _word_hashes(text: str) -> np.ndarray:
    """One uint64 hash for each word of a text, in order.

    A word c_0 .. c_m is the sum of h(c_i) B^i modulo 2^64. Powers are counted from the start of the text, which
    needs no loop over the words, and the power of a word's first place is divided out again.
    """
    if text.isascii():
        values = _letter_hashes(128)[np.frombuffer(text.encode("ascii"), np.uint8)]
    else:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        values = _letter_hashes(0x110000)[codes]
    inside = values != 0
    first = inside.copy()
    first[1:] &= ~inside[:-1]
    starts = np.flatnonzero(first)
    if not len(starts):
        return np.empty(0, dtype=np.uint64)
    length = max(2 * _PIECE, 1 << len(text).bit_length())  # few sizes, so that the powers are remembered
    values *= _powers(_BASE, length)[: len(values)]
    return _mix(np.add.reduceat(values, starts) * _powers(_INVERSE, length)[starts])


def ngram_hashes(folded: str, n: int) -> np.ndarray:
    """Return one uint64 hash per word n-gram of a folded text, in order, (num_words - n + 1,) or (0,)."""
    words = np.concatenate([np.empty(0, np.uint64), *map(_word_hashes, _pieces(folded))])
    count = len(words) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    total = words[:count].copy()
    for offset in range(1, n):
        total *= np.uint64(_BASE)
        total += words[offset : offset + count]
    return _mix(total)


def _permutations() -> tuple[np.ndarray, np.ndarray]:
    counter = _mix(np.arange(1, 2 * NUM_PERMUTATIONS + 1, dtype=np.uint64) * np.uint64(_BASE))
    halves = (counter >> np.uint64(32)).astype(np.uint32)
    return halves[:NUM_PERMUTATIONS] | np.uint32(1), halves[NUM_PERMUTATIONS:]


_MULTIPLIERS, _OFFSETS = _permutations()


def signature(folded: str) -> np.ndarray | None:
    """Return the MinHash signature of a folded text, (128,) uint32, or None below five words.

    Texts that short have no shingle; only exact comparison applies to them. A permutation is x -> a x + b modulo
    2^32 with a odd, over hashes that are already scrambled.
    """
    shingles = (ngram_hashes(folded, SHINGLE_WORDS) >> np.uint64(32)).astype(np.uint32)
    if not len(shingles):
        return None
    smallest = np.full(NUM_PERMUTATIONS, np.iinfo(np.uint32).max, dtype=np.uint32)
    for start in range(0, len(shingles), _BLOCK):
        hashed = shingles[start : start + _BLOCK, None] * _MULTIPLIERS
        hashed += _OFFSETS
        np.minimum(smallest, hashed.min(axis=0), out=smallest)
    return smallest


class SignatureFile:
    """Signatures in a file, read like a NumPy array of shape (N, 128): memory does not grow with N.

    Args:
        file: open for reading and writing, unbuffered; it belongs to this object alone.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, 0

    def __len__(self) -> int:
        return self._size

    def append(self, signatures: bytes) -> None:
        """Add the bytes of one signature or of several."""
        self._file.seek(0, 2)
        self._file.write(signatures)
        self._size += len(signatures) // (4 * NUM_PERMUTATIONS)

    def __getitem__(self, where: slice | np.ndarray | int) -> np.ndarray:
        """(n, 128) of a slice or of an array of rows, (128,) of one row."""
        if isinstance(where, slice):
            start, stop, _ = where.indices(self._size)
            return self._read(start, max(0, stop - start))
        if isinstance(where, np.ndarray):
            rows = [self._read(row, 1) for row in where.tolist()]
            return np.concatenate([np.empty((0, NUM_PERMUTATIONS), np.uint32), *rows])
        return self._read(where, 1)[0]

    def _read(self, start: int, count: int) -> np.ndarray:
        size = 4 * NUM_PERMUTATIONS
        self._file.seek(start * size)
        return np.frombuffer(self._file.read(count * size), np.uint32).reshape(-1, NUM_PERMUTATIONS)


def exact_jaccard(folded_a: str, folded_b: str) -> float:
    """Return the exact Jaccard index of the shingle sets of two folded texts; 0 if one has no shingle."""
    a, b = (np.unique(ngram_hashes(text, SHINGLE_WORDS)) for text in (folded_a, folded_b))
    if not len(a) or not len(b):
        return 0.0
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


class UnionFind:
    """Disjoint sets over 0 .. size - 1."""

    def __init__(self, size: int) -> None:
        self._parent = array("q", range(size))

    def find(self, item: int) -> int:
        """Return the representative of the set that holds `item`."""
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def union(self, a: int, b: int) -> None:
        """Join the sets of `a` and `b`."""
        a, b = self.find(a), self.find(b)
        self._parent[max(a, b)] = min(a, b)


def _band_keys(signatures: np.ndarray | SignatureFile, band: int) -> np.ndarray:
    """One uint64 for each row, equal where the rows of a band are."""
    keys = np.zeros(len(signatures), dtype=np.uint64)
    for start in range(0, len(keys), _SIGNATURES_READ):
        part = slice(start, start + _SIGNATURES_READ)
        for column in signatures[part][:, band * ROWS : (band + 1) * ROWS].T:
            keys[part] = _mix(keys[part] + column + np.uint64(1))
    return keys


def _buckets(keys: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the groups of `rows` whose keys are equal, where there is more than one."""
    order = rows[np.argsort(keys[rows], kind="stable")]
    ordered = keys[order]
    borders = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    starts, ends = np.append(0, borders), np.append(borders, len(order))
    several = ends - starts > 1
    for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True):
        yield order[start:end]


class _Clusterer:
    """Joins similar rows bucket by bucket; a pair that is already connected needs no proof."""

    def __init__(
        self,
        signatures: np.ndarray | SignatureFile,
        threshold: float,
        exact: Callable[[int, int], float],
    ) -> None:
        self.sets = UnionFind(len(signatures))
        self._signatures, self._threshold, self._exact = signatures, threshold, exact
        self._rejected: set[tuple[int, int]] = set()

    def _labels(self, group: np.ndarray) -> np.ndarray:
        return np.array([self.sets.find(row) for row in group.tolist()])

    def join_bucket(self, group: np.ndarray) -> None:
        """Compare all pairs of a bucket."""
        labels = self._labels(group)
        for position, row in enumerate(group[:-1].tolist()):
            others = group[position + 1 :][labels[position + 1 :] != labels[position]]
            if len(others) and self._join(row, others):
                labels = self._labels(group)

    def _join(self, row: int, others: np.ndarray) -> bool:
        estimates = (self._signatures[others] == self._signatures[row]).mean(axis=1)
        joined = False
        for other in others[estimates >= self._threshold - ESTIMATE_MARGIN].tolist():
            pair = (min(row, other), max(row, other))
            if self.sets.find(row) == self.sets.find(other) or pair in self._rejected:
                continue
            if self._exact(*pair) >= self._threshold:
                self.sets.union(*pair)
                joined = True
            else:
                self._rejected.add(pair)
        return joined


def near_duplicates(
    signatures: np.ndarray | SignatureFile,
    threshold: float,
    exact: Callable[[int, int], float],
    rows: np.ndarray | None = None,
) -> UnionFind:
    """Join every two documents whose Jaccard index reaches `threshold`, and whatever these chains connect.

    Args:
        signatures: (N, 128) uint32 from `signature`.
        threshold: Jaccard index from which two documents count as near copies.
        exact: returns the true Jaccard index of documents i and j; called for promising candidates only.
        rows: the documents to look at, all N by default.

    Returns:
        Disjoint sets over the N rows. They do not depend on the order of the rows.
    """
    clusterer = _Clusterer(signatures, threshold, exact)
    rows = np.arange(len(signatures)) if rows is None else rows
    for band in range(BANDS if len(rows) > 1 else 0):
        for group in _buckets(_band_keys(signatures, band), rows):
            clusterer.join_bucket(group)
    return clusterer.sets
