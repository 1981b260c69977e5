"""R1 to R5 on text whose answers are known: topics that a memory must help with, and a reader made by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nano_think.artifacts.memory import Memory
from nano_think.chunks import ChunkEncoder, chunk_records
from nano_think.evals.memory_modes import (
    OTHER_SOURCES,
    Groups,
    MemoryModes,
    common_run,
    hit_texts,
    overlap,
)
from nano_think.evals.retrieval_evidence import (
    domain_precision,
    equal_compute,
    known_item,
    memory_losses,
    overlap_buckets,
    retrieval_cost,
    retrieval_evidence,
    scored_batches,
    slot_mass,
)
from nano_think.mla import MultiHeadLatentAttention
from nano_think.model import NanoThink
from nano_think.vector_records import Reader
from nano_think.vector_store import VectorStore

TOPICS, WORDS, CHUNK = 12, 4, 8
VOCAB = TOPICS * WORDS
DOMAINS = ["low", "high"]


class Same(nn.Module):
    """An expert that says what it is given."""

    def forward(self, context: Tensor, layout: object) -> Tensor:
        return context


def hand_made(bias: float = 20.0, gain: float = 0.5) -> NanoThink:
    """context = e + gain x mean of the normed slots: attention that sees nothing in tokens, all slots alike."""
    mla = MultiHeadLatentAttention(VOCAB, num_heads=1, kv="full", memory=True, slot_bias=bias)
    model = NanoThink({"same": Same()}, VOCAB, VOCAB, mla=mla)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.eye(VOCAB))
        mla.norm.weight.zero_()
        mla.attention.heads.v_proj.weight.copy_(torch.eye(VOCAB))
        mla.attention.out_proj.weight.copy_(gain * torch.eye(VOCAB))
        mla.attention.slots.null.zero_()
    return model.eval()


def documents(topics: list[int], chunks: int = 3, seed: int = 0, first_uid: int = 0) -> dict[str, Tensor]:
    """A batch, one document a row: words of its topic alone. The domain is the half that the topic lies in."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.tensor(topics)[:, None]
    tokens = topic * WORDS + torch.randint(WORDS, (len(topics), chunks * CHUNK), generator=generator)
    uid = (first_uid + torch.arange(len(topics)))[:, None].expand_as(tokens)
    labels = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], -100)), dim=1)
    batch = {"tokens": tokens, "labels": labels, "doc_uid": uid, "cluster": uid + 1000}
    batch |= {
        "positions": torch.arange(tokens.shape[1]).expand_as(tokens),
        "segments": torch.zeros_like(tokens),
    }
    return batch | {"domain": (topic[:, 0] >= TOPICS // 2).long()}


def memory_of(
    stored: dict[str, Tensor], values: Callable[[Tensor], Tensor] | None = None, k: int = 2
) -> Memory:
    """A memory over the chunks of a batch, whose values are mean embeddings of what follows."""
    table = torch.eye(VOCAB)
    encoder = ChunkEncoder.mean_of(table)
    ids = {name: stored[name] for name in ("doc_uid", "cluster", "domain")}
    hidden = (values or table.__getitem__)(stored["tokens"])
    records = chunk_records(encoder, stored["tokens"], hidden, chunk=CHUNK, split="expert_train", **ids)
    store = VectorStore(
        VOCAB, chunk=CHUNK, backend="torch", near_duplicate=None, fingerprint=encoder.fingerprint()
    )
    store.add(records.keys, records.values, **records.meta)
    return Memory.over(store, encoder, {"k": k, "chunk": CHUNK}, {})


@pytest.fixture(scope="module")
def stored() -> Memory:
    return memory_of(documents([*range(TOPICS), *range(TOPICS)], seed=1, first_uid=100))


@pytest.fixture(scope="module")
def readers() -> list[dict[str, Tensor]]:
    return [documents(list(range(TOPICS)), seed=seed, first_uid=1000 * seed) for seed in (2, 3)]


def test_memory_that_must_help_does_and_another_documents_does_not(stored, readers):
    found = retrieval_evidence(hand_made(), stored, readers, DOMAINS, [1] * VOCAB, resamples=200)
    losses = found["losses"]
    verdicts = {name: one["verdict"] for name, one in losses["differences"].items()}
    assert verdicts["real - none"] == verdicts["real - shuffled"] == verdicts["real - random"] == "better"
    assert verdicts["shuffled - none"] != "better"
    assert losses["helps"]
    assert losses["modes"]["real"]["tokens"] == 2 * TOPICS * (3 * CHUNK - 1)
    assert losses["seeing"] == pytest.approx((2 * CHUNK - 1) / (3 * CHUNK - 1))
    # all that memory changes happens where it is seen
    whole, seeing = losses["differences"]["real - none"], losses["differences_seeing"]["real - none"]
    assert whole["estimate"] == pytest.approx(seeing["estimate"] * losses["seeing"])
    assert set(losses["domains"]) == set(DOMAINS)
    assert found["precision"]["precision"] == 1.0
    # the two documents of a topic ask for either's half
    assert found["known_item"]["mrr@10"] >= 1 / 2 > found["known_item"]["same_domain_chance_mrr"]
    assert found["known_item"]["recall@10"] == 1.0
    assert found["mass"]["slots"] == pytest.approx(2 / 3, abs=1e-4)


@pytest.mark.parametrize("silent", ["values that say nothing", "a model that looks away"])
def test_memory_that_cannot_help_is_not_said_to(readers, silent):
    text = documents([*range(TOPICS)], seed=1, first_uid=100)
    if silent == "a model that looks away":
        model, memory = hand_made(bias=-30.0), memory_of(text)
    else:
        model, memory = hand_made(), memory_of(text, values=lambda tokens: torch.ones(*tokens.shape, VOCAB))
    scored = scored_batches(model, memory, readers)
    found = memory_losses(scored, DOMAINS, [1] * VOCAB, resamples=200)
    assert not found["helps"]
    assert found["differences"]["real - shuffled"]["verdict"] == "not distinguishable"
    assert overlap_buckets(scored, DOMAINS, [1] * VOCAB, resamples=200)["copying"] is None


def test_without_any_memory_all_modes_are_the_same(readers):
    empty = memory_of(documents([0], chunks=1))
    assert len(empty.store) == 0
    found = retrieval_evidence(hand_made(), empty, readers, DOMAINS, [1] * VOCAB, resamples=50)
    assert len({mode["loss"] for mode in found["losses"]["modes"].values()}) == 1
    assert (found["losses"]["seeing"], found["losses"]["differences_seeing"]) == (0.0, {})
    assert found["precision"]["queries"] == found["mass"]["tokens"] == 0
    assert found["overlap"] == {"buckets": [], "copying": None}


def test_shuffled_hits_are_of_another_document_of_the_domain_and_random_ones_of_any(stored, readers):
    modes = MemoryModes(stored, source_of={}).slots(readers[0], number=5)
    real, groups = modes["real"], Groups.of(modes["real"])
    assert len(groups.rows) == 2 * TOPICS
    value = real.values.argmax(-1) // WORDS
    topic = torch.arange(TOPICS)[groups.rows]
    there = groups.rows, groups.groups
    assert (value[there] == topic[:, None]).all()
    shuffled = modes["shuffled"].values.argmax(-1)[there] // WORDS
    assert (shuffled != topic[:, None]).all()
    assert (shuffled // (TOPICS // 2) == topic[:, None] // (TOPICS // 2)).all()
    random = modes["random"].values.argmax(-1)[there] // WORDS
    assert len(random.unique()) > TOPICS // 2
    for mode in ("shuffled", "random", OTHER_SOURCES):
        assert torch.equal(modes[mode].valid, real.valid)
        assert torch.equal(modes[mode].index, real.index)
    again = MemoryModes(stored).slots(readers[0], number=5)
    assert torch.equal(again["random"].values, modes["random"].values)
    other = MemoryModes(stored).slots(readers[0], number=6)
    assert not torch.equal(other["random"].values, modes["random"].values)


def test_no_mode_shows_a_reader_its_own_document_or_source():
    text = documents(list(range(TOPICS)), seed=1)
    memory = memory_of(text)
    # each reader lies in the store: without itself it finds other topics, in every mode
    modes = MemoryModes(memory, source_of={uid: uid // 2 for uid in range(TOPICS)}).slots(text)
    groups = Groups.of(modes["real"])
    there = groups.rows, groups.groups
    for mode in ("real", "shuffled", "random", OTHER_SOURCES):
        slots = modes[mode]
        topic = slots.values.argmax(-1)[there] // WORDS
        assert (topic != groups.rows[:, None])[slots.valid[there]].all(), mode
    ids = modes["real"].hits.ids[there]
    source = torch.from_numpy(memory.store.lookup(ids)["doc_uid"]) // 2
    kept = modes[OTHER_SOURCES].valid[there]
    assert torch.equal(kept, source != groups.rows[:, None] // 2)
    assert not kept.all()


def test_a_document_alone_in_its_batch_gets_no_shuffled_memory(stored):
    slots = MemoryModes(stored).slots(documents([4]))["shuffled"]
    assert not slots.valid.any()
    assert slots.empty


def test_precision_is_measured_against_what_may_be_read():
    # 3 documents of the low half and 1 of the high: a quarter of the records is of the high domain
    memory = memory_of(documents([0, 1, 2, 7], seed=1, first_uid=100), k=4)
    # a reader of topic 7 finds its two records, and two of the other domain behind them
    found = domain_precision(memory, [documents([7, 0], chunks=2)], DOMAINS, resamples=50)
    assert found["domains"]["high"] == {"queries": 1, "precision": 0.5, "base_rate": 0.25, "lift": 2.0}
    assert found["domains"]["low"]["base_rate"] == 0.75
    assert found["queries"] == 2
    expected = (2 / 4 + found["domains"]["low"]["precision"] - 1) / 2
    assert found["interval"]["estimate"] == pytest.approx(expected)


def test_mean_reciprocal_rank_by_hand():
    a, b, c = 0, 1, 2 * WORDS
    first = torch.tensor([[a] * 8, [a] * 6 + [b] * 2, [c] * 8])
    second = torch.tensor([[a] * 8, [b] * 8, [c] * 8])
    batch = documents([0, 0, 7], chunks=2) | {"tokens": torch.cat((first, second), dim=1)}
    # the second document finds the first one's half before its own
    found = known_item(memory_of(documents([0])), [batch], resamples=200)
    assert found["queries"] == 3
    assert found["mrr@10"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert found["recall@1"] == pytest.approx(2 / 3)
    assert found["recall@10"] == 1.0
    assert found["chance_mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert found["same_domain_chance_mrr"] == pytest.approx((0.75 + 0.75 + 1) / 3)
    assert found["interval"]["low"] >= 1 / 2
    assert known_item(memory_of(documents([0])), [documents([0], chunks=1)]) == {"queries": 0}


def test_known_item_asks_with_the_longest_fragment_of_a_document_once():
    batch = documents([1, 1, 2], chunks=3)
    batch["doc_uid"] = torch.tensor([[5], [5], [6]]).expand_as(batch["tokens"])
    batch["segments"] = batch["segments"].clone()
    batch["segments"][0, 2 * CHUNK :] = -1  # the shorter fragment of document 5
    assert known_item(memory_of(documents([0])), [batch])["queries"] == 2


def test_longest_common_run_equals_a_search_over_all_runs():
    generator = torch.Generator().manual_seed(0)
    chunk = torch.randint(3, (6, 7), generator=generator)
    texts = torch.randint(3, (6, 2, 9), generator=generator)
    chunk[2, 4:], texts[3, 1, 2:] = -1, -1

    def longest(one: list[int], others: list[list[int]]) -> int:
        runs = [one[i:j] for i, j in itertools.combinations(range(len(one) + 1), 2) if -1 not in one[i:j]]
        return max(
            (len(r) for r in runs for o in others if any(o[s : s + len(r)] == r for s in range(len(o)))),
            default=0,
        )

    expected = [longest(c, t) for c, t in zip(chunk.tolist(), texts.tolist(), strict=True)]
    assert common_run(chunk, texts).tolist() == expected
    assert common_run(torch.full((1, 4), -1), torch.full((1, 2, 5), -1)).tolist() == [0]


def test_overlap_counts_runs_of_eight_in_hits_and_in_what_follows_them():
    text = documents([3], chunks=3, seed=1, first_uid=100)
    memory = memory_of(text, k=1)
    reader = documents([3], chunks=3, seed=2)
    reader["tokens"] = text["tokens"].clone()
    slots = memory.slots(reader)
    # the first two chunks are stored; the third is in no record, and what follows it neither
    assert hit_texts(memory, slots.hits.ids)[0, 0, 0].tolist() == text["tokens"][0, : 2 * CHUNK].tolist()
    assert hit_texts(memory, slots.hits.ids)[0, 1, 0, CHUNK:].tolist() == [-1] * CHUNK
    share = overlap(memory, slots, reader)[0]
    assert (share[:CHUNK] == -1).all()
    assert (share[CHUNK : 2 * CHUNK] == 1).all()
    assert (share[2 * CHUNK :] == 0).all()
    reader["tokens"][0, CHUNK] = VOCAB - 1  # a run of seven is left
    assert (overlap(memory, memory.slots(reader), reader)[0, CHUNK : 2 * CHUNK] == 0).all()


def scored_by_hand(gain_without: float, gain_with: float) -> list[dict[str, Tensor]]:
    """Twelve documents of 8 tokens: 4 see nothing to copy, 4 are copied, and memory lowers losses by so much."""
    share = torch.tensor([-1.0] * 2 + [0.0] * 3 + [0.6] * 3).expand(12, 8)
    noise = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).mul(0.01)
    gain = torch.where(share == 0, gain_without, torch.where(share > 0, gain_with, 0.0))
    uid = torch.arange(12)[:, None].expand(12, 8)
    batch = {"labels": torch.ones_like(uid), "doc_uid": uid, "domain": torch.zeros(12, dtype=torch.int64)}
    losses = {"none": torch.full((12, 8), 3.0), "shuffled": 3 + noise, "random": torch.full((12, 8), 3.0)}
    return [batch | losses | {"real": 3 + noise - gain, "overlap": share}]


@pytest.mark.parametrize(
    ("gains", "copying"), [((0.0, 0.5), True), ((0.5, 0.5), False), ((0.5, 0.0), False), ((0.0, 0.0), None)]
)
def test_gain_where_there_is_something_to_copy_alone_is_copying(gains, copying):
    found = overlap_buckets(scored_by_hand(*gains), ["all"], [1, 1], resamples=200)
    assert found["copying"] is copying
    low, high = found["buckets"]
    assert (low["low"], low["high"], low["tokens"]) == (0.0, 0.0, 36)
    assert (high["low"], high["high"], high["documents"]) == (0.5, 1.0, 12)
    for bucket, gain in zip((low, high), gains, strict=True):
        assert bucket["differences"]["real - shuffled"]["estimate"] == pytest.approx(-gain, abs=1e-6)


def test_attention_on_slots_by_hand(stored, readers):
    # uniform scores: position p sees p + 1 tokens at weight 1, two slots and the null slot at weight e
    found = slot_mass(hand_made(bias=1.0), stored, readers)
    weights = [math.e / (p + 1 + 3 * math.e) for p in range(CHUNK, 3 * CHUNK)]
    mean = sum(weights) / len(weights)
    assert found["slots"] == pytest.approx(2 * mean, rel=1e-5)
    assert found["null"] == pytest.approx(mean, rel=1e-5)
    assert found["tokens"] == 2 * TOPICS * 2 * CHUNK
    assert found["heads"] == [{"slots": found["slots"], "null": found["null"]}]


def test_cost_is_the_arithmetic_of_search_and_slots(stored, readers):
    cost = retrieval_cost(hand_made(), stored, readers[0], model_flops=1e6, repeats=1)
    # two of three chunks ask, each of all records, and their tokens see two slots and the null slot
    assert cost["records"] == len(stored.store) == 4 * TOPICS
    flops = cost["flops_per_token"]
    assert flops["search"] == pytest.approx(2 * len(stored.store) * VOCAB * 2 / (3 * CHUNK))
    assert flops["slots"] == pytest.approx(2 / 3 * 3 * 4 * VOCAB + 2 / (3 * CHUNK) * 2 * 4 * VOCAB**2)
    assert flops["share"] == pytest.approx((flops["search"] + flops["slots"]) / 1e6)
    assert all(value > 0 for value in cost["ms_per_token"].values())
    losses = {"modes": {"none": {"loss": 3.0}, "real": {"loss": 2.5}}}
    figures = equal_compute(losses, cost)
    assert figures["flops_on"] - figures["flops_off"] == pytest.approx(flops["search"] + flops["slots"])
    assert figures["nats_per_gflop"] == pytest.approx(0.5e9 / (flops["search"] + flops["slots"]))


def test_records_are_drawn_of_those_that_may_be_read_and_each_once(stored):
    uid = torch.tensor([100, -1, 101])
    hits = stored.store.draw(3, 5, Reader(doc_uid=uid), seed=1)
    drawn = stored.store.lookup(hits.ids)["doc_uid"]
    assert not (drawn == uid.numpy()[:, None]).any()
    assert all(len(set(row)) == 5 for row in hits.ids.tolist())
    everything = stored.store.draw(1, 1000, Reader(doc_uid=uid[:1]))
    assert int(everything.valid.sum()) == len(stored.store) - 2
    assert not stored.store.draw(2, 3, Reader(splits=("test",))).valid.any()
    assert stored.store.columns["doc_uid"].shape == (len(stored.store),)
