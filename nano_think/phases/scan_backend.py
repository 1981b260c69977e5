"""Which backend of the selective scan a fit runs on: chosen at its first start, kept by one that resumes.

The backends agree to rounding only: a fit that went on with another would no longer be the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from nano_think.nn.mixers.s6 import S6
from nano_think.ops.selective_scan import Backend, choose_backend
from nano_think.phases.choices import Choices


def choose_scan(model: nn.Module, choices: Choices, device: torch.device, precision: str) -> None:
    """Settle `scan` among the choices of a fit, where the model has mixers that leave it open."""
    if _open_mixers(model):
        choices.choose("scan", lambda: choose_backend("auto", device, _dtype(precision)))


@contextmanager
def chosen_scan(
    model: nn.Module, name: str | None, device: torch.device, precision: str, say: Callable[[str], object]
) -> Iterator[None]:
    """Inside, mixers that leave it open run on the backend of that name.

    Where the machine cannot, because a fit resumes on another or has lost its compiler, a line says so and `auto`
    decides.
    """
    try:
        name = name and choose_backend(name, device, _dtype(precision))
    except ValueError as error:
        say(f"[yellow]warning: the fit began with another selective scan: {error}[/yellow]")
        name = None
    mixers = _open_mixers(model) if name else []
    for mixer in mixers:
        mixer.backend = cast(Backend, name)
    try:
        yield
    finally:
        for mixer in mixers:
            mixer.backend = "auto"


def _open_mixers(model: nn.Module) -> list[S6]:
    return [module for module in model.modules() if isinstance(module, S6) and module.backend == "auto"]


def _dtype(precision: str) -> torch.dtype:
    return torch.float64 if precision.startswith("64") else torch.float32
