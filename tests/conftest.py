"""What every test may rely on: one thread, no network, private cache folders, and live parameters."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
os.environ["WANDB_MODE"] = "disabled"
_HOME = tempfile.TemporaryDirectory(prefix="nano_think_tests_")
os.environ["HF_HOME"] = os.environ["MPLCONFIGDIR"] = _HOME.name

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def randomise() -> Callable[..., nn.Module]:
    """`randomise(module, seed=0, scale=1.0)` puts seeded noise into every parameter and returns the module.

    Zero and constant initialisations (gates, output projections, norm gains) hide the paths behind them, so
    that an audit of a fresh module sees nothing. Matrices get std scale / sqrt(fan-in), vectors std scale.
    """

    def fill(module: nn.Module, seed: int = 0, scale: float = 1.0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise * (scale / fan_in**0.5))
        return module

    return fill
