from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from nano_think.experts.state_space import StateSpaceExpert
from nano_think.nn.mixers.attention import CausalSelfAttention
from nano_think.ops.layout import Layout

SMALL = {"d_model": 16, "num_layers": 3, "d_inner": 24, "d_state": 4, "dropout": 0.0}


@pytest.fixture(scope="module")
def expert(randomise: Callable[..., nn.Module]) -> StateSpaceExpert:
    return randomise(StateSpaceExpert(**SMALL)).eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_parameters_at_the_defaults() -> None:
    expert = StateSpaceExpert()
    in_proj, conv, x_proj, dt_proj = 589_824, 3_840, 43_008, 19_200
    layer = in_proj + conv + x_proj + dt_proj + 12_288 + 768 + 294_912 + 384
    assert layer == 964_224
    body = 6 * layer + 384
    assert body == 5_785_728
    assert sum(p.numel() for p in expert.parameters()) == body + 147_456
    mixer = expert.blocks[0].mixer
    assert (len(expert.blocks), mixer.d_inner, mixer.d_state, mixer.d_conv) == (6, 768, 16, 4)


def test_initial_values() -> None:
    expert = StateSpaceExpert()
    for block in expert.blocks:
        assert block.mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert block.mixer.out_proj.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.02)
        steps = nn.functional.softplus(block.mixer.dt_bias)
        assert 0.99e-3 <= steps.min() < steps.max() <= 1.01e-1
    assert torch.equal(expert.entry.adaptor.weight, torch.eye(384))


def test_equals_mamba_of_transformers(randomise: Callable[..., nn.Module]) -> None:
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    ours = randomise(StateSpaceExpert(32, num_layers=3, d_inner=64, dropout=0.0)).eval()
    config = mamba.MambaConfig(
        vocab_size=5,
        hidden_size=32,
        state_size=16,
        num_hidden_layers=3,
        conv_kernel=4,
        expand=2,
        time_step_rank=2,
        layer_norm_epsilon=1e-6,
    )
    theirs = mamba.MambaModel(config).eval()
    with torch.no_grad():
        for block, layer in zip(ours.blocks, theirs.layers, strict=True):
            layer.norm.weight.copy_(block.mixer_norm.weight)
            mixer, other = block.mixer, layer.mixer
            other.conv1d.weight.copy_(mixer.conv_weight.unsqueeze(1))
            other.conv1d.bias.copy_(mixer.conv_bias)
            other.dt_proj.weight.copy_(mixer.dt_weight)
            other.dt_proj.bias.copy_(mixer.dt_bias)
            other.A_log.copy_(mixer.A_log)
            other.D.copy_(mixer.D)
            for name in ("in_proj", "x_proj", "out_proj"):
                getattr(other, name).weight.copy_(getattr(mixer, name).weight)
        theirs.norm_f.weight.copy_(ours.norm.weight)
        x = normal(2, 40, 32)
        actual = ours(x)
        expected = theirs(inputs_embeds=ours.entry(x)).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 17, 100])
def test_shape_and_causality(expert: StateSpaceExpert, length: int) -> None:
    x, position = normal(2, length, 16), length // 2
    changed = x.clone()
    changed[:, position] = normal(2, 16, seed=5)
    with torch.no_grad():
        before, after = expert(x), expert(changed)
    assert before.shape == x.shape
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before[:, position:] != after[:, position:]).any(-1).all()


def test_packed_documents_equal_their_own_runs(expert: StateSpaceExpert) -> None:
    ids = [-1, -1] + [0] * 3 + [1] * 20 + [2] + [3] * 6 + [-1] * 4
    x = normal(1, len(ids), 16)
    segments = torch.tensor([ids])
    positions = torch.tensor([[ids[:i].count(segment) for i, segment in enumerate(ids)]])
    with torch.no_grad():
        packed = expert(x, Layout(positions, segments))
        for document in range(4):
            where = [i for i, segment in enumerate(ids) if segment == document]
            torch.testing.assert_close(packed[:, where], expert(x[:, where]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", [1, 3, 4, 16, 33])
def test_cached_equals_full(expert: StateSpaceExpert, prompt: int) -> None:
    x = normal(2, 40, 16)
    state = expert.init_state(2, 40)
    with torch.no_grad():
        outputs = [expert.extend(part, state) for part in x.split([prompt] + [1] * (40 - prompt), dim=1)]
        torch.testing.assert_close(torch.cat(outputs, dim=1), expert(x), rtol=1e-5, atol=1e-5)
    assert state.length == 40
    assert state.num_bytes == 2 * 3 * (24 * 4 + 24 * 3) * 4


def test_rollback_and_reorder(expert: StateSpaceExpert) -> None:
    x, other = normal(2, 12, 16), normal(2, 3, 16, seed=1)
    state = expert.init_state(2, 40, max_rollback=4)
    with torch.no_grad():
        expert.extend(x, state)
        expert.extend(other, state)
        state.rollback(4)
        state.reorder(torch.tensor([1, 0]))
        actual = expert.extend(other, state)
        expected = expert(torch.cat((x[[1, 0], :11], other), dim=1))[:, -3:]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient(expert: StateSpaceExpert) -> None:
    expert.zero_grad()
    expert(normal(2, 30, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() and p.grad.isfinite().all() for p in expert.parameters())


def test_dropout_acts_in_training_only() -> None:
    expert, x = StateSpaceExpert(**SMALL | {"dropout": 0.5}), normal(1, 10, 16)
    assert not torch.equal(expert(x), expert(x))
    expert.eval()
    assert torch.equal(expert(x), expert(x))


def test_another_mixer() -> None:
    expert = StateSpaceExpert(16, 2, mixer=partial(CausalSelfAttention, num_heads=2)).eval()
    x = normal(1, 9, 16)
    torch.testing.assert_close(expert.extend(x, expert.init_state(1, 9)), expert(x), rtol=1e-5, atol=1e-5)
