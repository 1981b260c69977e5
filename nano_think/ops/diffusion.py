"""Gaussian diffusion of latents: noise schedules, parametrisations, deterministic sampling.

Noise levels tau run from 0 (clean) to T. With abar[tau] the share of signal power left, a = sqrt(abar),
g = sqrt(1 - abar) and the input scale s:

    x_tau = a s x0 + g eps        (Ho et al., arXiv 2006.11239, eq. 4)
    v     = a eps - g s x0        (Salimans and Ho, arXiv 2202.00512)

Given x_tau, any one of x0, eps and v determines the other two: s x0 = a x_tau - g v, eps = g x_tau + a v.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

ScheduleKind = Literal["cosine", "linear", "sqrt"]
Param = Literal["x0", "eps", "v"]
TimeSampler = Literal["uniform", "logit_normal", "warp", "seed"]
MOST_LEVELS = 1 << 20


class NoiseSchedule:
    """abar[0..T], decreasing from exactly 1 to exactly `terminal`, and what follows from it.

    cosine: cos^2 with offset 0.008 (Nichol and Dhariwal, arXiv 2102.09672, eq. 17), without their clipping.
    linear: betas 1e-4 .. 2e-2 times 1000 / T (arXiv 2006.11239), a shifted and scaled so that it ends at
        sqrt(terminal) and keeps its first step (Lin et al., arXiv 2305.08891, algorithm 1).
    sqrt: 1 - sqrt(tau / T + 1e-4) (Li et al., arXiv 2205.14217).
    terminal: 0, so that the last level is pure noise; a network that predicts eps needs a little signal
        there, because x0 = (x - g eps) / (a s) is 0 / 0 without it.

    tau arguments are an int or an int64 tensor whose axes are the first ones of x: (), (B,) or (B, L).
    Raises ValueError for an unknown kind, for linear betas that reach 1 (T <= 20), and for T above MOST_LEVELS.
    """

    def __init__(
        self,
        kind: ScheduleKind = "cosine",
        train_T: int = 100,
        terminal: float = 0.0,
        input_scale: float = 1.0,
    ) -> None:
        if kind not in get_args(ScheduleKind):
            raise ValueError(f"schedule must be 'cosine', 'linear' or 'sqrt', not {kind!r}")
        if kind == "linear" and train_T <= 20:
            raise ValueError(
                f"the linear schedule needs train_T above 20, not {train_T}: a beta would reach 1"
            )
        if train_T > MOST_LEVELS:
            raise ValueError(f"train_T={train_T} is more than {MOST_LEVELS} noise levels")
        self.kind, self.train_T, self.terminal, self.input_scale = kind, train_T, terminal, input_scale
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @cached_property
    def abar(self) -> Tensor:
        """Signal power (T + 1,) float64, made when first asked for: networks are also built without numbers."""
        with torch.inference_mode(False):  # as in `levels`
            abar = _signal_power(self.kind, self.train_T, self.terminal).clamp(min=self.terminal)
            abar[0], abar[-1] = 1.0, self.terminal
        return abar

    def levels(self, tau: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a and g of `tau`, in dtype and device of `like` and broadcastable to it."""
        key = (like.device, like.dtype)
        if key not in self._tables:
            # a tensor born in inference mode could never take part in a later training step
            with torch.inference_mode(False):
                self._tables[key] = torch.stack((self.abar.sqrt(), (1 - self.abar).sqrt())).to(*key)
        pair = self._tables[key][:, tau]
        pair = pair.reshape(pair.shape + (1,) * (like.dim() + 1 - pair.dim()))
        return pair[0], pair[1]

    def snr(self) -> Tensor:
        """Signal-to-noise power ratio s^2 abar / (1 - abar) of unit-variance latents, (T + 1,) float64."""
        return self.input_scale**2 * self.abar / (1 - self.abar)

    def add_noise(self, x0: Tensor, eps: Tensor, tau: int | Tensor) -> Tensor:
        """x_tau of x0 (B, L, d) and unit normal eps of the same shape."""
        a, g = self.levels(tau, x0)
        return a * self.input_scale * x0 + g * eps

    def to_x0(self, prediction: Tensor, x: Tensor, tau: int | Tensor, param: Param) -> Tensor:
        """x0 that `prediction` of kind `param` stands for at x = x_tau; from eps it needs abar[tau] > 0."""
        a, g = self.levels(tau, x)
        if param == "x0":
            return prediction
        if param == "v":
            return (a * x - g * prediction) / self.input_scale
        return (x - g * prediction) / (a * self.input_scale)

    def from_x0(self, x0: Tensor, x: Tensor, tau: int | Tensor, param: Param) -> Tensor:
        """The value of kind `param` that belongs to x0 at x = x_tau, tau >= 1: inverse of `to_x0`."""
        a, g = self.levels(tau, x)
        if param == "x0":
            return x0
        if param == "v":
            return (a * x - self.input_scale * x0) / g
        return (x - a * self.input_scale * x0) / g

    def gain(self, variance: Tensor, tau: int | Tensor, like: Tensor) -> Tensor:
        """Share K of an observed deviation x_tau - a s mean by which the mean of x0 has to move.

        For x0 normal around `mean` with `variance` (d,), E[x0 | x_tau] = mean + K (x_tau - a s mean) with
        K = a s variance / (a^2 s^2 variance + g^2): 0 at pure noise, 1 / (a s) without noise. With variance 1
        and mean 0 it is the skip connection of Karras et al., arXiv 2206.00364, eq. 7.
        tau >= 1. Broadcastable to `like` (..., d).
        """
        a, g = self.levels(tau, like)
        signal = a * self.input_scale
        return signal * variance / (signal.square() * variance + g.square())

    def ddim_step(self, x: Tensor, x0: Tensor, tau: int | Tensor, tau_next: int | Tensor) -> Tensor:
        """From level tau to tau_next < tau along the direction of x0, without new noise.

        Song et al., arXiv 2010.02502, eq. 12 with sigma = 0.
        """
        return self.add_noise(x0, self.from_x0(x0, x, tau, "eps"), tau_next)


def _signal_power(kind: ScheduleKind, train_T: int, terminal: float) -> Tensor:
    steps = torch.arange(train_T + 1, dtype=torch.float64) / train_T
    if kind == "cosine":
        f = torch.cos((steps + 0.008) / 1.008 * math.pi / 2).square()
        return f / f[0]
    if kind == "sqrt":
        return 1 - (steps + 1e-4).sqrt()
    betas = torch.linspace(1e-4, 2e-2, train_T, dtype=torch.float64) * 1000 / train_T
    a = torch.cumprod(1 - betas, dim=0).sqrt()
    a = a[0] + (a - a[0]) * (a[0] - math.sqrt(terminal)) / (a[0] - a[-1])
    return torch.cat((torch.ones(1, dtype=torch.float64), a.square()))


def ddim_timesteps(num_steps: int, train_T: int) -> list[int]:
    """`num_steps` evenly spaced levels from T downwards, the first one T itself ("trailing").

    The first must be T because sampling starts from pure noise (arXiv 2305.08891, section 3.3).
    Raises ValueError unless 1 <= num_steps <= T.
    """
    if not 1 <= num_steps <= train_T:
        raise ValueError(f"the number of DDIM steps must lie between 1 and {train_T}, not {num_steps}")
    return [round(train_T * (num_steps - i) / num_steps) for i in range(num_steps)]


def ddim_sample(
    schedule: NoiseSchedule,
    denoise: Callable[[Tensor, int], Tensor],
    x_T: Tensor,
    timesteps: list[int],
    clamp: Callable[[Tensor], Tensor] | None = None,
    grad: Literal["all", "last"] = "all",
) -> Tensor:
    """Run x_T (B, L, d) through the levels `timesteps`; the result is the x0 of the last one.

    denoise: (x, tau) to x0; called exactly once a level.
    clamp: applied to every x0, for instance the nearest embedding (arXiv 2205.14217, section 4.2).
    grad: `last` builds a graph for the last call alone, so memory does not grow with the number of steps.
    """
    x = x0 = x_T
    for tau, tau_next in zip(timesteps, [*timesteps[1:], 0], strict=True):
        with torch.set_grad_enabled(torch.is_grad_enabled() and (grad == "all" or tau_next == 0)):
            x0 = denoise(x, tau)
            x0 = x0 if clamp is None else clamp(x0)
            if tau_next > 0:
                x = schedule.ddim_step(x, x0, tau, tau_next)
    return x0


def sample_timesteps(
    shape: tuple[int, ...],
    train_T: int,
    generator: torch.Generator,
    kind: TimeSampler = "uniform",
    terminal_prob: float = 0.3,
    weights: Tensor | None = None,
) -> Tensor:
    """Training noise levels in 1..T, int64, on the generator's device.

    Level T, the only one every inference uses, comes with probability `terminal_prob`; the others follow
    `kind`: `uniform`, `logit_normal` (Esser et al., arXiv 2403.03206, eq. 19, location 0, scale 1), or `warp`
    in proportion to `weights` (T - 1,), for instance the mean loss of each level (Dieleman et al., arXiv
    2211.15089, section 3.3). `seed` is uniform over 1..T and ignores `terminal_prob`.
    Raises ValueError for an unknown kind and for `warp` without weights of that shape.
    """
    device = generator.device
    if kind == "seed":
        return torch.randint(1, train_T + 1, shape, generator=generator, device=device)
    if kind == "uniform":
        inner = torch.randint(1, train_T, shape, generator=generator, device=device)
    elif kind == "logit_normal":
        share = torch.randn(shape, generator=generator, device=device).sigmoid()
        inner = 1 + (share * (train_T - 1)).long().clamp(max=train_T - 2)
    elif kind == "warp":
        if weights is None or weights.shape != (train_T - 1,):
            raise ValueError(f"time sampler 'warp' needs one weight for each of the levels 1..{train_T - 1}")
        draws = torch.multinomial(weights, math.prod(shape), replacement=True, generator=generator)
        inner = 1 + draws.reshape(shape)
    else:
        raise ValueError(f"time sampler must be 'uniform', 'logit_normal', 'warp' or 'seed', not {kind!r}")
    terminal = torch.rand(shape, generator=generator, device=device) < terminal_prob
    return torch.where(terminal, train_T, inner)


def noise_table(num_positions: int, dim: int, seed: int, chunk: int = 1024) -> Tensor:
    """Unit normal noise (>= num_positions, dim) fp32, the same for the same seed.

    Rows are drawn chunk by chunk from one generator, so that a longer table starts with the shorter one.
    """
    generator = torch.Generator().manual_seed(seed)
    table = torch.empty(chunk * max(1, math.ceil(num_positions / chunk)), dim)
    for rows in table.split(chunk):
        rows.normal_(generator=generator)
    return table
