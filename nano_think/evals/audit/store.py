"""A8: a memory that holds the very text being read gives none of it away.

First the rule of who may see a record, kind by kind. Then its effect: documents of random tokens are read while
they lie in the store, and a probe learns to tell the next token from the slots that it is shown. Where readers
are kept from their own text there is nothing to learn, and its loss stays at ln V. Logistic regression is convex,
so that what is there is found; a network in its place can sit on the plateau where it ignores memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_think.evals.audit.finding import Finding
from nano_think.evals.audit.live import remembering
from nano_think.evals.audit.trained import standard_error
from nano_think.vector_records import Reader
from nano_think.vector_store import VectorStore

VOCAB, CHUNK, LENGTH, DOCUMENTS, NEIGHBOURS = 23, 4, 16, 512, 2
# Of the rule: a reader of this document, cluster and generation 5, and the records it may not see.
OWN = 1
FORBIDDEN: dict[str, dict[str, Any]] = {
    "its own document": {"doc_uid": 1},
    "a near-duplicate of its document": {"doc_uid": 2, "cluster": 1},
    "a record of its own generation": {"doc_uid": 3, "generation": 5},
    "a record of another split": {"doc_uid": 4, "split": "validation"},
    "a record of a foreign session": {"doc_uid": 5, "session": 7},
}
ALLOWED, COPIES = 6, 4
# Of the probe's weights: enough that slots which say nothing cost it little more than ln V.
PENALTY = 0.1


def store_leak(table: Tensor | None, seed: int = 0) -> Finding:
    """A8 for a model with this embedding table (V, d); None for one that reads no memory."""
    title = "no reader finds its own text in the store"
    if (seen := _forbidden_hits(seed)) is not None:
        return Finding(
            "A8", title, "fail", float(seen[1]), None, "vector_store", f"a reader was shown {seen[0]}"
        )
    if table is None:
        return Finding("A8", title, "pass", 0.0, note="the rule alone: this model reads no memory")
    chance = math.log(min(VOCAB, len(table)))
    hidden, shown = (_probe_loss(table, seed, exclude=exclude) for exclude in (True, False))
    note = f"{hidden.mean():.3f} nats with exclusion, {shown.mean():.3f} without, ln V = {chance:.3f}"
    if (chance - float(shown.mean())) / standard_error(shown) <= 3:
        return Finding(
            "A8", title, "vacuous", None, None, "retrieval", f"a leak could not have shown: {note}"
        )
    below = chance - float(hidden.mean())
    if below / standard_error(hidden) > 3:
        # the rule itself holds, so whoever asks does not say who is reading
        return Finding("A8", title, "fail", below, None, "retrieval", note)
    return Finding("A8", title, "pass", max(0.0, below), note=note)


def _forbidden_hits(seed: int) -> tuple[str, int] | None:
    """What a reader was shown against the rule, and how often; None where the rule holds.

    All records have one key: they differ in who may see them alone.
    """
    key = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed)).expand(COPIES, -1)
    store = VectorStore(8, chunk=CHUNK, backend="torch", near_duplicate=None)
    kinds = {**FORBIDDEN, "a permitted record": {"doc_uid": ALLOWED}}
    for meta in kinds.values():
        store.add(key, key, **{"generation": 0, "cluster": 100 + meta["doc_uid"], **meta})
    reader = Reader(doc_uid=torch.tensor([OWN]), cluster=torch.tensor([OWN]), generation=5)
    found = store.search(key[:1], len(store), reader)
    seen = torch.as_tensor(store.lookup(found.ids)["doc_uid"])[found.valid].tolist()
    for name, meta in FORBIDDEN.items():
        if meta["doc_uid"] in seen:
            return name, seen.count(meta["doc_uid"])
    return (
        None if seen.count(ALLOWED) == COPIES else ("too few permitted records", COPIES - seen.count(ALLOWED))
    )


def _probe_loss(table: Tensor, seed: int, exclude: bool) -> Tensor:
    """Held-out losses (documents / 2,) of a probe that reads what the store shows.

    A record's value is the worst it can be: the mean embedding of the chunk that follows, near which the output
    of a trained model lies.
    """
    generator = torch.Generator().manual_seed(seed)
    table = table.detach().float()[:VOCAB]
    tokens = torch.randint(len(table), (DOCUMENTS, LENGTH), generator=generator)
    uid = torch.arange(DOCUMENTS).unsqueeze(1).expand_as(tokens)
    reader = Reader(doc_uid=uid, cluster=uid) if exclude else Reader()
    slots = remembering(table, tokens, table[tokens], CHUNK, NEIGHBOURS).retrieve(tokens, reader=reader)
    # the slots of chunk u are there for its tokens, and may tell of every one of them but the first
    later = torch.arange(CHUNK, LENGTH - 1)
    later = later[(later + 1) % CHUNK > 0]
    rows = torch.arange(DOCUMENTS).unsqueeze(1)
    shown = slots.values.flatten(2)[rows, slots.index[:, later].clamp_min(0)]
    return _logistic(shown, tokens[:, later + 1], len(table))


def _logistic(features: Tensor, targets: Tensor, classes: int, steps: int = 60) -> Tensor:
    """Mean loss of each held-out document; features (documents, n, F), targets (documents, n)."""
    features = (features - features.mean((0, 1))) / features.std((0, 1)).clamp_min(1e-6)
    half = len(features) // 2
    weight = torch.zeros(features.shape[-1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def losses(part: slice) -> Tensor:
        logits = features[part] @ weight + bias
        return F.cross_entropy(logits.transpose(1, 2), targets[part], reduction="none").mean(1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = losses(slice(half)).mean() + PENALTY * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    return losses(slice(half, None)).detach().double()
