"""Pools of experts' predictions: the two ways to mix, their identities, and the convex fit of fixed weights.

Letters: T tokens, N experts, V vocabulary. With a shared linear head, mixing hidden states mixes logits, which
is the geometric (log-linear) pool; mixing probabilities is the linear pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_think.ops.cross_entropy import IGNORED, linear_cross_entropy

Space = Literal["hidden", "prob"]


def geometric_pool(logits: Tensor, weights: Tensor) -> Tensor:
    """log p with p proportional to prod_e p_e^{w_e}: logits (..., N, V), weights (..., N) to (..., V)."""
    return (weights.unsqueeze(-1) * logits).sum(dim=-2).log_softmax(dim=-1)


def linear_pool(logits: Tensor, weights: Tensor) -> Tensor:
    """log p with p = sum_e w_e p_e: logits (..., N, V), weights (..., N) to (..., V)."""
    return (weights.log().unsqueeze(-1) + logits.log_softmax(dim=-1)).logsumexp(dim=-2)


def pool_nll(logits: Tensor, weights: Tensor, labels: Tensor, space: Space = "hidden") -> Tensor:
    """-log p[label] in nats of the pool of `logits` (..., N, V), labels (...) int64."""
    pool = geometric_pool if space == "hidden" else linear_pool
    return -pool(logits, weights).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def diversity(logits: Tensor, weights: Tensor) -> Tensor:
    """sum_e w_e KL(p_pool || p_e) of the geometric pool, (..., N, V) to (...).

    By Heskes (1998) it is what the pool gains over the average expert, whatever the label:
    sum_e w_e NLL_e - NLL_pool = sum_e w_e logsumexp(l_e) - logsumexp(sum_e w_e l_e).
    """
    pooled = (weights.unsqueeze(-1) * logits).sum(dim=-2).logsumexp(dim=-1)
    return (weights * logits.logsumexp(dim=-1)).sum(dim=-1) - pooled


@dataclass(frozen=True)
class StaticFit:
    """Best constant weights (N,), their loss, each expert's loss (N,) and the loss after every step, nats.

    token_nll: (T, N) loss of each labelled token by each expert, fp64 on the CPU.
    products: how often the fit multiplied one vector by the head.
    """

    weights: Tensor
    nll: float
    nll_per_expert: Tensor
    token_nll: Tensor
    history: list[float] = field(default_factory=list)
    products: int = 0


@dataclass(frozen=True)
class Usefulness:
    """Whether an expert can help next to a reference expert (the first-order criterion of `usefulness`).

    gap: (N,) NLL_e - NLL_reference; kl: (N,) mean KL(p_reference || p_e); both in nats a token.
    """

    reference: int
    gap: Tensor
    kl: Tensor

    @property
    def helps(self) -> Tensor:
        """(N,) bool: a little weight on the expert lowers the geometric pool's loss."""
        return self.gap < self.kl


Hidden: TypeAlias = Mapping[str, Tensor] | Sequence[Tensor]
Heads: TypeAlias = Tensor | Sequence[Tensor]


@torch.no_grad()
def fit_static_weights(
    hidden: Hidden,
    weight: Heads,
    labels: Tensor,
    space: Space = "hidden",
    floor: float = 0.01,
    steps: int = 30,
    chunk: int = 64,
) -> StaticFit:
    """The weights on the simplex, each at least `floor`, that minimise the pool's mean loss.

    hidden: what each expert hands to the head, (T, d) an expert; weight: the head (V, d), or one an expert
    (then only `prob` can mix them); labels: (T,), -100 is left out. The problem is convex in both spaces.

    A slope of the geometric pool costs N head products over all tokens, a loss one. So Newton's method first
    converges on every 16th token, and a single step on all of them remains.
    """
    experts, heads, labels = _labelled(hidden, weight, labels)
    losses = [linear_cross_entropy(h, w, labels, chunk) for h, w in zip(experts, heads, strict=True)]
    nll = torch.stack(losses, dim=1).cpu().double()
    weights = torch.full((len(experts),), 1 / len(experts), dtype=torch.float64)
    if floor * len(experts) > 1:
        raise ValueError(f"floor {floor} is too high for {len(experts)} experts")
    if space == "prob":
        problems: list[Problem] = [_LinearProblem(-nll)]
    elif any(head is not heads[0] for head in heads):
        raise ValueError("experts with private heads have no common logits: fit them with space='prob'")
    else:
        strides = (16, 1) if len(labels) >= 16 * 1024 else (1,)
        problems = [
            _GeometricProblem([h[::n] for h in experts], heads[0], labels[::n], chunk) for n in strides
        ]
    for problem in problems:
        weights, history = _newton(problem, weights, floor, steps)
    products = nll.numel() + sum(problem.products for problem in problems)
    return StaticFit(weights, history[-1], nll.mean(dim=0), nll, history, products)


@torch.no_grad()
def usefulness(
    hidden: Hidden, weight: Heads, labels: Tensor, reference: int | None = None, chunk: int = 64
) -> Usefulness:
    """Loss gap and mean KL of every expert to a reference expert, the best one where none is named.

    The geometric pool's loss changes with the weight of expert e next to the reference at the rate
    (NLL_e - NLL_r) - E KL(p_r || p_e): an expert helps if its gap is smaller than its divergence. A faithful
    student of a calibrated reference has gap = KL, so it helps nothing. Arguments as `fit_static_weights`.
    """
    experts, heads, labels = _labelled(hidden, weight, labels)
    losses = [linear_cross_entropy(h, w, labels, chunk) for h, w in zip(experts, heads, strict=True)]
    nll = torch.stack([loss.cpu().double().mean() for loss in losses])
    reference = int(nll.argmin()) if reference is None else reference
    kl = torch.zeros_like(nll)
    for rows in torch.arange(len(labels), device=labels.device).split(chunk):
        log_p = [F.linear(h[rows], w).float().log_softmax(-1) for h, w in zip(experts, heads, strict=True)]
        p = log_p[reference].exp()
        kl += torch.stack([(p * (log_p[reference] - other)).sum() for other in log_p]).cpu().double()
    return Usefulness(reference, nll - nll[reference], kl / len(labels))


class Problem(Protocol):
    """Mean loss of a pool as a function of constant weights (N,), fp64 on the CPU.

    products: of one vector with the head, so far.
    """

    products: int

    def loss(self, weights: Tensor) -> float:
        """Nats a token."""

    def slopes(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (N,) and Hessian (N, N)."""


class _LinearProblem:
    """-mean log sum_e w_e p_e, from log p_e of the labels (T, N)."""

    def __init__(self, log_p: Tensor) -> None:
        self.log_p, self.products = log_p, 0

    def loss(self, weights: Tensor) -> float:
        return -self._pooled(weights).mean().item()

    def slopes(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        ratio = (self.log_p - self._pooled(weights)).exp()
        return -ratio.mean(dim=0), ratio.T @ ratio / len(ratio)

    def _pooled(self, weights: Tensor) -> Tensor:
        return (weights.log() + self.log_p).logsumexp(dim=1, keepdim=True)


class _GeometricProblem:
    """Loss of the mixed hidden states, gradient E_p[l] - l_y and Hessian Cov_p(l), chunk by chunk."""

    def __init__(self, experts: list[Tensor], head: Tensor, labels: Tensor, chunk: int) -> None:
        self.hidden, self.head, self.labels, self.chunk = torch.stack(experts, dim=1), head, labels, chunk
        self.products = 0

    def loss(self, weights: Tensor) -> float:
        self.products += len(self.labels)
        nll = linear_cross_entropy(self._mixed(self.hidden, weights), self.head, self.labels, self.chunk)
        return nll.double().mean().item()

    def slopes(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        n = len(weights)
        self.products += n * len(self.labels)
        grad, hessian = torch.zeros(n).double(), torch.zeros(n, n).double()
        for rows in torch.arange(len(self.labels), device=self.labels.device).split(self.chunk):
            logits = F.linear(self.hidden[rows], self.head).float()
            p = self._mixed(logits, weights).softmax(dim=-1).unsqueeze(1)
            logits -= (p * logits).sum(dim=-1, keepdim=True)
            at_label = logits.gather(2, self.labels[rows].view(-1, 1, 1).expand(-1, n, 1))
            grad -= at_label.sum(dim=(0, 2)).cpu().double()
            hessian += ((p * logits) @ logits.transpose(1, 2)).sum(dim=0).cpu().double()
        return grad / len(self.labels), hessian / len(self.labels)

    def _mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        return (weights.to(x).unsqueeze(1) * x).sum(dim=1)


def _newton(problem: Problem, weights: Tensor, floor: float, steps: int) -> tuple[Tensor, list[float]]:
    """Newton steps inside the floored simplex, each halved until the loss falls; the losses after them."""
    history = [problem.loss(weights)]
    for _ in range(steps):
        direction, promised = _best_step(weights, *problem.slopes(weights), floor)
        if promised < 1e-7:
            break
        step, loss = 1.0, problem.loss(weights + direction)
        while loss > history[-1] - 1e-4 * step * promised and step > 1e-3:
            step /= 2
            loss = problem.loss(weights + step * direction)
        if loss >= history[-1]:
            break
        weights = weights + step * direction
        history.append(loss)
        if promised < 1e-4:  # convergence is quadratic: nothing that matters is left behind such a step
            break
    return weights, history


def _best_step(weights: Tensor, grad: Tensor, hessian: Tensor, floor: float) -> tuple[Tensor, float]:
    """Exact minimum of the quadratic model over the floored simplex, and the decrease it promises.

    For a handful of experts the active set is found by trying every set that may lie on the floor.
    """
    n = len(weights)
    hessian = hessian + 1e-9 * (1 + hessian.trace()) * torch.eye(n, dtype=hessian.dtype)
    best, promised = torch.zeros_like(weights), 0.0
    for free in _subsets(n):
        fixed = [e for e in range(n) if e not in free]
        step = floor - weights
        kkt = torch.ones(len(free) + 1, len(free) + 1, dtype=hessian.dtype)
        kkt[:-1, :-1], kkt[-1, -1] = hessian[free][:, free], 0.0
        right = torch.cat((-grad[free] - hessian[free][:, fixed] @ step[fixed], -step[fixed].sum().view(1)))
        step[free] = torch.linalg.solve(kkt, right)[:-1]
        decrease = -(grad @ step + step @ hessian @ step / 2).item()
        if decrease > promised and bool((weights + step >= floor - 1e-12).all()):
            best, promised = step, decrease
    return best, promised


def _subsets(n: int) -> Iterator[list[int]]:
    """All non-empty sets of experts."""
    for size in range(1, n + 1):
        yield from (list(chosen) for chosen in combinations(range(n), size))


def _labelled(hidden: Hidden, weight: Heads, labels: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """One (T, d) and one head an expert, with the unlabelled tokens left out."""
    experts = list(hidden.values()) if isinstance(hidden, Mapping) else list(hidden)
    heads = [weight] * len(experts) if isinstance(weight, Tensor) else list(weight)
    keep = labels != IGNORED
    if not bool(keep.any()):
        raise ValueError("a fit of pool weights needs at least one labelled token")
    return [h[keep] for h in experts], heads, labels[keep]
