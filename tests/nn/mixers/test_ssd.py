from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from nano_think.experts.state_space import StateSpaceExpert
from nano_think.nn.mixers.ssd import SSD
from nano_think.ops.layout import Layout


@pytest.fixture(scope="module")
def mixer(randomise: Callable[..., nn.Module]) -> SSD:
    return randomise(SSD(12, d_state=5, head_dim=8)).eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(x: Tensor) -> Layout:
    return Layout.of(x, None)


@pytest.mark.parametrize("length", [1, 5, 64, 100])
def test_equals_mamba2_of_transformers(length: int, randomise: Callable[..., nn.Module]) -> None:
    """fp32: values to 1e-5, gradients of the input and every parameter to 1e-4."""
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = mamba2.Mamba2Config(
        hidden_size=16,
        num_heads=4,
        head_dim=8,
        state_size=6,
        n_groups=1,
        conv_kernel=4,
        expand=2,
        chunk_size=32,
        num_hidden_layers=1,
        layer_norm_epsilon=1e-6,
    )
    ours, theirs = randomise(SSD(16, d_state=6, head_dim=8)), mamba2.Mamba2Mixer(config, layer_idx=0).eval()
    with torch.no_grad():
        theirs.conv1d.weight.copy_(ours.conv_weight.unsqueeze(1))
        theirs.conv1d.bias.copy_(ours.conv_bias)
        theirs.norm.weight.copy_(ours.norm.weight)
        for name in ("dt_bias", "A_log", "D"):
            getattr(theirs, name).copy_(getattr(ours, name))
        for name in ("in_proj", "out_proj"):
            getattr(theirs, name).weight.copy_(getattr(ours, name).weight)
    x, upstream = normal(2, length, 16).requires_grad_(), normal(2, length, 16, seed=1)
    actual, expected = ours(x, plain(x)), theirs(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    same = ["dt_bias", "A_log", "D", "in_proj.weight", "out_proj.weight", "norm.weight"]
    own, other = [*same, "conv_weight", "conv_bias"], [*same, "conv1d.weight", "conv1d.bias"]
    assert sorted(own) == sorted(name for name, _ in ours.named_parameters())
    for name, a, b in zip(
        ["x", *own],
        torch.autograd.grad(actual, [x, *map(ours.get_parameter, own)], upstream),
        torch.autograd.grad(expected, [x, *map(theirs.get_parameter, other)], upstream),
        strict=True,
    ):
        torch.testing.assert_close(
            a, b.view_as(a), rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_parameters_of_an_expert_at_the_defaults() -> None:
    expert = StateSpaceExpert(mixer=partial(SSD, d_inner=768))
    layer = 384 * (2 * 768 + 2 * 64 + 12) + 5 * (768 + 2 * 64) + 3 * 12 + 768 + 768 * 384 + 384
    assert sum(p.numel() for p in expert.parameters()) == 6 * layer + 384 + 147_456


def test_initial_values() -> None:
    mixer = SSD(768)
    steps = nn.functional.softplus(mixer.dt_bias)
    assert 0.99e-3 <= steps.min() < steps.max() <= 1.01e-1
    assert 1 <= mixer.A_log.exp().min() < mixer.A_log.exp().max() <= 16
    assert sorted(n for n, p in mixer.named_parameters() if hasattr(p, "_no_weight_decay")) == [
        "A_log",
        "D",
        "dt_bias",
    ]


def test_heads_must_fit() -> None:
    with pytest.raises(ValueError, match="head_dim 7 must divide d_inner 24"):
        SSD(12, head_dim=7)


@pytest.mark.parametrize("position", [0, 1, 63, 64, 79])
def test_a_token_changes_nothing_before_it_and_everything_after(mixer: SSD, position: int) -> None:
    x = normal(1, 80, 12)
    changed = x.clone()
    changed[:, position] += 1
    with torch.no_grad():
        before, after = mixer(x, plain(x)), mixer(changed, plain(x))
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before[:, position] != after[:, position]).any()


def test_packed_documents_equal_their_own_runs(mixer: SSD) -> None:
    ids = [-1, -1] + [0] * 3 + [1] * 70 + [2] + [3] * 6 + [-1] * 4
    positions = [ids[:i].count(segment) for i, segment in enumerate(ids)]
    x = normal(1, len(ids), 12)
    with torch.no_grad():
        packed = mixer(x, Layout(torch.tensor([positions]), torch.tensor([ids])))
        for document in range(4):
            where = [i for i, segment in enumerate(ids) if segment == document]
            own = x[:, where]
            torch.testing.assert_close(packed[:, where], mixer(own, plain(own)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", [[1] * 20, [20], [3, 1, 1, 15]])
@pytest.mark.parametrize("max_rollback", [0, 4])
def test_cached_equals_full(mixer: SSD, pieces: list[int], max_rollback: int) -> None:
    x = normal(2, 20, 12)
    state = mixer.init_state(2, 20, max_rollback)
    with torch.no_grad():
        outputs = [mixer.extend(part, state) for part in x.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(outputs, 1), mixer(x, plain(x)), rtol=1e-5, atol=1e-5)
        if max_rollback:
            state.rollback(3)
            again = mixer.extend(x[:, 17:], state)
            torch.testing.assert_close(again, mixer(x, plain(x))[:, 17:], rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient(mixer: SSD) -> None:
    mixer.zero_grad()
    x = normal(2, 70, 12)
    mixer(x, plain(x)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() and p.grad.isfinite().all() for p in mixer.parameters())
