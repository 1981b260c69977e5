from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRotaryEmbedding

from nano_think.nn.mixers import attention as module
from nano_think.nn.mixers.attention import CausalSelfAttention
from nano_think.ops.layout import Layout

SHAPES = [
    {"num_heads": 4},
    {"num_heads": 4, "num_kv_heads": 2},
    {"num_heads": 4, "num_kv_heads": 1, "head_dim": 6, "rope_layout": "interleaved", "rope_theta": 50.0},
]


def inputs(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(seed))


def rotate(vector: Tensor, position: int, mixer: CausalSelfAttention) -> Tensor:
    """One head's vector rotated pair by pair."""
    dim, turned = len(vector), vector.clone()
    for j in range(dim // 2):
        a, b = (j, j + dim // 2) if mixer.rope_layout == "half" else (2 * j, 2 * j + 1)
        angle = position * mixer.rope_theta ** (-2 * j / dim)
        turned[a] = vector[a] * math.cos(angle) - vector[b] * math.sin(angle)
        turned[b] = vector[b] * math.cos(angle) + vector[a] * math.sin(angle)
    return turned


def by_hand(mixer: CausalSelfAttention, x: Tensor) -> Tensor:
    """(L, d) to (L, d), one head and one query at a time."""
    dim, share = mixer.head_dim, mixer.num_heads // mixer.num_kv_heads
    rows = []
    for t in range(len(x)):
        heads = []
        for h in range(mixer.num_heads):
            own, shared = slice(h * dim, (h + 1) * dim), slice(h // share * dim, (h // share + 1) * dim)
            query = rotate(mixer.q_proj.weight[own] @ x[t], t, mixer)
            keys = [rotate(mixer.k_proj.weight[shared] @ x[s], s, mixer) for s in range(t + 1)]
            values = [mixer.v_proj.weight[shared] @ x[s] for s in range(t + 1)]
            weights = torch.stack([query @ key / math.sqrt(dim) for key in keys]).softmax(dim=0)
            heads.append(sum(w * v for w, v in zip(weights, values, strict=True)))
        rows.append(mixer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_equals_plain_loops(randomise, shape) -> None:
    mixer, x = randomise(CausalSelfAttention(16, **shape)), inputs(2, 6)
    expected = torch.stack([by_hand(mixer, row) for row in x])
    torch.testing.assert_close(mixer(x, Layout.span(0, 6)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_equals_hugging_face_llama_with_gradients(randomise, num_kv_heads) -> None:
    """Grouped heads and rotation together, copied weights; fp32, to 1e-5."""
    mixer, x = (
        randomise(CausalSelfAttention(16, 4, num_kv_heads=num_kv_heads)),
        inputs(2, 11).requires_grad_(),
    )
    config = LlamaConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=num_kv_heads)
    config._attn_implementation = "eager"
    theirs = LlamaAttention(config, layer_idx=0).eval()
    names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
    theirs.load_state_dict({f"{b}.weight": mixer.get_submodule(a).weight for a, b in names.items()})
    future = torch.full((11, 11), -math.inf).triu(1).expand(2, 1, 11, 11)
    rotary = LlamaRotaryEmbedding(config)(x, torch.arange(11).unsqueeze(0))
    out, (expected, _) = mixer(x, Layout.span(0, 11)), theirs(x, rotary, future)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    grads = [
        torch.autograd.grad(result, [x, *weights], inputs(2, 11, seed=1))
        for result, weights in (
            (out, [mixer.get_submodule(name).weight for name in names]),
            (expected, [theirs.get_submodule(name).weight for name in names.values()]),
        )
    ]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_packed_documents_equal_the_documents_alone(randomise, shape) -> None:
    mixer, lengths = randomise(CausalSelfAttention(16, **shape)), [4, 1, 3]
    x = inputs(1, 10)
    segments = torch.tensor([[0] * 4 + [1] + [2] * 3 + [-1] * 2])
    positions = torch.tensor([[*range(4), 0, *range(3), 0, 1]])
    out = mixer(x, Layout(positions, segments))
    assert out.isfinite().all()
    start = 0
    for length in lengths:
        alone = mixer(x[:, start : start + length], Layout.span(0, length))
        torch.testing.assert_close(out[:, start : start + length], alone, atol=1e-5, rtol=0)
        start += length


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("splits", [[9], [1] * 9, [4, 1, 1, 3], [1, 8]])
@torch.no_grad()
def test_cached_equals_full(randomise, shape, splits) -> None:
    mixer, x = randomise(CausalSelfAttention(16, **shape)), inputs(2, 9)
    state = mixer.init_state(2, 9)
    pieces = [mixer.extend(piece, state) for piece in x.split(splits, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), mixer(x, Layout.span(0, 9)), atol=1e-5, rtol=0)
    kv_width = mixer.num_kv_heads * mixer.head_dim
    assert state.num_bytes == 2 * 9 * 2 * kv_width * 4


@torch.no_grad()
def test_order_of_earlier_tokens_matters_through_rope_alone(randomise, monkeypatch) -> None:
    mixer, x = randomise(CausalSelfAttention(16, num_heads=4)), inputs(1, 6)
    shuffled = x[:, [3, 0, 4, 2, 1, 5]]

    def last_changes() -> bool:
        one, two = (mixer(y, Layout.span(0, 6))[:, -1] for y in (x, shuffled))
        return not torch.allclose(one, two, atol=1e-4)

    assert last_changes()
    monkeypatch.setattr(module, "apply_rope", lambda x, *_: x)
    assert not last_changes()


def test_shared_keys_and_values_must_divide_the_heads() -> None:
    with pytest.raises(ValueError, match="num_kv_heads 3 must divide num_heads 4"):
        CausalSelfAttention(16, num_heads=4, num_kv_heads=3)
