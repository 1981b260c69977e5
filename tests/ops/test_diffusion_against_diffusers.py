"""Schedules and DDIM steps against the scheduler of `diffusers`, whose timestep t is our level t + 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nano_think.ops.diffusion import NoiseSchedule, ddim_sample, ddim_timesteps


@pytest.fixture(scope="module")
def scheduler() -> Callable[..., Any]:
    """`scheduler(**options)`: theirs, clipping nothing and going from the last level to clean data."""
    reason = "diffusers is not in the dev extra: `pip install diffusers` to compare with its DDIM scheduler"
    diffusers = pytest.importorskip("diffusers", reason=reason)
    same = {"num_train_timesteps": 100, "clip_sample": False, "timestep_spacing": "trailing"}
    return lambda **options: diffusers.DDIMScheduler(**same, **options)


def test_schedules_are_theirs(scheduler: Callable[..., Any]) -> None:
    """fp32, to 1e-5; they keep the cosine's last beta below 1, so that one level differs."""
    linear = {"beta_start": 1e-3, "beta_end": 0.2, "rescale_betas_zero_snr": True}
    theirs = scheduler(beta_schedule="linear", **linear).alphas_cumprod
    torch.testing.assert_close(NoiseSchedule("linear").abar[1:].float(), theirs, atol=1e-5, rtol=0)
    theirs = scheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    torch.testing.assert_close(NoiseSchedule().abar[1:-1].float(), theirs[:-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("param", "name"), [("x0", "sample"), ("eps", "epsilon"), ("v", "v_prediction")])
def test_steps_are_theirs_with_gradients(scheduler: Callable[..., Any], param: str, name: str) -> None:
    """The same made-up network in both samplers; fp64, to 1e-9, relative where eps makes it large."""
    schedule = NoiseSchedule(terminal=1e-4 if param == "eps" else 0.0)

    def network(x: Tensor, tau: int) -> Tensor:
        return 0.5 * torch.sin(x + tau / 100)

    for count in (1, 2, 10, 50, 100):
        theirs, steps = scheduler(prediction_type=name), ddim_timesteps(count, 100)
        # their own table is fp32, which would decide the comparison
        theirs.alphas_cumprod = schedule.abar[1:]
        theirs.set_timesteps(count)
        assert [t + 1 for t in theirs.timesteps.tolist()] == steps
        start = torch.randn(
            2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        ).requires_grad_()
        ours = ddim_sample(
            schedule, lambda x, tau: schedule.to_x0(network(x, tau), x, tau, param), start, steps
        )
        x = start
        for t in theirs.timesteps.tolist():
            x = theirs.step(network(x, t + 1), t, x).prev_sample
        torch.testing.assert_close(ours, x, atol=1e-9, rtol=1e-9)
        grads = [torch.autograd.grad(result.sum(), start)[0] for result in (ours, x)]
        torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-9)
