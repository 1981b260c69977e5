"""Exactly the text that a training run read, for baselines that must not have read more or less."""

from __future__ import annotations

import numpy as np

from nano_think.data.packing import RowReader
from nano_think.data.sampler import DomainSampler

Stream = tuple[np.ndarray, np.ndarray]


def seen_streams(reader: RowReader, sampler: DomainSampler, num_rows: int) -> list[Stream]:
    """(tokens, document starts) a domain of the first `num_rows` rows drawn, each distinct row once.

    A row's fragment of a document counts as a document: a model does not see across the border either. The
    label of a row's last position is part of the row.
    """
    drawn = sorted(set(sampler.draws(np.arange(num_rows))))
    streams: list[Stream] = []
    for domain in range(len(reader.rows_per_domain)):
        tokens: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        offset = 0
        for row in (row for where, row in drawn if where == domain):
            content = reader.row(domain, row)
            length = int((content["segments"] >= 0).sum())
            ids, label = content["tokens"][:length], content["labels"][length - 1 : length]
            begins = np.flatnonzero(np.diff(content["segments"][:length], prepend=-1))
            row_tokens = np.concatenate((ids, label[label >= 0]))
            tokens.append(row_tokens)
            starts.append(begins + offset)
            offset += len(row_tokens)
        if tokens:
            streams.append((np.concatenate(tokens), np.concatenate(starts)))
    return streams
