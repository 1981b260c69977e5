"""The exact facts about pools, and the convex fit against autograd, grid search and EM."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_think.ops.pooling import (
    _best_step,
    diversity,
    fit_static_weights,
    geometric_pool,
    linear_pool,
    pool_nll,
    usefulness,
)

SPACES = ["hidden", "prob"]


def random_pool(seed: int, tokens: int = 6, experts: int = 3, vocab: int = 7):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, experts, vocab, generator=generator, dtype=torch.float64)
    weights = torch.rand(tokens, experts, generator=generator, dtype=torch.float64) + 0.01
    labels = torch.randint(vocab, (tokens,), generator=generator)
    return logits, weights / weights.sum(-1, keepdim=True), labels


def expert_nll(logits, labels):
    index = labels[:, None, None].expand(-1, logits.shape[1], 1)
    return -logits.log_softmax(-1).gather(-1, index).squeeze(-1)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_facts_that_hold_for_every_token(seed):
    logits, weights, labels = random_pool(seed)
    nll = expert_nll(logits, labels)
    average = (weights * nll).sum(-1)
    geometric, linear = (pool_nll(logits, weights, labels, space) for space in SPACES)
    assert (geometric <= average + 1e-12).all()
    assert (linear <= average + 1e-12).all()
    assert (linear.unsqueeze(-1) <= nll - weights.log() + 1e-12).all()


def test_pools_are_distributions_by_their_definitions():
    logits, weights, _ = random_pool(1)
    p = logits.softmax(-1)
    product = (p ** weights.unsqueeze(-1)).prod(-2)
    torch.testing.assert_close(geometric_pool(logits, weights).exp(), product / product.sum(-1, keepdim=True))
    torch.testing.assert_close(linear_pool(logits, weights).exp(), (weights.unsqueeze(-1) * p).sum(-2))


def test_one_hot_weights_give_the_expert():
    logits, _, labels = random_pool(2)
    for e, space in itertools.product(range(3), SPACES):
        one_hot = torch.eye(3, dtype=torch.float64)[e].expand(6, 3)
        torch.testing.assert_close(pool_nll(logits, one_hot, labels, space), expert_nll(logits, labels)[:, e])


def test_heskes_identity():
    logits, weights, labels = random_pool(3)
    pool = geometric_pool(logits, weights)
    divergence = (pool.exp().unsqueeze(-2) * (pool.unsqueeze(-2) - logits.log_softmax(-1))).sum(-1)
    label_free = (weights * divergence).sum(-1)
    torch.testing.assert_close(diversity(logits, weights), label_free)
    gain = (weights * expert_nll(logits, labels)).sum(-1) - pool_nll(logits, weights, labels)
    torch.testing.assert_close(gain, label_free)


def test_gradient_of_the_routing_logits():
    """d NLL / d z_e = w_e (A_e - sum_j w_j A_j) with A_e = -(l_e[y] - E_p[l_e])."""
    logits, weights, labels = random_pool(4)
    z = weights.log().requires_grad_()
    (got,) = torch.autograd.grad(pool_nll(logits, z.softmax(-1), labels).sum(), z)
    p = geometric_pool(logits, weights).exp().unsqueeze(-2)
    at_label = logits.gather(-1, labels[:, None, None].expand(-1, 3, 1)).squeeze(-1)
    advantage = (p * logits).sum(-1) - at_label
    want = weights * (advantage - (weights * advantage).sum(-1, keepdim=True))
    torch.testing.assert_close(got, want)


def hidden_experts(tokens: int = 400, experts: int = 3, d: int = 8, vocab: int = 20, seed: int = 0):
    """Experts that each know the label with noise of their own and of different size."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(vocab, d, generator=generator)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    noise = torch.randn(experts, tokens, d, generator=generator)
    scale = torch.linspace(0.8, 2.0, experts).view(-1, 1, 1)
    hidden = {f"e{e}": h for e, h in enumerate(0.6 * (head[labels] + scale * noise))}
    labels[::17] = -100
    return hidden, head, labels


def loss_at(hidden, head, labels, weights, space):
    keep = labels != -100
    logits = torch.stack([h[keep] @ head.T for h in hidden.values()], dim=1).double()
    return pool_nll(logits, torch.as_tensor(weights).double(), labels[keep], space).mean().item()


@pytest.mark.parametrize("space", SPACES)
def test_fit_beats_uniform_every_expert_and_a_grid(space):
    hidden, head, labels = hidden_experts()
    fit = fit_static_weights(hidden, head, labels, space, floor=0.0, chunk=50)
    assert fit.weights.sum().item() == pytest.approx(1.0, abs=1e-9)
    assert fit.nll == pytest.approx(loss_at(hidden, head, labels, fit.weights, space), abs=1e-5)
    assert fit.nll <= fit.nll_per_expert.min().item() + 1e-6
    assert fit.nll <= loss_at(hidden, head, labels, [1 / 3] * 3, space) + 1e-6
    assert fit.history == sorted(fit.history, reverse=True)
    grid = [(i / 20, j / 20, 1 - (i + j) / 20) for i in range(21) for j in range(21 - i)]
    best = min(loss_at(hidden, head, labels, w, space) for w in grid)
    assert best - 2e-2 < fit.nll <= best + 1e-6
    for e, h in enumerate(hidden.values()):
        alone = loss_at({"x": h}, head, labels, [1.0], space)
        assert fit.nll_per_expert[e].item() == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("space", SPACES)
def test_floor_binds_and_the_vertex_wins_without_it(space):
    """An expert of pure noise ends on the floor; the loss stays near the good expert's."""
    hidden, head, labels = hidden_experts(experts=2)
    generator = torch.Generator().manual_seed(5)
    useless = {"good": hidden["e0"], "noise": 3 * torch.randn(hidden["e0"].shape, generator=generator)}
    free = fit_static_weights(useless, head, labels, space, floor=0.0)
    floored = fit_static_weights(useless, head, labels, space, floor=0.05)
    assert free.weights[1].item() == pytest.approx(0.0, abs=1e-6)
    assert free.nll == pytest.approx(free.nll_per_expert[0].item(), abs=1e-5)
    assert floored.weights[1].item() == pytest.approx(0.05, abs=1e-9)
    assert free.nll < floored.nll < free.nll + 0.2


def test_linear_fit_equals_em():
    hidden, head, labels = hidden_experts()
    fit = fit_static_weights(list(hidden.values()), head, labels, "prob", floor=0.0)
    keep = labels != -100
    p = torch.stack([(h[keep] @ head.T).softmax(-1) for h in hidden.values()], dim=1).double()
    p = p.gather(-1, labels[keep][:, None, None].expand(-1, 3, 1)).squeeze(-1)
    weights = torch.full((3,), 1 / 3, dtype=torch.float64)
    for _ in range(3000):
        responsibility = weights * p
        weights = (responsibility / responsibility.sum(1, keepdim=True)).mean(0)
    torch.testing.assert_close(fit.weights, weights, atol=1e-4, rtol=0)


def test_many_tokens_start_from_a_sample_and_end_at_the_same_optimum():
    hidden, head, labels = hidden_experts(tokens=20_000)
    fit = fit_static_weights(hidden, head, labels, floor=0.01)
    assert len(fit.history) <= 4
    cut = {name: h[:10_000] for name, h in hidden.items()}
    direct = fit_static_weights(cut, head, labels[:10_000], floor=0.01)
    assert len(direct.history) > 1
    torch.testing.assert_close(fit.weights, direct.weights, atol=0.05, rtol=0)
    logits = torch.stack([h @ head.T for h in hidden.values()], dim=1).double()[labels != -100]
    w = fit.weights.clone().requires_grad_()
    (grad,) = torch.autograd.grad(pool_nll(logits, w, labels[labels != -100]).mean(), w)
    inside = fit.weights > 0.0101
    assert (grad[inside] - grad[inside].mean()).abs().max() < 1e-4


def test_identical_experts_and_private_heads():
    hidden, head, labels = hidden_experts(experts=2)
    twins = {"a": hidden["e0"], "b": hidden["e0"]}
    fit = fit_static_weights(twins, head, labels)
    assert fit.nll == pytest.approx(fit.nll_per_expert[0].item(), abs=1e-6)
    heads = [head, head.flip(0)]
    assert fit_static_weights(hidden, heads, labels, "prob").weights[0] > 0.8
    with pytest.raises(ValueError, match="prob"):
        fit_static_weights(hidden, heads, labels, "hidden")
    with pytest.raises(ValueError, match="labelled"):
        fit_static_weights(hidden, head, torch.full_like(labels, -100))


def test_usefulness_is_the_slope_of_the_geometric_loss():
    hidden, head, labels = hidden_experts()
    facts = usefulness(hidden, head, labels, chunk=64)
    assert facts.reference == 0
    for e in (1, 2):
        step = 1e-4
        weights = torch.zeros(3, dtype=torch.float64)
        weights[0], weights[e] = 1 - step, step
        slope = (
            loss_at(hidden, head, labels, weights, "hidden")
            - loss_at(hidden, head, labels, [1.0, 0.0, 0.0], "hidden")
        ) / step
        assert (facts.gap[e] - facts.kl[e]).item() == pytest.approx(slope, abs=5e-3)
        assert bool(facts.helps[e]) == (slope < 0)
    assert facts.gap[0] == 0
    assert facts.kl[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_newton_step_is_the_minimum_of_the_quadratic_on_the_floored_simplex(seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    grad, hessian = torch.randn(3, generator=generator, dtype=torch.float64), root @ root.T
    weights, floor = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 0.05
    step, promised = _best_step(weights, grad, hessian, floor)
    target = weights + step
    assert target.min() >= floor - 1e-9
    assert target.sum().item() == pytest.approx(1.0)
    sides = torch.arange(171, dtype=torch.float64) * 0.005 + floor
    first, second = torch.meshgrid(sides, sides, indexing="ij")
    grid = torch.stack((first, second, 1 - first - second), dim=-1).flatten(0, 1)
    moves = grid[grid[:, 2] >= floor - 1e-9] - weights
    values = moves @ grad + ((moves @ hessian) * moves).sum(-1) / 2
    assert values.min().item() - 1e-3 <= -promised <= values.min().item() + 1e-9


@pytest.mark.parametrize("space", SPACES)
def test_a_fit_says_how_many_head_products_it_took(space, monkeypatch):
    """Counted where they are made: one row of a product with the head (V, d) is one."""
    rows, linear = [], torch.nn.functional.linear

    def counted(x, weight):
        rows.append(x.numel() // x.shape[-1])
        return linear(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(50, 6, generator=generator) for _ in range(3)]
    head, labels = torch.randn(9, 6, generator=generator), torch.randint(9, (50,), generator=generator)
    fitted = fit_static_weights(hidden, head, labels, space=space)
    assert fitted.products == sum(rows)
    assert (fitted.products == 3 * 50) == (space == "prob")
