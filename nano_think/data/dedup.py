"""Near-duplicate clusters by MinHash and locality-sensitive hashing.

A document is the set of its word 5-grams ("shingles"). The share of equal entries in two MinHash signatures
is an unbiased estimate of the Jaccard index of the sets (Broder 1997). Signatures of 128 entries are cut into
25 bands of 5 rows; two documents with an equal band are candidates, which at Jaccard 0.8 happens with
probability 1 - (1 - 0.8^5)^25 = 0.99995. Candidates whose estimate is not hopeless are then verified by the
exact Jaccard index, so the threshold is exact and only the recall is probabilistic. Memory: 512 bytes a
document; texts are asked for one pair at a time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator

import numpy as np

SHINGLE_WORDS = 5
NUM_PERMUTATIONS = 128
BANDS = 25
ROWS = 5
# Four standard errors of the estimate at Jaccard 0.8: sqrt(0.8 * 0.2 / 128) = 0.035.
ESTIMATE_MARGIN = 0.14

_WORD = re.compile(r"\w+")
_BLOCK = 4096
_MAX_WORDS_REMEMBERED = 1_000_000


class _WordHashes(dict[str, int]):
    """word -> 64-bit hash, remembered, because a text repeats its words."""

    def __missing__(self, word: str) -> int:
        if len(self) > _MAX_WORDS_REMEMBERED:
            self.clear()
        value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = value
        return value


_word_hashes = _WordHashes()


def _mix(x: np.ndarray) -> np.ndarray:
    """Bijective scrambling of 64-bit integers (finaliser of splitmix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def ngram_hashes(folded: str, n: int) -> np.ndarray:
    """Return one uint64 hash per word n-gram of a folded text, in order, (num_words - n + 1,) or (0,)."""
    words = np.array([_word_hashes[word] for word in _WORD.findall(folded)], dtype=np.uint64)
    count = len(words) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        total = total * np.uint64(0x9E3779B97F4A7C15) + words[offset : offset + count]
    return _mix(total)


def _permutations() -> tuple[np.ndarray, np.ndarray]:
    counter = _mix(np.arange(1, 2 * NUM_PERMUTATIONS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return counter[:NUM_PERMUTATIONS] | np.uint64(1), counter[NUM_PERMUTATIONS:]


_MULTIPLIERS, _OFFSETS = _permutations()


def signature(folded: str) -> np.ndarray | None:
    """Return the MinHash signature of a folded text, (128,) uint32, or None below five words.

    Texts that short have no shingle; only exact comparison applies to them.
    """
    shingles = np.unique(ngram_hashes(folded, SHINGLE_WORDS))
    if not len(shingles):
        return None
    smallest = np.full(NUM_PERMUTATIONS, np.iinfo(np.uint32).max, dtype=np.uint32)
    for start in range(0, len(shingles), _BLOCK):
        block = shingles[start : start + _BLOCK, None]
        hashed = ((block * _MULTIPLIERS + _OFFSETS) >> np.uint64(32)).astype(np.uint32)
        np.minimum(smallest, hashed.min(axis=0), out=smallest)
    return smallest


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
        self._parent = list(range(size))

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


def _buckets(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the groups of row indices whose (N, ROWS) keys are equal, where there is more than one."""
    packed = np.zeros(len(keys), dtype=np.uint64)
    for column in keys.T:
        packed = _mix(packed + column + np.uint64(1))
    order = np.argsort(packed, kind="stable")
    borders = np.flatnonzero(packed[order][1:] != packed[order][:-1]) + 1
    for group in np.split(order, borders):
        if len(group) > 1:
            yield group


class _Clusterer:
    """Joins similar rows bucket by bucket; a pair that is already connected needs no proof."""

    def __init__(self, signatures: np.ndarray, threshold: float, exact: Callable[[int, int], float]) -> None:
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
    signatures: np.ndarray, threshold: float, exact: Callable[[int, int], float]
) -> UnionFind:
    """Join every two documents whose Jaccard index reaches `threshold`, and whatever these chains connect.

    Args:
        signatures: (N, 128) uint32 from `signature`.
        threshold: Jaccard index from which two documents count as near copies.
        exact: returns the true Jaccard index of documents i and j; called for promising candidates only.

    Returns:
        Disjoint sets over the N rows. They do not depend on the order of the rows.
    """
    clusterer = _Clusterer(signatures, threshold, exact)
    for band in range(BANDS if len(signatures) > 1 else 0):
        for group in _buckets(signatures[:, band * ROWS : (band + 1) * ROWS]):
            clusterer.join_bucket(group)
    return clusterer.sets
