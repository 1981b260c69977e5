"""Rows of fixed length out of a token stream: packed without waste, or one document fragment a row.

Every row has the arrays of the project's batch, all int64 of shape (L,): `tokens`; `labels`, the next token
where it belongs to the same document, else -100; `positions`, counted from the start of the document
fragment; `segments`, the number of the fragment in the row; `doc_uid`; `cluster`. Pads hold the pad token,
label -100, position 0 and -1 in the last three.

A document that crosses the end of a row is cut: its second part is a fragment of its own in the next row. The
label of a row's last position is the true next token, so no prediction is lost at the border.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nano_think.data.shards import Documents, Shards

IGNORE = -100
MODES = ("packed", "padded")

Row = dict[str, np.ndarray]


def num_packed_rows(num_tokens: int, seq_len: int) -> int:
    """Rows that hold a stream. Its last token is only a label, hence the minus one."""
    return max(0, -(-(num_tokens - 1) // seq_len))


def pack_row(tokens: np.ndarray, docs: Documents, row: int, seq_len: int, pad_id: int) -> Row:
    """Row `row` of the stream: positions row*L to row*L + L - 1; only the stream's last row can have pads."""
    begin = row * seq_len
    return _cut(tokens, docs, begin, min(begin + seq_len, len(tokens)), seq_len, pad_id)


def padded_row_ends(docs: Documents, seq_len: int) -> np.ndarray:
    """(documents,) number of padded rows up to and including each document; the last entry is their total."""
    return np.cumsum(-(-(docs.length - 1) // seq_len))


def pad_row(
    tokens: np.ndarray, docs: Documents, row_ends: np.ndarray, row: int, seq_len: int, pad_id: int
) -> Row:
    """Row `row` of padded mode: at most L tokens of one document, then pads.

    Args:
        row_ends: `padded_row_ends(docs, seq_len)`.
    """
    doc = int(np.searchsorted(row_ends, row, side="right"))
    fragment = row - (int(row_ends[doc - 1]) if doc else 0)
    begin = int(docs.start[doc]) + fragment * seq_len
    end = min(begin + seq_len, int(docs.start[doc] + docs.length[doc]))
    return _cut(tokens, docs, begin, end, seq_len, pad_id)


def _cut(tokens: np.ndarray, docs: Documents, begin: int, end: int, seq_len: int, pad_id: int) -> Row:
    """The row whose inputs are stream positions begin .. end-1, at most L of them."""
    length = end - begin
    places = np.arange(begin, min(end + 1, len(tokens)))  # one more than the inputs: the last label
    doc = np.searchsorted(docs.start, places, side="right") - 1
    inside = doc[:length]
    stream = np.asarray(tokens[begin : end + 1], dtype=np.int64)

    row = {name: np.full(seq_len, -1, np.int64) for name in ("segments", "doc_uid", "cluster")}
    row["tokens"] = np.full(seq_len, pad_id, np.int64)
    row["labels"] = np.full(seq_len, IGNORE, np.int64)
    row["positions"] = np.zeros(seq_len, np.int64)
    row["tokens"][:length] = stream[:length]
    row["labels"][: len(stream) - 1] = np.where(doc[1:] == doc[:-1], stream[1:], IGNORE)
    row["positions"][:length] = places[:length] - np.maximum(docs.start[inside], begin)
    row["segments"][:length] = inside - inside[0]
    row["doc_uid"][:length] = docs.uid[inside]
    row["cluster"][:length] = docs.cluster[inside]
    return row


class RowReader:
    """Rows of all domains of one split, by (domain, row); opens its files on first use, in each process anew.

    Args:
        mode: `packed` or `padded`.

    Raises:
        ValueError: unknown mode or a `seq_len` below 1.
    """

    def __init__(self, shards: Shards, split: str, seq_len: int, mode: str = "packed") -> None:
        if mode not in MODES:
            raise ValueError(f"data mode {mode!r} is unknown: choose {' or '.join(MODES)}")
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len} must be at least 1")
        self.shards, self.split, self.seq_len, self.mode = shards, split, seq_len, mode
        self._streams: dict[int, tuple[np.ndarray, Documents, np.ndarray | None]] = {}
        if mode == "packed":
            tokens = [shards.num_tokens(split, name) for name in shards.domains]
            self.rows_per_domain = [num_packed_rows(count, seq_len) for count in tokens]
        else:
            tables = [padded_row_ends(shards.docs(split, name), seq_len) for name in shards.domains]
            self.rows_per_domain = [int(ends[-1]) if len(ends) else 0 for ends in tables]

    def __getstate__(self) -> dict[str, object]:
        # Memory maps are pickled by value; a worker process maps the files itself instead.
        return {**self.__dict__, "_streams": {}}

    def row(self, domain: int, row: int) -> Row:
        """One row of the domain with this index."""
        tokens, docs, row_ends = self._stream(domain)
        if row_ends is None:
            return pack_row(tokens, docs, row, self.seq_len, self.shards.pad_id)
        return pad_row(tokens, docs, row_ends, row, self.seq_len, self.shards.pad_id)

    def batch(self, draws: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """Rows stacked to (B, L) int64 tensors, their `domain` (B,) and their number in it, `row` (B,)."""
        rows = [self.row(domain, row) for domain, row in draws]
        batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        domains, numbers = zip(*draws, strict=True)
        batch["domain"], batch["row"] = torch.tensor(domains), torch.tensor(numbers)
        return batch

    def _stream(self, domain: int) -> tuple[np.ndarray, Documents, np.ndarray | None]:
        if domain not in self._streams:
            name = self.shards.domains[domain]
            docs = self.shards.docs(self.split, name)
            row_ends = padded_row_ends(docs, self.seq_len) if self.mode == "padded" else None
            self._streams[domain] = (self.shards.tokens(self.split, name), docs, row_ends)
        return self._streams[domain]
