from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from nano_think.experts.transformer import TransformerExpert
from nano_think.nn.mixers import attention as mixer_module
from nano_think.nn.mixers.attention import CausalSelfAttention
from nano_think.ops.attention import attention
from nano_think.ops.layout import Layout

WIDTH, LENGTH = 16, 12


def inputs(batch: int, length: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def expert(randomise) -> TransformerExpert:
    return randomise(TransformerExpert(WIDTH, num_layers=2, num_heads=2, ffn_dim=24)).eval()


def leaks_by_perturbation(expert: TransformerExpert) -> list[int]:
    """Positions whose change alters an earlier output, or alters nothing from there on."""
    x, found = inputs(1, LENGTH), []
    with torch.no_grad():
        before = expert(x)
        for t in range(LENGTH):
            changed = x.clone()
            changed[:, t] += inputs(1, 1, seed=t + 1)[:, 0]
            moved = (expert(changed) != before).any(dim=-1)[0]
            if moved[:t].any() or not moved[t:].all():
                found.append(t)
    return found


def leaks_by_gradient(expert: TransformerExpert) -> list[tuple[int, int]]:
    """Pairs (i, j), j > i, where output i has a derivative by input j, and pairs j <= i where it has none."""
    jacobian = torch.autograd.functional.jacobian(lambda y: expert(y)[0].sum(dim=-1), inputs(1, LENGTH))
    live = (jacobian[:, 0] != 0).any(dim=-1)
    return (live != torch.ones(LENGTH, LENGTH).tril().bool()).nonzero().tolist()


def test_causal_by_perturbation(expert) -> None:
    assert leaks_by_perturbation(expert) == []


def test_causal_by_gradient(expert) -> None:
    assert leaks_by_gradient(expert) == []


def test_both_audits_notice_a_missing_mask(expert, monkeypatch) -> None:
    monkeypatch.setattr(mixer_module, "attention", lambda q, k, v, *_, **__: attention(q, k, v))
    assert leaks_by_perturbation(expert) == list(range(1, LENGTH))
    assert len(leaks_by_gradient(expert)) == LENGTH * (LENGTH - 1) // 2


@torch.no_grad()
def test_equals_hugging_face_llama_with_the_same_weights(randomise) -> None:
    expert = randomise(TransformerExpert(WIDTH, num_layers=3, num_heads=4, ffn_dim=24)).eval()
    config = LlamaConfig(
        vocab_size=3,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        rms_norm_eps=1e-6,
    )
    llama = LlamaModel(config).eval()
    names = {
        "norm.weight": "norm.weight",
        **{
            f"layers.{i}.{theirs}.weight": f"blocks.{i}.{ours}.weight"
            for i in range(3)
            for theirs, ours in [
                ("input_layernorm", "mixer_norm"),
                ("post_attention_layernorm", "ffn_norm"),
                ("self_attn.q_proj", "mixer.q_proj"),
                ("self_attn.k_proj", "mixer.k_proj"),
                ("self_attn.v_proj", "mixer.v_proj"),
                ("self_attn.o_proj", "mixer.out_proj"),
                ("mlp.gate_proj", "ffn.gate_proj"),
                ("mlp.up_proj", "ffn.up_proj"),
                ("mlp.down_proj", "ffn.down_proj"),
            ]
        },
    }
    weights = expert.state_dict()
    copied = {theirs: weights[ours] for theirs, ours in names.items()}
    missing, unexpected = llama.load_state_dict(copied, strict=False)
    assert (missing, unexpected) == (["embed_tokens.weight"], [])
    assert set(weights) - set(names.values()) == {"entry.adaptor.weight"}
    x = inputs(2, 20)
    expected = llama(inputs_embeds=expert.entry(x), use_cache=False).last_hidden_state
    torch.testing.assert_close(expert(x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 511, 512])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_shape_in_is_shape_out(batch, length) -> None:
    expert = TransformerExpert(384, num_layers=1).eval()
    out = expert(inputs(batch, length, width=384))
    assert out.shape == (batch, length, 384)
    assert out.isfinite().all()


def test_defaults_are_the_seeds_numbers_and_the_parameter_formula_holds() -> None:
    with torch.device("meta"):
        expert = TransformerExpert()
    assert (len(expert.blocks), expert.d_model) == (6, 384)
    assert (expert.blocks[0].mixer.num_heads, expert.blocks[0].ffn.up_proj.out_features) == (6, 1536)
    body = 6 * (4 * 384**2 + 3 * 384 * 1536 + 2 * 384) + 384
    assert body == 14_160_768
    assert sum(p.numel() for p in expert.parameters()) == body + 384**2 == 14_160_768 + 147_456


@pytest.mark.parametrize("mixer", [None, partial(CausalSelfAttention, num_heads=4, num_kv_heads=2)])
def test_every_parameter_gets_a_gradient(randomise, mixer) -> None:
    expert = randomise(TransformerExpert(WIDTH, 2, 4, 24, mixer=mixer))
    expert(inputs(2, LENGTH)).pow(2).mul(inputs(2, LENGTH, seed=5)).sum().backward()
    for name, parameter in expert.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_fresh_expert_passes_a_gradient_to_every_parameter() -> None:
    expert = TransformerExpert(WIDTH, 2, 2, 24)
    expert(inputs(2, LENGTH)).mul(inputs(2, LENGTH, seed=5)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in expert.parameters())


@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=4), pads=st.integers(0, 3))
@torch.no_grad()
def test_packed_documents_equal_the_documents_alone(expert, cuts, pads) -> None:
    x, end = inputs(1, LENGTH), LENGTH - pads
    borders = sorted({0, *(cut for cut in cuts if cut < end), end})
    lengths = [b - a for a, b in pairwise(borders)]
    segments = [i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * pads
    positions = [p for n in lengths for p in range(n)] + list(range(pads))
    packed = expert(x, Layout(torch.tensor([positions]), torch.tensor([segments])))
    assert packed.isfinite().all()
    for start, stop in pairwise(borders):
        torch.testing.assert_close(packed[:, start:stop], expert(x[:, start:stop]), atol=1e-5, rtol=0)


@torch.no_grad()
def test_masked_layout_of_one_document_equals_the_plain_path(expert) -> None:
    x, plain = inputs(2, LENGTH), Layout.span(0, LENGTH)
    masked = Layout(plain.positions.expand(2, -1), plain.segments.expand(2, -1))
    torch.testing.assert_close(expert(x, masked), expert(x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_pads_and_neighbours_do_not_matter(expert) -> None:
    x = inputs(3, LENGTH)
    alone = expert(x[1:2, :8])
    segments = torch.tensor([[0] * 12, [0] * 8 + [-1] * 4, [0] * 3 + [-1] * 9])
    out = expert(x, Layout(torch.arange(12).expand(3, -1), segments))
    torch.testing.assert_close(out[1:2, :8], alone, atol=1e-5, rtol=0)


@given(splits=st.lists(st.integers(1, 6), min_size=1, max_size=6))
@torch.no_grad()
def test_cached_equals_full_for_every_split(expert, splits) -> None:
    x = inputs(2, sum(splits))
    state = expert.init_state(2, sum(splits))
    pieces = [expert.extend(piece, state) for piece in x.split(splits, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expert(x), atol=1e-5, rtol=0)
    assert state.length == sum(splits)
    assert state.num_bytes == 2 * sum(splits) * 2 * WIDTH * 2 * 4


operations = st.one_of(
    st.tuples(st.just("extend"), st.integers(1, 4)),
    st.tuples(st.just("rollback"), st.integers(1, 5)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 2), min_size=3, max_size=3)),
)


@given(program=st.lists(operations, min_size=1, max_size=10))
@torch.no_grad()
def test_random_programs_equal_recomputation(expert, program) -> None:
    state, history = expert.init_state(3, 40), inputs(3, 0)
    for step, (name, value) in enumerate(program):
        if name == "extend":
            new = inputs(3, value, seed=step)
            history = torch.cat((history, new), dim=1)
            torch.testing.assert_close(
                expert.extend(new, state), expert(history)[:, -value:], atol=1e-5, rtol=0
            )
        elif name == "rollback" and value <= state.length:
            state.rollback(value)
            history = history[:, :-value]
        elif name == "reorder":
            state.reorder(torch.tensor(value))
            history = history[value]
    new = inputs(3, 1, seed=99)
    expected = expert(torch.cat((history, new), dim=1))[:, -1:]
    torch.testing.assert_close(expert.extend(new, state), expected, atol=1e-5, rtol=0)


def test_overfull_cache_is_refused(expert) -> None:
    with pytest.raises(ValueError, match="holds 3 positions, 4 were needed"):
        expert.extend(inputs(1, 4), expert.init_state(1, 3))


def test_dropout_acts_in_training_only() -> None:
    expert, x = TransformerExpert(WIDTH, 2, 2, 24, dropout=0.5), inputs(1, LENGTH)
    assert not torch.equal(expert.train()(x), expert(x))
    assert torch.equal(expert.eval()(x), expert(x))


@torch.no_grad()
def test_scale_of_the_input_does_not_matter(expert) -> None:
    x = inputs(1, LENGTH)
    torch.testing.assert_close(expert(30 * x), expert(x), atol=1e-4, rtol=0)
