"""What the rounds say: medians of rates, of ratios inside a round, of shares of the peak inside a round.

A machine's speed drifts by more than the differences that matter. Whatever compares two numbers therefore takes
both from the same round, and the median is taken of the ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

from benchmarks.harness.case import Group, Peak


class FlopsError(ValueError):
    """A case is said to do more than the machine can."""


@dataclass(frozen=True)
class Sample:
    """One case in one round: `units` units of work in that much CPU time (all threads) and wall time, seconds."""

    cpu: float
    wall: float
    units: int

    def seconds(self, device: str = "cpu") -> float:
        """Of one unit: CPU seconds where a CPU did the work, otherwise seconds of the wall clock."""
        return (self.cpu if device == "cpu" else self.wall) / self.units


@dataclass(frozen=True)
class Round:
    """Peaks and samples that were taken within the same minute.

    peaks: FLOP (`fp32`, `bf16`) or bytes (`read`) per CPU second (GPU: of the wall clock). samples: by case.
    """

    peaks: Mapping[Peak, float]
    samples: Mapping[str, Sample]


@dataclass(frozen=True)
class Row:
    """A case's medians over the rounds; None where it claims no FLOPs or has no peer in any round.

    rate: tokens per CPU second (GPU: of the wall clock). wall_rate: tokens per second of wall time, all threads.
    low, high: quartiles of `rate`. share: of the peak of the same round. ratios: to each peer.
    """

    name: str
    milliseconds: float
    rate: float
    low: float
    high: float
    wall_rate: float
    share: float | None
    ratios: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """A group and everything that its rounds measured."""

    group: Group
    rounds: Sequence[Round]

    def seconds(self, case: str) -> list[float]:
        """Seconds of one unit of a case, round by round, by the clock of the group's device."""
        return [self._time(r, case) for r in self.rounds if case in r.samples]

    def over_rounds(self, figure: Callable[[Mapping[str, float]], float]) -> float:
        """Median of a figure that is computed from the seconds a unit of the cases of one round."""
        return median(figure({name: self._time(r, name) for name in r.samples}) for r in self.rounds)

    def rows(self) -> list[Row]:
        """One row a case; raises FlopsError where a share is above 1."""
        return [self._row(number) for number in range(len(self.group.cases))]

    def derived(self) -> dict[str, float]:
        """The group's own figures."""
        return {name: figure(self) for name, figure in self.group.derived.items()}

    def _time(self, taken: Round, case: str) -> float:
        return taken.samples[case].seconds(self.group.device)

    def peak(self, name: Peak) -> float:
        """Median of a peak over the rounds."""
        return median(r.peaks[name] for r in self.rounds)

    def _row(self, number: int) -> Row:
        case = self.group.cases[number]
        rounds = [r for r in self.rounds if case.name in r.samples]
        rates = [case.tokens / self._time(r, case.name) for r in rounds]
        low, high = (quantiles(rates, method="inclusive")[i] for i in (0, 2)) if rates[1:] else rates * 2
        return Row(
            case.name,
            milliseconds=1e3 * median(self.seconds(case.name)),
            rate=median(rates),
            low=low,
            high=high,
            wall_rate=median(case.tokens * s.units / s.wall for s in (r.samples[case.name] for r in rounds)),
            share=self._share(case.name, case.amount, case.peak),
            ratios={peer: ratio for peer in case.peers if (ratio := self.ratio(case.name, peer)) is not None},
        )

    def ratio(self, case: str, peer: str) -> float | None:
        """Tokens per CPU second over those of the peer, median of the rounds that have both; None without any."""
        tokens = {c.name: c.tokens for c in self.group.cases}
        ratios = [
            tokens[case] / self._time(r, case) * self._time(r, peer) / tokens[peer]
            for r in self.rounds
            if case in r.samples and peer in r.samples
        ]
        return median(ratios) if ratios else None

    def _share(self, case: str, amount: float, peak: Peak) -> float | None:
        if not amount:
            return None
        shares = [amount / self._time(r, case) / r.peaks[peak] for r in self.rounds if case in r.samples]
        share = median(shares)
        if share > 1:
            raise FlopsError(
                f"{case} would run at {share:.2f} of the {peak} peak, and nothing can be above 1: the formula of "
                f"its {'bytes' if peak == 'read' else 'FLOPs'} counts work that is not done"
            )
        return share


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Least-squares slope of log seconds over log size: 1 is linear, 2 quadratic."""
    x, y = [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )


def as_json(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """Rounds as plain data."""
    return [
        {"peaks": dict(r.peaks), "samples": {name: vars(sample) for name, sample in r.samples.items()}}
        for r in rounds
    ]


def from_json(rounds: Sequence[Mapping[str, Any]]) -> list[Round]:
    """What `as_json` made."""
    return [
        Round(r["peaks"], {name: Sample(**sample) for name, sample in r["samples"].items()}) for r in rounds
    ]
