"""The diffuser with its network replaced by the exact posterior mean of a prior that is known.

Everything around the network is then decided: standardisation, parametrisation, noise table, DDIM steps, read-out.
All in fp64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nano_think.experts.diffuser import DiffuserExpert

TOKENS, D, LENGTH = 16, 64, 10
PARAMS = ["posterior", "x0", "v", "eps"]
# frequencies of the tokens in two kinds of context
COUNTS = (720 / torch.arange(1, TOKENS + 1)).round().double()
PRIORS = torch.stack((COUNTS, COUNTS.flip(0))) / COUNTS.sum()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def posterior_mean(x: Tensor, abar: Tensor, scale: float, latents: Tensor, prior: Tensor) -> Tensor:
    """E[x0 | x_tau] where x0 is one of `latents` (V, d) with probabilities `prior` (..., V)."""
    centres = abar.sqrt() * scale * latents
    log_likelihood = (x @ centres.T - centres.square().sum(-1) / 2) / (1 - abar)
    return (prior.log() + log_likelihood).softmax(-1) @ latents


class ExactNetwork(nn.Module):
    """In place of the two-stream network: the exact posterior mean, said in the parametrisation asked for.

    Its context is the expert's input, whose first feature tells which of the two priors holds.
    """

    def __init__(self, expert: DiffuserExpert, latents: Tensor) -> None:
        super().__init__()
        self.param, self.schedule = expert.param, expert.schedule
        self.variance = expert.variance if expert.param == "posterior" else torch.ones(D)
        self.latents, self.context_in = latents, nn.Identity()

    def clean_stream(self, context: Tensor, layout: object) -> list:
        return []

    def forward(self, x: Tensor, tau: int, context: Tensor, clean: list, *_: object) -> Tensor:
        abar, scale = self.schedule.abar[tau], self.schedule.input_scale
        mean = posterior_mean(x, abar, scale, self.latents, PRIORS[(context[..., 0] > 0).long()])
        a, g = abar.sqrt(), (1 - abar).sqrt()
        signal, noise = (a * scale / g).square(), a * scale / g.square()
        return {
            "x0": mean,
            "v": (a * x - scale * mean) / g,
            "eps": (x - a * scale * mean) / g,
            # so that weighing x in with its precision gives the mean: (m / variance + noise x) / (sum of both)
            "posterior": self.variance * (mean * (1 / self.variance + signal) - noise * x),
        }[self.param]


def exact(param: str, scale: float = 0.5, variance: Tensor | None = None) -> tuple[DiffuserExpert, Tensor]:
    """An expert with the exact network, and the hidden states (V, d) that its latents stand for."""
    hidden = 3 * normal(TOKENS, D, seed=1) + 2
    expert = DiffuserExpert(D, 1, 2, 8, param=param, input_scale=scale, max_positions=LENGTH).double().eval()
    expert.fit_statistics(
        torch.cat([hidden.repeat_interleave(c.long(), 0) for c in (COUNTS, COUNTS.flip(0))])
    )
    if variance is not None:
        expert.variance.copy_(variance)
    mean = PRIORS.mean(0) @ hidden
    std = (PRIORS.mean(0) @ (hidden - mean).square()).sqrt()
    expert.denoiser = ExactNetwork(expert, (hidden - mean) / std)
    return expert, hidden


def contexts() -> tuple[Tensor, Tensor]:
    """Inputs (2, L, d) and the prior (2, L, V) that each of them stands for."""
    c = normal(2, LENGTH, D, seed=2)
    return c, PRIORS[(c[..., 0] > 0).long()]


@pytest.mark.parametrize("param", ["posterior", "x0", "v"])
def test_one_step_reads_out_the_entropy_of_every_context(param: str) -> None:
    """fp64: weights to 1e-6, cross-entropy to 1e-6. eps is left out: its last level keeps 1% of the amplitude."""
    (expert, hidden), (c, prior) = exact(param), contexts()
    out = expert(c, steps=1)
    # 16 vectors in 64 dimensions are independent, so the mixture weights can be read back
    weights = torch.linalg.lstsq(hidden.T, out.flatten(0, 1).T).solution.T.view_as(prior)
    torch.testing.assert_close(weights, prior, atol=1e-6, rtol=0)
    cross_entropy, entropy = -(prior * weights.log()).sum(-1), -(prior * prior.log()).sum(-1)
    torch.testing.assert_close(cross_entropy, entropy, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("param", PARAMS)
def test_every_parametrisation_takes_the_steps_of_the_formula(param: str, steps: int, scale: float) -> None:
    """fp64, to 1e-7: x' = a' s x0 + g' (x - a s x0) / g from the noise table down, the last x0 read out."""
    variance = torch.linspace(0.1, 2, D, dtype=torch.float64) if param == "posterior" else None
    (expert, hidden), (c, prior) = exact(param, scale, variance), contexts()
    mean, latents = PRIORS.mean(0) @ hidden, expert.denoiser.latents
    std = (PRIORS.mean(0) @ (hidden - mean).square()).sqrt()
    x = expert.noise[:LENGTH].expand(2, -1, -1)
    for step in range(steps):
        abar, abar_next = (expert.schedule.abar[100 - 100 * s // steps] for s in (step, step + 1))
        x0 = posterior_mean(x, abar, scale, latents, prior)
        if param == "eps":
            x0 = x0.clamp(-4, 4)
        direction = (x - abar.sqrt() * scale * x0) / (1 - abar).sqrt()
        x = abar_next.sqrt() * scale * x0 + (1 - abar_next).sqrt() * direction
    torch.testing.assert_close(expert(c, steps=steps), mean + std * x0, atol=1e-7, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("param", PARAMS)
def test_parametrisation_round_trips_at_every_level(param: str, scale: float) -> None:
    """fp64, to 1e-9, both ways round."""
    expert, _ = exact(param, scale, torch.linspace(0.1, 2, D).double() if param == "posterior" else None)
    tau = torch.arange(1, 101)
    x0, eps = normal(100, 2, D).clamp(-3.9, 3.9), normal(100, 2, D, seed=1)
    x = expert.schedule.add_noise(x0, eps, tau)
    prediction = expert.from_x0(x0, x, tau)
    torch.testing.assert_close(expert.to_x0(prediction, x, tau), x0, atol=1e-9, rtol=0)
    torch.testing.assert_close(
        expert.from_x0(expert.to_x0(prediction, x, tau), x, tau), prediction, atol=1e-9, rtol=1e-9
    )
    if param == "posterior":
        abar, variance = expert.schedule.abar[1:].view(-1, 1, 1), expert.variance
        precision = abar * scale**2 / (1 - abar)
        weighed = (prediction / variance + abar.sqrt() * scale / (1 - abar) * x) / (1 / variance + precision)
        torch.testing.assert_close(weighed, x0, atol=1e-9, rtol=0)


def test_the_oracle_notices_a_wrong_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps with the latent weighed in by half do not arrive where the exact network leads."""
    (expert, _), (c, _) = exact("posterior"), contexts()
    before, gain = expert(c, steps=10), expert.schedule.gain
    monkeypatch.setattr(expert.schedule, "gain", lambda *arguments: 0.5 * gain(*arguments))
    assert (expert(c, steps=10) - before).abs().max() > 1e-3
