"""Is retrieval any good? R1 to R5, and what it costs.

R1 loss with real, shuffled, random and no memory: only real below shuffled counts. R2 precision of the hits'
domains against drawing records at random. R3 known items: does the first half of a document find its second half?
R4 attention on slots. R5 gain by how much of a chunk is copied from its hits. Everything is plain JSON; the shapes
are in the docstrings, an `interval` is {estimate, low, high, documents}, a `difference` has a verdict too.

Letters: B rows, L positions, V vocabulary, M documents, D domains.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from nano_think.artifacts.memory import SPLIT, Memory
from nano_think.evals.bootstrap import Difference, paired_difference, ratio
from nano_think.evals.losses import Batch, DocumentLosses, evaluate_models
from nano_think.evals.memory_modes import MemoryModes, overlap
from nano_think.evals.ratios import interval, mean_interval, number, plain
from nano_think.model import NanoThink
from nano_think.ops.layout import Layout
from nano_think.vector_records import Reader
from nano_think.vector_store import VectorStore

# Upper ends of the shares of a chunk that are copied from its hits.
BUCKETS = (0.0, 0.25, 0.5, 1.0)
RANKS = 10


def retrieval_evidence(
    model: NanoThink,
    memory: Memory,
    batches: Iterable[Batch],
    domains: Sequence[str],
    byte_lengths: ArrayLike,
    *,
    source_of: Mapping[int, int] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """{"losses": R1, "precision": R2, "known_item": R3, "mass": R4, "overlap": R5} of a model with its memory.

    Args:
        batches: of text that neither the model nor the store has seen, as the data module makes them.
        byte_lengths: (V,) bytes of each token.
        source_of: source number by document, to leave out hits of the reader's own source in a mode of its own.
    """
    model.eval()
    batches = list(batches)
    scored = scored_batches(model, memory, batches, source_of=source_of, seed=seed)
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    return {
        "losses": memory_losses(scored, domains, byte_lengths, **options),
        "precision": domain_precision(memory, batches, domains, **options),
        "known_item": known_item(memory, batches, **options),
        "mass": slot_mass(model, memory, batches),
        "overlap": overlap_buckets(scored, domains, byte_lengths, **options),
    }


@torch.no_grad()
def scored_batches(
    model: NanoThink,
    memory: Memory,
    batches: Iterable[Batch],
    *,
    source_of: Mapping[int, int] | None = None,
    seed: int = 0,
) -> list[Batch]:
    """Batches with what R1 and R5 are computed from, in one pass a mode.

    Each has labels, doc_uid, cluster (B, L) and domain (B,); per-token losses (B, L) under the name of each mode;
    `overlap` (B, L), see `memory_modes.overlap`: negative where a token sees no memory.
    """
    modes, scored = MemoryModes(memory, source_of, seed), []
    for index, batch in enumerate(batches):
        layout = Layout(batch["positions"], batch["segments"])
        kept = {name: batch[name] for name in ("labels", "doc_uid", "domain")}
        slots = modes.slots(batch, index)
        for name, seen in slots.items():
            kept[name] = model.token_nll(batch["tokens"], batch["labels"], layout, seen)
        assert slots["real"] is not None
        kept["overlap"] = overlap(memory, slots["real"], batch)
        scored.append(kept)
    return scored


def memory_losses(
    scored: Sequence[Batch],
    domains: Sequence[str],
    byte_lengths: ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """R1: losses by mode, and differences paired by document.

    {"modes": {mode: {loss, bits_per_byte, tokens, documents}}, "differences": {"real - none": difference, ...},
    "differences_seeing": the same over the tokens that see memory, "domains": {domain: differences},
    "helps": bool, "seeing": share of tokens}. `helps`: real memory is better than shuffled and than none.
    """
    losses = _losses(scored, domains, byte_lengths)
    options: dict[str, Any] = {"n_resamples": resamples, "seed": seed}
    differences = _differences(losses, **options)
    seeing = [_where(batch, batch["overlap"] >= 0) for batch in scored]
    labelled = [int((batch["labels"] >= 0).sum()) for batch in seeing]
    verdicts = {name: difference.verdict for name, difference in differences.items()}
    return {
        "modes": {
            name: {
                "loss": value.loss(),
                "bits_per_byte": value.bpb(),
                "tokens": int(value.num_tokens.sum()),
                "documents": len(value),
            }
            for name, value in losses.items()
        },
        "differences": differences_json(differences),
        "differences_seeing": (
            differences_json(_differences(_losses(seeing, domains, byte_lengths), **options))
            if sum(labelled)
            else {}
        ),
        "domains": {
            domain: differences_json(_differences(losses, domain=index, **options))
            for index, domain in enumerate(domains)
            if losses["none"].documents(index)
        },
        "helps": verdicts["real - shuffled"] == verdicts["real - none"] == "better",
        "seeing": sum(labelled) / int(losses["none"].num_tokens.sum()),
    }


def overlap_buckets(
    scored: Sequence[Batch],
    domains: Sequence[str],
    byte_lengths: ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """R5: {"buckets": [{low, high, tokens, documents, differences}, ...], "copying": bool or None}.

    A bucket holds the tokens whose chunk is copied from its hits to a share in (low, high]; the first shares no
    run of 8 tokens with them. `copying`: real memory beats shuffled where there is something to copy, and not
    where there is nothing; None where it beats it nowhere.
    """
    buckets, better = [], []
    for low, high in zip((-1.0, *BUCKETS[:-1]), BUCKETS, strict=True):
        # the first bucket is the share 0 itself: -1 says that a token sees no memory
        kept = [_where(b, (b["overlap"] > max(low, -0.5)) & (b["overlap"] <= high)) for b in scored]
        if not any(bool((batch["labels"] >= 0).any()) for batch in kept):
            continue
        losses = _losses(kept, domains, byte_lengths)
        differences = _differences(losses, n_resamples=resamples, seed=seed)
        counted = {"tokens": int(losses["none"].num_tokens.sum()), "documents": len(losses["none"])}
        shares = {"low": max(low, 0.0), "high": high}
        buckets.append({**shares, **counted, "differences": differences_json(differences)})
        if differences["real - shuffled"].verdict == "better":
            better.append(high)
    copying = None if not better else BUCKETS[0] not in better
    return {"buckets": buckets, "copying": copying}


@torch.no_grad()
def domain_precision(
    memory: Memory,
    batches: Iterable[Batch],
    domains: Sequence[str],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """R2: share of hits from the reader's own domain, beside the share of such records among all it may read.

    {k, queries, precision, base_rate, lift, interval: of precision - base_rate over documents,
    domains: {domain: {precision, base_rate, queries}}}; NaN becomes None where nothing was asked.
    """
    stored = memory.store.columns
    readable = Reader(splits=(SPLIT,)).readable(stored)
    counts = np.bincount(stored["domain"][readable & (stored["domain"] >= 0)], minlength=len(domains))
    base = counts / max(int(readable.sum()), 1)
    rows = []
    for batch in batches:
        slots = memory.slots(batch)
        if slots.hits is None:
            continue
        asking, groups = slots.hits.asked.nonzero(as_tuple=True)
        ids = slots.hits.ids[asking, groups]
        domain = batch["domain"][asking].numpy()
        hit = (memory.store.lookup(ids)["domain"] == domain[:, None]) & (ids >= 0).numpy()
        seen = (slots.index[asking].unsqueeze(1) == groups.view(-1, 1, 1)).squeeze(1)
        uid = batch["doc_uid"][asking, seen.int().argmax(1)].numpy()
        found = (ids >= 0).sum(1).numpy()
        rows.append(np.stack([uid, domain, hit.sum(1), found, base[domain] * found], axis=1)[found > 0])
    table = np.concatenate(rows) if rows else np.zeros((0, 5))
    return {"k": memory.retriever.k, **_precision(table), "interval": _excess(table, resamples, seed)} | {
        "domains": {
            name: _precision(table[table[:, 1] == index])
            for index, name in enumerate(domains)
            if (table[:, 1] == index).any()
        }
    }


def _precision(table: np.ndarray) -> dict[str, Any]:
    """Of rows (document, domain, hits of the domain, hits, hits expected by chance)."""
    hit, found, expected = table[:, 2:].sum(0)
    lift = hit / expected if expected else math.nan
    shares = {"precision": hit / max(found, 1), "base_rate": expected / max(found, 1), "lift": lift}
    return {"queries": len(table)} | {name: number(value) for name, value in shares.items()}


def _excess(table: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    documents, group = np.unique(table[:, 0], return_inverse=True)
    sums = np.zeros((len(documents), 2))
    np.add.at(sums, group, np.stack([table[:, 2] - table[:, 4], table[:, 3]], axis=1))
    return interval(sums, ratio, sums[:, 1], n_resamples=resamples, seed=seed)


@torch.no_grad()
def known_item(
    memory: Memory, batches: Iterable[Batch], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """R3: the first half of each document asks a store of all second halves for its own.

    The longest fragment of each document that has two chunks. {queries, mrr@10, recall@1, recall@10, chance_mrr,
    same_domain_chance_mrr, interval: of mrr@10}: chance is a random order of all halves, and of those of the
    document's domain, which is what knowing the domain alone would give.
    """
    halves = _halves(batches, 2 * memory.retriever.chunk)
    if not halves:
        return {"queries": 0}
    encoder = memory.encoder
    keys, queries = (
        torch.cat([encoder.encode(half[part][None]).cpu() for half in halves]) for part in ("second", "first")
    )
    domain = np.array([half["domain"] for half in halves])
    store = VectorStore(encoder.table.shape[1], backend="torch", near_duplicate=None)
    kept = keys.any(1) & queries.any(1)
    keys, queries, domain = keys[kept], queries[kept], domain[kept.numpy()]
    if len(keys) == 0:
        return {"queries": 0}
    store.add(keys)
    found = store.search(queries, RANKS, Reader()).ids.numpy()
    right = found == np.arange(len(found))[:, None]
    ranks = np.arange(1, found.shape[1] + 1)
    reciprocal = (right / ranks).sum(1)
    return {
        "queries": len(found),
        f"mrr@{RANKS}": float(reciprocal.mean()),
        "recall@1": float(right[:, :1].any(1).mean()),
        f"recall@{RANKS}": float(right.any(1).mean()),
        "chance_mrr": _chance(len(found)),
        "same_domain_chance_mrr": float(np.mean([_chance(int((domain == one).sum())) for one in domain])),
        "interval": mean_interval(reciprocal, np.arange(len(found)), n_resamples=resamples, seed=seed),
    }


def _chance(items: int) -> float:
    """Mean reciprocal rank, counted to RANKS, of a random order of so many items."""
    return float((1 / np.arange(1, min(RANKS, items) + 1)).sum() / items)


def _halves(batches: Iterable[Batch], least: int) -> list[dict[str, Any]]:
    """First and second half of the longest fragment of each document, of at least `least` tokens."""
    longest: dict[int, dict[str, Any]] = {}
    for batch in batches:
        segments = batch["segments"]
        for row in range(len(segments)):
            fragments = segments[row][segments[row] >= 0].unique()
            for fragment in fragments.tolist():
                columns = (segments[row] == fragment).nonzero().flatten()
                uid, length = int(batch["doc_uid"][row, columns[0]]), len(columns)
                if length < least or length <= longest.get(uid, {"length": 0})["length"]:
                    continue
                tokens = batch["tokens"][row, columns]
                half = length // 2
                parts = {"first": tokens[:half], "second": tokens[half:]}
                longest[uid] = {**parts, "domain": int(batch["domain"][row]), "length": length}
    return [longest[uid] for uid in sorted(longest)]


@torch.no_grad()
def slot_mass(model: NanoThink, memory: Memory, batches: Iterable[Batch]) -> dict[str, Any]:
    """R4: attention of the tokens that see memory: {slots, null, tokens, heads: [{slots, null}, ...]}."""
    sums: Tensor | float = 0.0
    tokens = 0
    if model.mla is None:
        raise ValueError("a model reads memory in its mla, and this one has none")
    for batch in batches:
        slots = memory.slots(batch)
        seeing = slots.index >= 0
        if not bool(seeing.any()):
            continue
        layout = Layout(batch["positions"], batch["segments"])
        mass = model.mla.slot_mass(model.embedding(batch["tokens"]), layout, slots)
        sums = sums + torch.stack([part.transpose(0, 1)[:, seeing].double().sum(1) for part in mass])
        tokens += int(seeing.sum())
    if not isinstance(sums, Tensor):
        return {"slots": None, "null": None, "tokens": 0, "heads": []}
    real, null = (sums / tokens).tolist()
    heads = [{"slots": a, "null": b} for a, b in zip(real, null, strict=True)]
    return {"slots": float(np.mean(real)), "null": float(np.mean(null)), "tokens": tokens, "heads": heads}


@torch.no_grad()
def retrieval_cost(
    model: NanoThink, memory: Memory, batch: Batch, model_flops: float, *, repeats: int = 5
) -> dict[str, Any]:
    """What memory costs a token of `batch`, in time on this machine and in arithmetic.

    {"records", "ms_per_token": {off, search, on}, "flops_per_token": {model, search, slots, share}}. `on` includes
    the search; times are the best of `repeats`. search: one product of the query with every key, once a chunk
    (2 records d / chunk; exact indexes only). slots: projections of k values a chunk, scores and mixing of k + 1
    slots a token, at least. share: both over the model's own.

    model_flops: of a token without memory, multiplications and additions counted apart.
    """
    layout, tokens = Layout(batch["positions"], batch["segments"]), int((batch["segments"] >= 0).sum())
    slots = memory.slots(batch)

    def forward(seen: Any) -> None:
        model(batch["tokens"], layout, seen, with_logits=False)

    timed = {
        "off": lambda: forward(None),
        "search": lambda: memory.slots(batch),
        "on": lambda: forward(memory.slots(batch)),
    }
    chunk, k, d = memory.retriever.chunk, memory.retriever.k, memory.store.d_model
    asked = int(slots.hits.asked.sum()) / tokens if slots.hits is not None else 0.0
    search = 2.0 * len(memory.store) * d * asked
    seeing = int((slots.index >= 0).sum()) / tokens
    read = seeing * (k + 1) * 4.0 * d + asked * k * 4.0 * d * d
    return {
        "records": len(memory.store),
        "chunk": chunk,
        "ms_per_token": {name: _best(call, repeats) / tokens for name, call in timed.items()},
        "flops_per_token": {
            "model": float(model_flops),
            "search": search,
            "slots": read,
            "share": (search + read) / model_flops,
        },
    }


def equal_compute(losses: Mapping[str, Any], cost: Mapping[str, Any]) -> dict[str, float]:
    """A213, the figures side by side: loss and FLOPs a token with memory off and on.

    losses: of `memory_losses`; cost: of `retrieval_cost`. `nats_per_gflop`: what the loss falls by a GFLOP more a
    token, to set beside what a larger model gains by the same.
    """
    off, on = (losses["modes"][name]["loss"] for name in ("none", "real"))
    flops = cost["flops_per_token"]
    more = flops["search"] + flops["slots"]
    return {
        "loss_off": off,
        "loss_on": on,
        "flops_off": flops["model"],
        "flops_on": flops["model"] + more,
        "nats_per_gflop": (off - on) / (more / 1e9) if more else 0.0,
    }


def _best(call: Any, repeats: int) -> float:
    """Milliseconds of the fastest of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def _losses(
    scored: Sequence[Batch], domains: Sequence[str], byte_lengths: ArrayLike
) -> dict[str, DocumentLosses]:
    kept = ("labels", "doc_uid", "domain", "overlap")
    modes = {name: itemgetter(name) for name in scored[0] if name not in kept}
    return evaluate_models(modes, scored, byte_lengths, len(domains))


def _where(batch: Batch, chosen: Tensor) -> Batch:
    """The batch with a label only where `chosen` (B, L)."""
    return {**batch, "labels": batch["labels"].masked_fill(~chosen, -100)}


def _differences(
    losses: Mapping[str, DocumentLosses], domain: int | None = None, **options: Any
) -> dict[str, Difference]:
    """What can be said of the modes, by name "a - b"; negative: a is better."""
    pairs = [("real", "none"), ("real", "shuffled"), ("real", "random"), ("shuffled", "none")]
    pairs += [(name, "none") for name in losses if name not in ("none", "real", "shuffled", "random")]
    return {f"{a} - {b}": paired_difference(losses[a], losses[b], domain=domain, **options) for a, b in pairs}


def differences_json(differences: Mapping[str, Difference]) -> dict[str, dict[str, Any]]:
    """By name {estimate, low, high, documents, verdict}, None for NaN."""
    return {name: plain(value) | {"verdict": value.verdict} for name, value in differences.items()}
