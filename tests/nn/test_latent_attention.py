"""Latent attention against the formula, DeepSeek's own layers with copied weights, and itself without cache."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from nano_think.nn.mixers.attention import CausalSelfAttention
from nano_think.nn.mixers.latent_attention import LatentAttention
from nano_think.nn.norm import RMSNorm
from nano_think.ops.layout import Layout

KINDS = ["latent", "full", "seed_bottleneck"]
# everything here is fp32
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@dataclass(frozen=True)
class Memory:
    values: Tensor
    valid: Tensor
    index: Tensor


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noisy(module: nn.Module, seed: int = 0, std: float = 0.3) -> nn.Module:
    """The module with every parameter replaced by noise, so that no initial value hides a path."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return module


def mixer(**options) -> LatentAttention:
    return noisy(LatentAttention(d_model=12, num_heads=3, latent_dim=5, head_dim=4, rope_dim=2, **options))


def slots(index: Tensor, groups: int = 2, k: int = 3, d: int = 12, seed: int = 7) -> Memory:
    batch = index.shape[0]
    return Memory(
        noise(batch, groups, k, d, seed=seed), torch.ones(batch, groups, k, dtype=torch.bool), index
    )


def packed_layout(lengths: list[int], pads: int = 0) -> Layout:
    positions = torch.cat([torch.arange(n) for n in [*lengths, pads]])
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((pads,), -1)])
    return Layout(positions.unsqueeze(0), segments.unsqueeze(0))


def test_parameter_count_at_seed_size():
    latent = LatentAttention(384, 6, latent_dim=128, rope_dim=32)
    assert sum(p.numel() for p in latent.parameters()) == 528_896 - 384  # without the block's own norm
    assert sum(p.numel() for p in LatentAttention(384, 6).parameters()) == 528_896 - 384
    full = LatentAttention(384, 6, kv="full")
    assert sum(p.numel() for p in full.parameters()) == 4 * 384**2
    seed = LatentAttention(384, 6, kv="seed_bottleneck")
    assert sum(p.numel() for p in seed.parameters()) == 2 * 384**2 + 4 * 384 * 128
    memory = LatentAttention(384, 6, memory=True)
    assert sum(p.numel() for p in memory.parameters()) == 528_896 - 384 + 384 + 384 + 6


def test_cache_holds_latents_instead_of_keys_and_values():
    floats = {}
    for kv in KINDS:
        attention = LatentAttention(384, 6, kv=kv)
        state = attention.init_state(batch=2, max_len=8)
        attention.extend(noise(2, 3, 384), state)
        floats[kv] = state.num_bytes / (4 * 2 * 3)
    assert floats == {"latent": 128 + 32, "full": 768, "seed_bottleneck": 768}


def test_latent_form_equals_the_formula_token_by_token():
    attention, x = mixer(), noise(1, 6, 12, seed=1)
    heads, layout = attention.heads, Layout.span(0, 6)
    c = x @ heads.latent_proj.weight.T
    c = c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt() * heads.latent_norm.weight
    cos, sin = layout.angles(2, 10_000.0)

    def rotate(pair: Tensor, t: int) -> Tensor:
        co, si = cos[0, 0, t, 0], sin[0, 0, t, 0]
        return torch.stack((pair[0] * co - pair[1] * si, pair[1] * co + pair[0] * si))

    q = (x @ heads.q_proj.weight.T)[0].view(6, 3, 6)
    k = (c @ heads.k_up_proj.weight.T)[0].view(6, 3, 4)
    v = (c @ heads.v_up_proj.weight.T)[0].view(6, 3, 4)
    k_rope = (x @ heads.rope_key_proj.weight.T)[0]
    rows = []
    for t in range(6):
        mixed = []
        for h in range(3):
            scores = torch.stack(
                [
                    (q[t, h, :4] @ k[j, h] + rotate(q[t, h, 4:], t) @ rotate(k_rope[j], j)) / math.sqrt(6)
                    for j in range(t + 1)
                ]
            )
            mixed.append(scores.softmax(0) @ v[: t + 1, h])
        rows.append(attention.out_proj.weight @ torch.cat(mixed))
    torch.testing.assert_close(attention(x, layout)[0], torch.stack(rows), **TOLERANCE)


def test_full_kind_is_rotary_self_attention():
    attention, plain = mixer(kv="full"), CausalSelfAttention(12, 3)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(plain, name).weight = getattr(attention.heads, name).weight
    plain.out_proj = attention.out_proj
    x, layout = noise(2, 9, 12), packed_layout([4, 5])
    torch.testing.assert_close(attention(x, layout), plain(x, layout))


def test_seed_bottleneck_is_full_attention_with_factorised_projections():
    squeezed, full = mixer(kv="seed_bottleneck"), mixer(kv="full")
    full.heads.q_proj, full.out_proj = squeezed.heads.q_proj, squeezed.out_proj
    for name in ("k_proj", "v_proj"):
        down, up = getattr(squeezed.heads, name)
        getattr(full.heads, name).weight.data = up.weight @ down.weight
    x, layout = noise(2, 9, 12), Layout.span(0, 9)
    torch.testing.assert_close(squeezed(x, layout), full(x, layout), **TOLERANCE)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_identity_latent_without_rotation_is_plain_multi_head_attention():
    """Exact where the input already has unit root mean square: the latent's norm then changes nothing."""
    attention = noisy(LatentAttention(12, 3, latent_dim=12, rope_dim=0))
    with torch.no_grad():
        attention.heads.latent_proj.weight.copy_(torch.eye(12))
        attention.heads.latent_norm.weight.fill_(1.0)
    reference = nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    heads = attention.heads
    weights = (heads.q_proj.weight, heads.k_up_proj.weight, heads.v_up_proj.weight)
    reference.in_proj_weight.data = torch.cat(weights)
    reference.out_proj.weight = attention.out_proj.weight
    x = RMSNorm(12, gain=False, eps=0.0)(noise(2, 7, 12))
    future = torch.ones(7, 7).triu(1).bool()
    expected, _ = reference(x, x, x, attn_mask=future, need_weights=False)
    torch.testing.assert_close(attention(x, Layout.span(0, 7)), expected, **TOLERANCE)


@pytest.mark.parametrize(("version", "layout"), [(2, "interleaved"), (3, "half"), (3, "interleaved")])
def test_deepseek_layers_with_copied_weights(version, layout):
    if version == 2:
        hf = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
        config = hf.DeepseekV2Config(**DEEPSEEK)
        theirs, rotary = hf.DeepseekV2Attention(config, 0), hf.DeepseekV2RotaryEmbedding(config)
    else:
        hf = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
        config = hf.DeepseekV3Config(**DEEPSEEK, rope_interleave=layout == "interleaved")
        theirs, rotary = hf.DeepseekV3Attention(config, 0), hf.DeepseekV3RotaryEmbedding(config)
    config._attn_implementation = "eager"
    noisy(theirs)
    mine = LatentAttention(24, 3, latent_dim=10, head_dim=8, rope_dim=4, rope_layout=layout)
    mine.load_state_dict(in_our_names(theirs.state_dict()))
    x, positions = noise(2, 11, 24).requires_grad_(), torch.arange(11).unsqueeze(0)
    mask = torch.zeros(1, 1, 11, 11).masked_fill(torch.ones(11, 11).triu(1).bool(), -math.inf)
    expected = theirs(x, position_embeddings=rotary(x, positions), attention_mask=mask)[0]
    out = mine(x, Layout.span(0, 11))
    torch.testing.assert_close(out, expected, **TOLERANCE)
    upstream, (ours, others) = noise(2, 11, 24, seed=1), (dict(m.named_parameters()) for m in (mine, theirs))
    x_grad, *grads = torch.autograd.grad(out, [x, *ours.values()], upstream)
    x_other, *found = torch.autograd.grad(expected, [x, *others.values()], upstream)
    torch.testing.assert_close(x_grad, x_other, **TOLERANCE)
    translated = in_our_names(dict(zip(others, found, strict=True)))
    torch.testing.assert_close(dict(zip(ours, grads, strict=True)), translated, **TOLERANCE)
    other = "half" if layout == "interleaved" else "interleaved"
    mine.heads.rotation.layout = other
    assert (mine(x, Layout.span(0, 11)) - expected).abs().max() > 1e-3


DEEPSEEK = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}


def in_our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """DeepSeek's weights, or their gradients, cut and named as ours are."""
    down, rope = theirs["kv_a_proj_with_mqa.weight"].split((10, 4))
    k_up, v_up = theirs["kv_b_proj.weight"].view(3, 16, 10).split(8, dim=1)
    heads = {
        "q_proj": theirs["q_proj.weight"],
        "latent_proj": down,
        "latent_norm": theirs["kv_a_layernorm.weight"],
        "rope_key_proj": rope,
        "k_up_proj": k_up.reshape(24, 10),
        "v_up_proj": v_up.reshape(24, 10),
    }
    named = {f"heads.{name}.weight": tensor for name, tensor in heads.items()}
    return named | {"out_proj.weight": theirs["o_proj.weight"]}


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("with_memory", [False, True])
def test_cached_equals_full_at_every_split_absorbed_and_expanded(kv, with_memory):
    attention, x = mixer(kv=kv, memory=with_memory), noise(2, 9, 12)
    index = torch.tensor([[-1, -1, 0, 0, 0, 1, 1, 1, 1], [-1, 0, 0, 1, 1, 1, 1, -1, 0]])
    memory = slots(index) if with_memory else None
    full = attention(x, Layout.span(0, 9), memory)
    for split in range(1, 9):
        for absorbed in (None, False, True):
            state, rows = attention.init_state(2, 9), []
            for part in [slice(0, split), *(slice(t, t + 1) for t in range(split, 9))]:
                own = memory and replace(memory, index=memory.index[:, part])
                rows.append(attention.extend(x[:, part], state, own, absorbed))
            torch.testing.assert_close(torch.cat(rows, dim=1), full, **TOLERANCE)


@pytest.mark.parametrize("with_memory", [False, True])
def test_absorbed_equals_expanded_with_gradients(with_memory):
    index = torch.tensor([[-1, -1, 0, 0, 0, 1, 1, 1, 1], [-1, 0, 0, 1, 1, 1, 1, -1, 0]])
    memory, found = slots(index) if with_memory else None, []
    for absorbed in (False, True):
        attention, x = mixer(memory=with_memory), noise(2, 9, 12).requires_grad_()
        out = attention.extend(x, attention.init_state(2, 9), memory, absorbed)
        found.append([out, *torch.autograd.grad(out, [x, *attention.parameters()], noise(2, 9, 12, seed=1))])
    torch.testing.assert_close(*found, **TOLERANCE)


@pytest.mark.parametrize("kv", KINDS)
def test_random_programs_of_extend_rollback_and_reorder_equal_recomputation(kv):
    attention, rng = mixer(kv=kv), random.Random(0)
    state, read = attention.init_state(3, 40), torch.empty(3, 0, 12)
    for step in range(40):
        action = rng.choice(["extend", "extend", "rollback", "reorder"])
        if action == "extend" and state.length < 34:
            new = noise(3, rng.randint(1, 4), 12, seed=step)
            read = torch.cat((read, new), dim=1)
            out = attention.extend(new, state)
            expected = attention(read, Layout.span(0, read.shape[1]))[:, -new.shape[1] :]
            torch.testing.assert_close(out, expected, **TOLERANCE)
        elif action == "rollback":
            n = rng.randint(0, state.length)
            state.rollback(n)
            read = read[:, : read.shape[1] - n]
        else:
            index = torch.tensor([rng.randrange(3) for _ in range(3)])
            state.reorder(index)
            read = read[index]
        assert state.length == read.shape[1]


def test_packed_documents_and_pads_equal_separate_ones():
    attention, x = mixer(memory=True), noise(1, 12, 12)
    memory = slots(torch.tensor([[-1, -1, 0, 0, -1, -1, -1, 1, 1, 1, -1, -1]]))
    packed = attention(x, packed_layout([4, 6], pads=2), memory)
    for part in (slice(0, 4), slice(4, 10)):
        own = replace(memory, index=memory.index[:, part])
        alone = attention(x[:, part], Layout.span(0, part.stop - part.start), own)
        torch.testing.assert_close(packed[:, part], alone, **TOLERANCE)
    assert packed.isfinite().all()


@pytest.mark.parametrize("kv", KINDS)
class TestMemory:
    INDEX = torch.tensor([[-1, -1, 0, 0, 1, 1], [-1, -1, -1, 0, 0, -1]])

    def build(self, kv: str) -> tuple[LatentAttention, Tensor, Layout, Memory]:
        return mixer(kv=kv, memory=True), noise(2, 6, 12), Layout.span(0, 6), slots(self.INDEX)

    def test_empty_memory_is_no_memory_bit_for_bit(self, kv):
        attention, x, layout, memory = self.build(kv)
        without = attention(x, layout)
        empty = [
            replace(memory, valid=torch.zeros_like(memory.valid)),
            replace(memory, index=torch.full_like(memory.index, -1)),
            Memory(memory.values[:, :0], memory.valid[:, :0], torch.full_like(memory.index, -1)),
            Memory(memory.values[:, :, :0], memory.valid[:, :, :0], memory.index),
        ]
        for nothing in empty:
            assert torch.equal(attention(x, layout, nothing), without)
        assert not torch.allclose(attention(x, layout, memory), without)

    def test_order_of_slots_and_content_of_empty_slots_do_not_matter(self, kv):
        attention, x, layout, memory = self.build(kv)
        valid = memory.valid.clone()
        valid[:, :, 1] = False
        expected = attention(x, layout, replace(memory, valid=valid))
        order = torch.tensor([2, 1, 0])
        shuffled = Memory(memory.values[:, :, order], valid[:, :, order], memory.index)
        torch.testing.assert_close(attention(x, layout, shuffled), expected, **TOLERANCE)
        garbage = memory.values.clone()
        garbage[:, :, 1] = math.nan
        assert torch.equal(attention(x, layout, Memory(garbage, valid, memory.index)), expected)

    def test_a_token_sees_only_the_slots_of_its_group(self, kv):
        attention, x, layout, memory = self.build(kv)
        before = attention(x, layout, memory)
        changed = memory.values.clone()
        changed[:, 1] += 1.0
        after = attention(x, layout, replace(memory, values=changed))
        differs = (after != before).any(-1)
        assert torch.equal(differs, self.INDEX == 1)

    def test_slots_have_no_position(self, kv):
        """The share of attention on a slot depends on the token, not on where it stands, for one-token rows."""
        attention, x, _, memory = self.build(kv)
        one = Memory(memory.values[:1, :1], memory.valid[:1, :1], torch.zeros(1, 1, dtype=torch.int64))
        outputs = [attention(x[:1, :1], Layout.span(start, 1), one) for start in (0, 5, 100)]
        for other in outputs[1:]:
            torch.testing.assert_close(other, outputs[0], **TOLERANCE)

    def test_fresh_memory_barely_disturbs(self, kv):
        torch.manual_seed(0)
        attention = LatentAttention(12, 3, kv=kv, memory=True)
        _, x, layout, memory = self.build(kv)
        difference = (attention(x, layout, memory) - attention(x, layout)).abs().max()
        assert 0 < difference < 5e-3

    def test_slot_mass_is_the_softmax_share(self, kv):
        attention, x, layout, memory = self.build(kv)
        real, null = attention.slot_mass(x, layout, memory)
        blind = self.INDEX < 0
        assert (real.transpose(1, 2)[blind] == 0).all()
        assert (null.transpose(1, 2)[blind] == 0).all()
        assert (null.transpose(1, 2)[~blind] > 0).all()
        dominant = copy.deepcopy(attention)
        dominant.slots.bias.data.fill_(60.0)
        real, null = dominant.slot_mass(x, layout, memory)
        torch.testing.assert_close((real + null).transpose(1, 2)[~blind], torch.ones(6, 3))

    def test_gradients_reach_every_parameter(self, kv):
        attention, x, layout, memory = self.build(kv)
        attention(x, layout, memory).square().sum().backward()
        for name, parameter in attention.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name

    def test_no_later_token_matters(self, kv):
        attention, x, layout, memory = self.build(kv)
        before = attention(x, layout, memory)
        changed = x.clone()
        changed[:, 4] += 1.0
        after = attention(changed, layout, memory)
        assert torch.equal(after[:, :4], before[:, :4])
        assert (after[:, 4:] != before[:, 4:]).any(-1).all()


def test_memory_equals_the_formula_token_by_token():
    """Slots and the null slot are keys without rotation whose scores carry the head's bias."""
    attention, x, layout = mixer(memory=True), noise(1, 5, 12), Layout.span(0, 5)
    memory = slots(torch.tensor([[-1, 0, 0, 1, 1]]), k=2)
    heads, reader = attention.heads, attention.slots
    own = heads.expanded(heads.rotate(heads.queries(x), layout), heads.entries(x, layout))
    content, rows = heads.queries(x)[0, :, :, :4], []
    for t in range(5):
        group = int(memory.index[0, t])
        extra = [] if group < 0 else [*memory.values[0, group], reader.null]
        mixed = []
        for h in range(3):
            scores = [own.q[0, h, t] @ own.k[0, h, j] / math.sqrt(6) for j in range(t + 1)]
            values = [own.v[0, h, j] for j in range(t + 1)]
            for slot in extra:
                c = heads.latent_norm(heads.latent_proj(reader.norm(slot)))
                k, v = ((w.weight @ c).view(3, 4)[h] for w in (heads.k_up_proj, heads.v_up_proj))
                scores.append(content[h, t] @ k / math.sqrt(6) + reader.bias[h])
                values.append(v)
            mixed.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        rows.append(attention.out_proj.weight @ torch.cat(mixed))
    torch.testing.assert_close(attention(x, layout, memory)[0], torch.stack(rows), **TOLERANCE)


def test_slots_without_memory_parameters_are_refused():
    attention = mixer()
    with pytest.raises(ValueError, match="memory=True"):
        attention(noise(1, 2, 12), Layout.span(0, 2), slots(torch.zeros(1, 2, dtype=torch.int64)))
    with pytest.raises(ValueError, match="kv must be"):
        LatentAttention(12, 3, kv="nothing")


def test_bf16_autocast_runs_with_memory_and_cache():
    attention = mixer(memory=True)
    x, memory = noise(1, 4, 12), slots(torch.tensor([[-1, 0, 0, 1]]))
    exact = attention(x, Layout.span(0, 4), memory)
    with torch.autocast("cpu", torch.bfloat16):
        state, rows = attention.init_state(1, 4), []
        for t in range(4):
            rows.append(
                attention.extend(x[:, t : t + 1], state, replace(memory, index=memory.index[:, t : t + 1]))
            )
        full = attention(x, Layout.span(0, 4), memory)
    torch.testing.assert_close(full.float(), exact, atol=0.1, rtol=0.1)
    torch.testing.assert_close(torch.cat(rows, dim=1).float(), exact, atol=0.1, rtol=0.1)
