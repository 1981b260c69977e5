"""The streams for baselines hold exactly the rows that training read, each once."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest

from nano_think.data.module import TokenDataModule

TEXTS = {
    "expert_train": {
        "code": [f"def f{i}(): return {i * i}" for i in range(14)],
        "prose": [f"sentence number {i} goes on a little longer than a row" for i in range(9)],
        "verse": [f"line {i}" for i in range(20)],
    },
    "fusion_train": {"code": ["a b c d e"], "prose": ["f g h i j k"], "verse": ["l m n o p"]},
}
COLUMNS = ("tokens", "labels", "segments", "doc_uid")
Row = tuple[int | tuple[int, ...], ...]


@pytest.fixture
def make(make_shards):
    directory = make_shards(TEXTS).directory

    def build(**changes) -> TokenDataModule:
        return TokenDataModule(directory, **{"seq_len": 16, "batch_size": 4, "seed": 7, **changes})

    return build


def rows_read(data: TokenDataModule, batches: int) -> set[Row]:
    """Domain and COLUMNS of the distinct rows of the first batches of training."""
    rows: set[Row] = set()
    # an epoch's loader ends at its length, the sequence goes on: ask the data set itself
    loader = data.train_dataloader()
    epoch = list(islice(loader, batches))
    while len(epoch) < batches:
        epoch.append(loader.dataset[len(epoch)])
    for batch in epoch:
        columns = (batch[name].tolist() for name in COLUMNS)
        for domain, *row in zip(batch["domain"].tolist(), *columns, strict=True):
            rows.add((domain, *map(tuple, row)))
    return rows


def transitions(stream: tuple[np.ndarray, np.ndarray]) -> Counter:
    """(token, next token) inside documents: what a bigram model is fitted on."""
    tokens, starts = stream
    first = set(starts.tolist())
    pairs = enumerate(pairwise(tokens.tolist()), start=1)
    return Counter(pair for place, pair in pairs if place not in first)


@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize("batches", [1, 3, 12])
def test_streams_are_the_rows_that_the_loader_yields(make, mode, batches):
    data = make(mode=mode)
    rows = rows_read(data, batches)
    streams = data.seen(4 * batches)
    assert len(streams) == len({domain for domain, *_ in rows})
    by_domain = zip(sorted({domain for domain, *_ in rows}), streams, strict=True)
    for domain, (tokens, starts) in by_domain:
        content, pairs, fragments = Counter(), Counter(), 0
        for _, ids, labels, segments, _ in (row for row in rows if row[0] == domain):
            inside = [(t, y, s) for t, y, s in zip(ids, labels, segments, strict=True) if s >= 0]
            content.update(t for t, _, _ in inside)
            # the true next token of a row's last position is no token of the row
            content.update([inside[-1][1]] if inside[-1][1] != -100 else [])
            pairs.update((t, y) for t, y, _ in inside if y != -100)
            fragments += len({s for _, _, s in inside})
        assert Counter(tokens.tolist()) == content
        assert transitions((tokens, starts)) == pairs
        assert len(starts) == fragments
        assert starts[0] == 0


def test_rows_that_were_drawn_twice_count_once(make):
    data = make()
    distinct = len(rows_read(data, 60))
    assert distinct < 4 * 60
    after, much_later = data.seen(4 * 60), data.seen(4 * 600)
    assert [len(tokens) for tokens, _ in after] == [len(tokens) for tokens, _ in much_later]


def test_the_order_of_training_decides(make):
    data, other = make(), make(seed=8)
    assert [t.tolist() for t, _ in data.seen(4)] != [t.tolist() for t, _ in other.seen(4)]
    only = make(mixing={"code": 1.0, "prose": 0.0, "verse": 0.0}).seen(8)
    assert len(only) == 1
