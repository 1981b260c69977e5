"""The reader with parameters of its own, against a loop over tokens; what it leaves alone, bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nano_think.evals.audit.live import filled_memory
from nano_think.evals.audit.plan import Plan
from nano_think.evals.audit.run import audit
from nano_think.experts.transformer import TransformerExpert
from nano_think.mla import MultiHeadLatentAttention
from nano_think.model import NanoThink
from nano_think.nn.flops import Reach, products_of
from nano_think.nn.mixers.latent_attention import LatentAttention
from nano_think.ops.layout import Layout
from nano_think.retrieval import MemorySlots
from nano_think.tasks.route import set_trainable

INDEX = torch.tensor([[-1, -1, 0, 0, 1, 1], [-1, -1, -1, 0, 0, -1]])
D, H, K = 12, 3, 3


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noisy(module: nn.Module, std: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return module


def slots(index: Tensor = INDEX) -> MemorySlots:
    shape = (len(index), 2, K)
    valid = torch.ones(shape, dtype=torch.bool)
    valid[:, 1, 2] = False
    return MemorySlots(noise(*shape, D, seed=7), valid, index, scores=noise(*shape, seed=8).tanh())


@pytest.fixture
def attention() -> LatentAttention:
    return noisy(LatentAttention(D, H, memory=True, slot_reader="own"))


def test_reading_apart_equals_the_formula_token_by_token(attention):
    x, memory, reader = noise(2, 6, D), slots(), attention.slots
    rows = torch.zeros(2, 6, D)
    for b, t in (INDEX >= 0).nonzero().tolist():
        group, mixed = int(INDEX[b, t]), []
        values = reader.norm(memory.values[b, group])
        for h in range(H):
            part = slice(h * D // H, (h + 1) * D // H)
            q = (reader.q_proj.weight @ x[b, t])[part]
            scores = [
                q @ (reader.k_proj.weight @ values[j])[part] / math.sqrt(D // H)
                + reader.temperature[h] * memory.scores[b, group, j]
                + reader.bias[h]
                for j in range(K)
                if memory.valid[b, group, j]
            ]
            weights = torch.stack([*scores, torch.tensor(0.0)]).softmax(0)
            mixed.append(
                sum(w * (reader.v_proj.weight @ v)[part] for w, v in zip(weights[:-1], values, strict=False))
            )
        rows[b, t] = reader.out_proj.weight @ torch.cat(mixed)
    layout = Layout.span(0, 6)
    added = attention(x, layout, memory) - attention(x, layout)
    torch.testing.assert_close(added, rows, atol=1e-5, rtol=1e-5)
    real, null = attention.slot_mass(x, layout, memory)
    torch.testing.assert_close(real + null, torch.ones(2, H, 6))
    assert (real.transpose(1, 2)[INDEX < 0] == 0).all()


def test_empty_memory_is_no_memory_and_a_fresh_reader_adds_nothing_bit_for_bit(attention):
    x, layout, memory = noise(2, 6, D), Layout.span(0, 6), slots()
    without = attention(x, layout)
    for nothing in (
        replace(memory, index=torch.full_like(INDEX, -1)),
        MemorySlots.none(INDEX, K, D),
        replace(memory, valid=torch.zeros_like(memory.valid)),
    ):
        assert torch.equal(attention(x, layout, nothing), without)
    garbage = memory.values.clone()
    garbage[:, 1, 2] = math.nan
    assert torch.equal(attention(x, layout, replace(memory, values=garbage)), attention(x, layout, memory))
    block = MultiHeadLatentAttention(D, H, memory=True, slot_reader="own")
    assert torch.equal(block(x, layout, memory), block(x, layout))


def test_gradients_reach_every_parameter_of_the_reader(attention):
    attention(noise(2, 6, D), Layout.span(0, 6), slots()).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_decoding_by_pieces_equals_the_whole(attention):
    x, memory = noise(2, 6, D), slots()
    whole = attention(x, Layout.span(0, 6), memory)
    state, rows = attention.init_state(2, 6), []
    for piece in (slice(0, 3), slice(3, 4), slice(4, 6)):
        rows.append(attention.extend(x[:, piece], state, replace(memory, index=INDEX[:, piece])))
    torch.testing.assert_close(torch.cat(rows, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_unknown_readers_are_refused():
    with pytest.raises(ValueError, match="shared or own"):
        LatentAttention(D, H, memory=True, slot_reader="both")
    with pytest.raises(ValueError, match="must divide"):
        LatentAttention(D, 5, head_dim=4, memory=True, slot_reader="own")


def model() -> NanoThink:
    torch.manual_seed(0)
    mla = MultiHeadLatentAttention(32, 2, memory=True, slot_reader="own")
    experts = {name: TransformerExpert(32, num_layers=1, num_heads=2, ffn_dim=48) for name in ("one", "two")}
    return NanoThink(experts, 61, 32, mla=mla)


def test_memory_read_apart_is_trained_alone():
    names = set_trainable(model(), "7d")
    assert names
    assert all(name.startswith("mla.attention.slots.") for name in names)
    assert not any(".slots." in name for name in set_trainable(model(), "7c"))


@pytest.mark.parametrize("granularity", ["token", "chunk"])
def test_the_leak_audit_gives_no_alarm(granularity):
    network = model()
    memory = filled_memory(network.embedding.weight, chunk=8, granularity=granularity, documents=20)
    plan = Plan(vocab_size=61, length=29, border=8)
    checks = ("A1", "A2", "A3", "A4", "A5", "A6", "A9", "A10")
    found = audit(network, plan=plan, retriever=memory, checks=checks)
    assert found.passed, str(found)


def test_flops_are_those_of_the_gathered_slots(attention):
    reach = Reach(length=6, slots=K, chunk=3)
    flops = sum(product.flops for product in products_of(attention.slots, reach))
    # the null slot scores 0 and says 0: nothing is multiplied
    expected = 2 * 2 * D * D + 2 * 2 * D * D * K / 6 + 2 * 2 * D * K / 2
    assert flops == pytest.approx(expected)
    assert sum(product.flops for product in products_of(attention.slots, Reach(length=6))) == 0
