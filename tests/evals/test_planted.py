"""Planted facts: recalled by a reader made to, not by one that looks away, and seen by nobody too early."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nano_think.artifacts.memory import Memory
from nano_think.chunks import ChunkEncoder
from nano_think.evals.planted import _asked, _telling, invented_facts, planted_facts
from nano_think.mla import MultiHeadLatentAttention
from nano_think.model import NanoThink
from nano_think.vector_store import VectorStore

CHUNK = 32


class Same(nn.Module):
    """An expert that says what it is given."""

    def forward(self, context: Tensor, layout: object) -> Tensor:
        return context


def table(vocab_size: int) -> Tensor:
    """A direction of its own for every token, of an even width."""
    return torch.eye(vocab_size, vocab_size + vocab_size % 2)


def reading(vocab_size: int, bias: float) -> NanoThink:
    """context = e + mean of the normed slots / 2: attention sees nothing in tokens, and slots at a high bias."""
    d_model = table(vocab_size).shape[1]
    mla = MultiHeadLatentAttention(d_model, num_heads=1, kv="full", memory=True, slot_bias=bias)
    model = NanoThink({"same": Same()}, vocab_size, d_model, mla=mla)
    with torch.no_grad():
        model.embedding.weight.copy_(table(vocab_size))
        mla.norm.weight.zero_()
        mla.attention.heads.v_proj.weight.copy_(torch.eye(d_model))
        mla.attention.out_proj.weight.copy_(torch.eye(d_model) / 2)
        mla.attention.slots.null.zero_()
    return model.eval()


def blank_memory(vocab_size: int) -> Memory:
    encoder = ChunkEncoder.mean_of(table(vocab_size))
    d_model = encoder.table.shape[1]
    store = VectorStore(d_model, chunk=CHUNK, backend="torch", fingerprint=encoder.fingerprint())
    store.add(torch.eye(d_model)[:5])
    return Memory.over(store, encoder, {"k": 1, "chunk": CHUNK}, {})


def test_a_reader_of_memory_recalls_and_one_that_looks_away_does_not(byte_tokenizer):
    memory = blank_memory(byte_tokenizer.vocab_size)
    found = planted_facts(
        reading(byte_tokenizer.vocab_size, 20.0), memory, byte_tokenizer, count=16, resamples=200
    )
    assert found["recalls"]
    assert found["retrieved"] == 1.0
    assert found["modes"]["own"]["loss"] < found["modes"]["shuffled"]["loss"]
    blind = planted_facts(
        reading(byte_tokenizer.vocab_size, -40.0), memory, byte_tokenizer, count=16, resamples=200
    )
    assert not blind["recalls"]
    assert blind["modes"]["own"]["loss"] == pytest.approx(blind["modes"]["off"]["loss"], abs=1e-6)
    assert len(memory.store) == 5
    assert memory.store.generation == 0


def test_what_was_told_is_seen_behind_the_cue_alone(byte_tokenizer):
    model, memory = reading(byte_tokenizer.vocab_size, 20.0), blank_memory(byte_tokenizer.vocab_size)
    facts = invented_facts(byte_tokenizer, 5, CHUNK)
    batch = _asked(facts, byte_tokenizer.pad_id)
    with _telling(memory, model, facts, session=7) as reader:
        slots = memory.retriever.retrieve(batch["tokens"], reader=reader)
    with torch.no_grad():
        on, off = model(batch["tokens"], memory=slots).logits, model(batch["tokens"]).logits
    assert torch.equal(on[:, :CHUNK], off[:, :CHUNK])
    assert not torch.equal(on[:, CHUNK:], off[:, CHUNK:])
    # the answer lies behind the first token that sees memory
    assert (batch["first"] >= CHUNK).all()


def test_facts_are_many_different_and_the_same_for_a_seed(byte_tokenizer):
    facts = invented_facts(byte_tokenizer, 100, CHUNK, seed=3)
    assert facts == invented_facts(byte_tokenizer, 100, CHUNK, seed=3)
    assert len({tuple(fact.cue) for fact in facts}) == 100
    assert {len(fact.cue) for fact in facts} == {CHUNK}
    assert facts[0].told[: len(facts[0].asked)] == facts[0].asked
    batch = _asked(facts, byte_tokenizer.pad_id)
    row = 17
    labels = batch["labels"][row]
    assert labels[labels >= 0].tolist() == facts[row].answer
    first = int(batch["first"][row])
    assert batch["tokens"][row, : first + 1].tolist() == facts[row].cue + facts[row].stem
