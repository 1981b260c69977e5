"""Experts under torch.compile for as long as a fit lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from nano_think.experts.diffuser import DiffuserExpert
from nano_think.model import NanoThink


@contextmanager
def compiled(network: nn.Module, wanted: bool = True) -> Iterator[list[str]]:
    """The expert of an `ExpertLM`, or all of a `NanoThink`, compiled in place at their first call.

    In place means that parameters keep their names. Compiled is one graph a shape: a fit has two, that of its
    batches and that of validation's last one, and none is added after both have been seen. Outside, the network is
    as it was. A diffuser is left out, because its objective does not go through `forward`.
    Yields the names of the classes that are compiled.
    """
    experts: list[Any] = (
        list(network.experts.values()) if isinstance(network, NanoThink) else [network.expert]
    )
    parts = [part for part in experts if wanted and not isinstance(part, DiffuserExpert)]
    for part in parts:
        part.compile()
    try:
        yield [type(part).__name__ for part in parts]
    finally:
        for part in parts:
            part._compiled_call_impl = None
