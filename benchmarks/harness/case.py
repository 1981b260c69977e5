"""What a benchmark group says about itself: its cases, its gates and the peers that are not there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.harness.statistics import Measured

Peak = Literal["fp32", "bf16", "read"]
Work = Callable[[], object]


class GateError(AssertionError):
    """A case does not compute what it should: no time of it means anything."""


@dataclass(frozen=True)
class Options:
    """What the command line asks of a group.

    quick: sizes of a test, every case in well under a second. compiled: also cases under torch.compile.
    large: the sizes at which peak memory is measured; the cases have the same names as without it.
    checkpoint: a folder of a trained model, for the groups that can time one.
    """

    quick: bool = False
    compiled: bool = False
    large: bool = False
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Case:
    """One thing that is timed.

    name: unique in its group. setup: builds it and returns one unit of work, a callable.
    tokens: tokens (or items) of one unit, of which the table shows the rate per CPU second.
    flops: useful FLOPs of one unit by a formula the group states, 0 where none is claimed.
    bytes: bytes that one unit has to read, 0 where none is claimed.
    peak: what the share of the peak is taken of: the best GEMM of `fp32` or `bf16` (of `flops`) or the `read`
    bandwidth (of `bytes`), all three measured in every round.
    peers: names of cases that this one is compared with, as times as many tokens per CPU second.
    check: the gate; raises where the case is wrong. Cases may share one.
    max_rounds: rounds after which a very slow peer is left out, and no warm-up before them; None for no limit.
    """

    name: str
    setup: Callable[[], Work]
    tokens: float
    flops: float = 0.0
    bytes: float = 0.0
    peak: Peak = "fp32"
    peers: tuple[str, ...] = ()
    check: Callable[[], object] | None = None
    max_rounds: int | None = None

    @property
    def amount(self) -> float:
        """What the share of the peak counts: bytes for `read`, FLOPs otherwise."""
        return self.bytes if self.peak == "read" else self.flops


@dataclass(frozen=True)
class Missing:
    """A peer that cannot run here, and why; it becomes a line of the report."""

    name: str
    why: str


@dataclass(frozen=True)
class Group:
    """Cases that are compared with each other.

    title: what is timed and at which size. notes: how FLOPs are counted, what a peer does differently.
    derived: figures computed from the measurement after the rounds, by name; they fill a table of their own.
    device: where the work is done. On a CPU its seconds are counted, on any other device those of the wall clock,
    from the moment it has nothing left to do to the next such moment; the peaks are those of the device.
    """

    title: str
    cases: Sequence[Case]
    missing: Sequence[Missing] = ()
    notes: Sequence[str] = ()
    derived: Mapping[str, Callable[[Measured], float]] = field(default_factory=dict)
    device: str = "cpu"

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        absent = {missing.name for missing in self.missing}
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"cases must have names of their own: {sorted(doubled)}")
        for case in self.cases:
            if unknown := set(case.peers) - set(names) - absent:
                raise ValueError(f"{case.name!r} is compared with unknown cases: {sorted(unknown)}")


def close(what: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Raise GateError unless |got - want| <= tolerance x the largest |want|, everywhere and finite."""
    got, want = got.detach().double(), want.detach().double()
    error = float((got - want).abs().max() / want.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    if not error <= tolerance:  # NaN fails too
        raise GateError(f"{what} differs by {error:.2g} of its largest value, allowed is {tolerance:.0e}")


def installed(module: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None
