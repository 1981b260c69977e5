from __future__ import annotations

import json
import shutil

import pytest
import torch

from nano_think.artifacts.memory import build_memory, fused_hidden, load_memory, memory_leaks, save_memory
from nano_think.errors import UserError
from nano_think.ops.layout import Layout
from nano_think.vector_records import Reader

CHUNK = 8
STORE = {"backend": "torch", "capacity": 10_000}


@pytest.fixture
def rows(data):
    return list(data(batch_size=4).dataloader("expert_train", rows=20))


@pytest.fixture
def network(fused, randomise):
    """Every parameter is noise: no zero initialisation hides the path from slots to logits."""
    return randomise(fused(), scale=0.6).eval()


@pytest.fixture
def memory(network, rows):
    return build_memory(network, rows, {"k": 2, "chunk": CHUNK, "granularity": "chunk"}, STORE)


def test_one_record_for_each_chunk_that_something_follows(memory, rows):
    """Every stored passage is such a chunk of the text; repeated passages of a document are stored once."""
    passages = set()
    for row in rows:
        follows = torch.zeros_like(row["segments"], dtype=torch.bool)
        follows[:, :-1] = (row["segments"][:, 1:] == row["segments"][:, :-1]) & (row["segments"][:, 1:] >= 0)
        ends = ((row["positions"] + 1) % CHUNK == 0) & follows
        for b, t in ends.nonzero().tolist():
            passages.add((int(row["doc_uid"][b, t]), *row["tokens"][b, t - CHUNK + 1 : t + 1].tolist()))
    stored = memory.store.lookup(torch.arange(len(memory.store)))
    found = {(int(u), *t) for u, t in zip(stored["doc_uid"], stored["tokens"].tolist(), strict=True)}
    assert found <= passages
    assert len(memory.store) == memory.figures["records"] > 0.8 * len(passages)
    assert memory.figures["tokens"] == sum(int((row["segments"] >= 0).sum()) for row in rows)


def test_values_are_what_the_model_says_in_the_chunk_after(memory, network, rows):
    row = rows[0]
    layout = Layout(row["positions"], row["segments"])
    stored = memory.store.lookup(torch.arange(len(memory.store)))
    places = [
        (b, t, record)
        for record, (uid, offset) in enumerate(zip(stored["doc_uid"], stored["token_offset"], strict=True))
        for b, t in ((row["doc_uid"] == int(uid)) & (row["positions"] == int(offset))).nonzero().tolist()
        if row["tokens"][b, t : t + CHUNK].tolist() == stored["tokens"][record].tolist()
    ]
    b, t, record = places[0]
    after = slice(t + CHUNK, t + 2 * CHUNK)
    same = row["segments"][b, after] == row["segments"][b, t]
    with torch.no_grad():
        said = fused_hidden(network, row["tokens"], layout)[b, after][same].mean(0)
    block = torch.as_tensor(stored["tokens"][record]).long().unsqueeze(0)
    found = memory.store.search(memory.encoder.encode(block), len(memory.store), Reader())
    place = found.ids[0].tolist().index(record)
    torch.testing.assert_close(found.values[0, place], said, rtol=2e-3, atol=2e-3)


def test_an_exact_stored_passage_is_its_own_top_hit_unless_it_is_ones_own(memory):
    stored = memory.store.lookup(torch.arange(len(memory.store)))
    tokens = torch.as_tensor(stored["tokens"]).long()
    found = memory.store.search(memory.encoder.encode(tokens), 1, Reader())
    torch.testing.assert_close(found.scores[:, 0], torch.ones(len(tokens)), rtol=0, atol=1e-5)
    hits = torch.as_tensor(memory.store.lookup(found.ids[:, 0])["tokens"]).long()
    # a mean forgets the order of tokens: the hit is the passage or an anagram of it
    assert torch.equal(hits.sort(1).values, tokens.sort(1).values)
    ids = {name: torch.as_tensor(stored[name]) for name in ("doc_uid", "cluster")}
    others = memory.store.search(memory.encoder.encode(tokens), 1, Reader(**ids))
    assert not bool((memory.store.lookup(others.ids[:, 0])["doc_uid"] == stored["doc_uid"]).any())


def test_store_on_and_off_give_different_logits_and_an_empty_one_the_same(memory, network, fused, data):
    batch = next(iter(data(batch_size=4).dataloader("validation")))
    layout = Layout(batch["positions"], batch["segments"])
    with torch.no_grad():
        off = network(batch["tokens"], layout).logits
        on = network(batch["tokens"], layout, memory.slots(batch)).logits
        nothing = network(batch["tokens"], layout, memory.slots(batch).dropped(torch.zeros(4).bool())).logits
    seen = memory.slots(batch).index >= 0
    assert bool(seen.any())
    assert float((on - off).abs()[seen].max()) > 1e-3
    assert torch.equal(nothing, off)


def test_round_trip_keeps_slots_bit_for_bit(memory, data, tmp_path):
    save_memory(memory, tmp_path / "memory")
    loaded = load_memory(tmp_path / "memory")
    batch = next(iter(data(batch_size=4).dataloader("validation")))
    one, other = memory.slots(batch), loaded.slots(batch)
    assert bool(one.valid.any())
    for name in ("values", "valid", "index"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.hits.ids, other.hits.ids)
    assert loaded.figures == memory.figures
    assert (loaded.retriever.k, loaded.retriever.chunk) == (2, CHUNK)


def test_no_memory_and_damaged_memory(memory, tmp_path):
    assert load_memory(tmp_path / "nowhere") is None
    save_memory(memory, tmp_path / "memory")
    (tmp_path / "memory" / "encoder.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="missing or damaged"):
        load_memory(tmp_path / "memory")
    save_memory(memory, tmp_path / "memory")
    (tmp_path / "memory" / "settings.json").write_text("{")
    with pytest.raises(UserError, match="memory is damaged"):
        load_memory(tmp_path / "memory")


def test_leaky_settings_stay_with_a_memory_and_are_told_without_its_store(memory, network, rows, tmp_path):
    assert memory_leaks(tmp_path / "nowhere") == []
    leaky = {"k": 2, "chunk": CHUNK, "granularity": "sequence", "write_on_read": True}
    for retrieval in ({"k": 2, "chunk": CHUNK}, leaky):
        made = build_memory(network, rows[:2], retrieval, STORE)
        save_memory(made, tmp_path / "memory")
        loaded = load_memory(tmp_path / "memory")
        shutil.rmtree(tmp_path / "memory" / "store")
        assert memory_leaks(tmp_path / "memory") == made.leaks == loaded.leaks
        assert len(made.leaks) == (2 if retrieval is leaky else 0)
    settings = tmp_path / "memory" / "settings.json"
    settings.write_text(json.dumps({"retrieval": {"k": 2, "chunk": CHUNK, "granularity": "chunk"}}))
    assert memory_leaks(tmp_path / "memory") == []


def test_building_twice_gives_the_same_memory(memory, network, rows, data):
    again = build_memory(network, rows, {"k": 2, "chunk": CHUNK, "granularity": "chunk"}, STORE)
    batch = next(iter(data(batch_size=4).dataloader("validation")))
    assert torch.equal(memory.slots(batch).values, again.slots(batch).values)
    assert memory.encoder.fingerprint() == again.encoder.fingerprint()


def test_slots_of_a_batch_never_come_from_its_own_documents(memory, rows):
    for row in rows:
        slots = memory.slots(row)
        for b, groups in enumerate(slots.hits.ids):
            for u, ids in enumerate(groups):
                readers = row["doc_uid"][b][slots.index[b] == u].unique().tolist()
                found = memory.store.lookup(ids[ids >= 0])["doc_uid"].tolist()
                assert not set(readers) & set(found)
    assert any(bool((memory.slots(row).hits.ids >= 0).any()) for row in rows)


def test_a_memory_asked_at_every_token_finds_what_came_next_elsewhere(network, rows):
    memory = build_memory(network, rows, {"k": 2, "chunk": 3, "granularity": "token"}, STORE)
    followed = sum(int(((row["labels"] >= 0) & (row["segments"] >= 0)).sum()) for row in rows)
    # the last column of a row has a label and no next token in the batch
    assert 0.9 * followed < len(memory.store) == memory.figures["records"] <= followed
    stored = memory.store.columns
    batch = rows[0]
    slots = memory.slots(batch)
    for b, t in [(0, 5), (1, 17), (2, 30)]:
        group = int(slots.index[b, t])
        hits, valid = slots.hits.ids[b, group], slots.valid[b, group]
        # never of the reader's own document, and the value is the embedding of a token of the table
        assert valid.any()
        assert not (stored["doc_uid"][hits[valid]] == int(batch["doc_uid"][b, t])).any()
        same = slots.values[b, group][valid].unsqueeze(1) == memory.encoder.table
        assert same.all(-1).any(-1).all()
    one = batch["tokens"].clone()
    one[:, 20:] = 7
    changed = memory.slots({**batch, "tokens": one})
    assert torch.equal(slots.hits.ids[:, :15], changed.hits.ids[:, :15])
