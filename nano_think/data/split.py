"""Which split a document belongs to.

The rule has two parts:

1. A document's own split is a pure function of its content: a salted hash of the folded text, read as a
   number in
   [0, 1), falls into expert_train (80%), fusion_train (10%), validation (5%) or test (5%). Exact copies share
   the folded text and therefore the split.
2. Near copies may fall into different splits. In a near-duplicate cluster the most held-out split that occurs
   wins (test > validation > fusion_train > expert_train) and members of any other split are excluded.

Hashing a cluster as a whole would look simpler, but the identity of a cluster changes when a member joins, so
one new document could carry old ones from training into test. Here a new document can never move another one:
at most it makes near copies of itself, or of documents it connects, drop out. No cluster ever spans two
splits, and neither the order of files nor the order of documents matters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

SPLITS = ("expert_train", "fusion_train", "validation", "test")
FRACTIONS = (0.80, 0.10, 0.05, 0.05)
DEFAULT_SALT = "nano_think"

_BORDERS = tuple(sum(FRACTIONS[: i + 1]) for i in range(len(FRACTIONS) - 1))


def own_split(folded: str, salt: str = DEFAULT_SALT) -> int:
    """Return the index into `SPLITS` of a text already passed through `normalize` and `fold`."""
    # The salt is the key of the hash, so that salt and text cannot run into each other.
    key = hashlib.blake2b(salt.encode(), digest_size=32).digest()
    digest = hashlib.blake2b(folded.encode(), digest_size=8, key=key).digest()
    position = int.from_bytes(digest, "little") / 2**64
    return sum(position >= border for border in _BORDERS)


def resolve_clusters(own: Sequence[int] | np.ndarray, clusters: Sequence[int] | np.ndarray) -> np.ndarray:
    """Say for each document whether it is kept, (documents,) bool.

    Args:
        own: index into `SPLITS` per document.
        clusters: cluster label per document.
    """
    own = np.asarray(own, dtype=np.int64)
    _, label = np.unique(np.asarray(clusters, dtype=np.int64), return_inverse=True)
    winner = np.zeros(len(own), dtype=np.int64)
    np.maximum.at(winner, label, own)
    return own == winner[label]
