"""Does a longer context help, hurt or cost: the same tokens read with more and more of what stands before them.

Letters: B rows, L positions, T scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from nano_think.evals.denoiser import Stopwatch
from nano_think.evals.losses import Batch
from nano_think.evals.ratios import Floats, Ints, mean_interval
from nano_think.evals.tokens import sample_documents
from nano_think.model import ExpertLM, NanoThink
from nano_think.ops.layout import Layout

METHOD = (
    "Rows of the longest length are cut into pieces of every shorter one, positions counted anew in each, so that "
    "all lengths are judged on the very same tokens, those of document fragments longer than the training length. "
    "A bucket far from the start holds the longest documents alone: compare inside a bucket, by minus_cut."
)


def length_curve(
    models: Mapping[str, ExpertLM | NanoThink],
    batches: Iterable[Batch],
    lengths: Sequence[int] = (256, 512, 1024, 2048),
    *,
    max_tokens: int | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Loss by position, and time, from the training length (the first of `lengths`) to the longest (the last).

    batches: rows of the longest length. max_tokens: documents are drawn until they hold that many.

    Returns:
        train_length, lengths, rows, tokens, documents, method, and in `models` by name a row a length with loss,
        seconds_per_token, cpu_seconds_per_token (the network without its head), tokens_per_second and
        `buckets`: from, to, tokens, loss, minus_cut (loss minus that of the same tokens at the training length:
        below 0 the longer context helps).

    Raises:
        ValueError: the lengths do not divide each other or the rows, or no fragment exceeds the training length.
    """
    trained, longest = lengths[0], lengths[-1]
    if any(longest % length for length in lengths) or list(lengths) != sorted(set(lengths)):
        raise ValueError(f"Lengths must rise and divide the last one, unlike {list(lengths)}.")
    rows = sample_documents([_long_fragments(batch, trained, longest) for batch in batches], max_tokens, seed)
    if not rows:
        raise ValueError(
            f"No document fragment is longer than {trained} tokens: longer contexts cannot help."
        )
    uid = torch.cat([batch["doc_uid"][batch["labels"] >= 0] for batch in rows]).cpu().numpy()
    document = np.unique(uid, return_inverse=True)[1]
    cut = {length: [_cut(batch, length) for batch in rows] for length in lengths}
    position = {length: _positions(batches) for length, batches in cut.items()}
    bootstrap = {"n_resamples": n_resamples, "seed": seed}
    found: dict[str, Any] = {}
    for name, model in models.items():
        read = {length: _read(model, batches) for length, batches in cut.items()}
        found[name] = [
            _row(length, read[length], read[trained][0], position[length], document, trained, bootstrap)
            for length in lengths
        ]
    return {
        "train_length": trained,
        "lengths": list(lengths),
        "rows": sum(len(batch["labels"]) for batch in rows),
        "tokens": len(document),
        "documents": int(document.max()) + 1,
        "method": METHOD,
        "models": found,
    }


def _long_fragments(batch: Batch, trained: int, longest: int) -> Batch:
    """The batch with the labels of fragments of more than `trained` tokens alone."""
    if batch["labels"].shape[1] != longest:
        raise ValueError(f"Rows have {batch['labels'].shape[1]} positions, not the longest length {longest}.")
    segments = batch["segments"]
    sizes = torch.stack([(segments == s).sum(1) for s in range(int(segments.max()) + 1)], dim=1)
    long = (segments >= 0) & (sizes.gather(1, segments.clamp_min(0)) > trained)
    return batch | {"labels": batch["labels"].masked_fill(~long, -100)}


def _cut(batch: Batch, length: int) -> Batch:
    """Rows (B, L) as (B L / length, length): fragments that cross a border go on as new ones from position 0."""
    names = ("tokens", "labels", "positions", "segments")
    pieces = {name: batch[name].reshape(-1, length) for name in names}
    first = Layout(pieces["positions"], pieces["segments"]).first
    pieces["positions"] = pieces["positions"] - pieces["positions"].gather(1, first)
    return pieces


def _positions(batches: Sequence[Batch]) -> Ints:
    return torch.cat([batch["positions"][batch["labels"] >= 0] for batch in batches]).cpu().numpy()


@torch.no_grad()
def _read(model: Any, batches: Sequence[Batch]) -> tuple[Floats, Stopwatch, int]:
    """Losses (T,) of the scored tokens, the time of the network and the number of positions it read."""
    watch, losses = Stopwatch(), []

    def forward(batch: Batch) -> Any:
        return model(batch["tokens"], Layout(batch["positions"], batch["segments"]), with_logits=False)

    forward(batches[0])  # what happens at the first call alone is not the price of a token
    for batch in batches:
        with watch.running():
            output = forward(batch)
        losses.append(model.nll(output, batch["labels"])[batch["labels"] >= 0])
    tokens = sum(batch["tokens"].numel() for batch in batches)
    return torch.cat(losses).double().cpu().numpy(), watch, tokens


def _row(
    length: int,
    read: tuple[Floats, Stopwatch, int],
    cut: Floats,
    position: Ints,
    document: Ints,
    trained: int,
    bootstrap: dict[str, int],
) -> dict[str, Any]:
    losses, watch, tokens = read
    buckets = []
    for begin, end in _buckets(trained, length):
        inside = (position >= begin) & (position < end)
        if inside.any():
            buckets.append({
                "from": begin,
                "to": end - 1,
                "tokens": int(inside.sum()),
                "loss": mean_interval(losses, document, inside, **bootstrap),
                "minus_cut": mean_interval(losses - cut, document, inside, **bootstrap),
            })  # fmt: skip
    return {
        "length": length,
        "loss": mean_interval(losses, document, None, **bootstrap),
        "seconds_per_token": watch.seconds / tokens,
        "cpu_seconds_per_token": watch.cpu_seconds / tokens,
        "tokens_per_second": tokens / watch.seconds,
        "buckets": buckets,
    }


def _buckets(trained: int, length: int) -> list[tuple[int, int]]:
    """First position and the one behind the last: an eighth of the training length, then doubling."""
    edges = [0, max(1, trained // 8)]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return list(pairwise(edges))
