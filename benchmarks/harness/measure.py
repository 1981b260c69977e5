"""The measurement: gates first, then rounds in which every case runs once, in an order that changes."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable

from benchmarks.harness.case import Case, GateError, Group, Work
from benchmarks.harness.peaks import Peaks, wait_for
from benchmarks.harness.statistics import Measured, Round, Sample

LEAST_SECONDS = 0.2  # short work is repeated inside a round until it takes about this long
Say = Callable[[str], object]


def pass_gates(group: Group, say: Say = print) -> None:
    """Run every gate once; raises GateError with the name of the case at the first that fails."""
    passed: set[Callable[[], object]] = set()
    for case in group.cases:
        if case.check is None or case.check in passed:
            continue
        say(f"gate: {case.name}")
        try:
            case.check()
        except Exception as error:
            raise GateError(f"{case.name} is wrong, so nothing was timed: {error}") from error
        passed.add(case.check)


def measure(
    group: Group, rounds: int, quick: bool = False, say: Say = print, seconds: float = math.inf
) -> Measured:
    """Gates, set-up with one unit of warm-up each, then the rounds.

    The order of the cases turns by one place a round, so that none always follows the same neighbour.
    seconds: no round but the first begins when so many have passed since the call.
    """
    began = time.monotonic()
    pass_gates(group, say)
    works, units = {}, {}
    for case in group.cases:
        say(f"set up: {case.name}")
        works[case.name] = case.setup()
        slow = quick or case.max_rounds is not None
        units[case.name] = 1 if slow else _units(works[case.name], group.device)
    peaks = Peaks(quick, group.device)
    taken = []
    for number in range(rounds):
        if number and time.monotonic() - began > seconds:
            say(f"no time for more than {number} of {rounds} rounds")
            break
        say(f"round {number + 1} of {rounds}")
        turned = [group.cases[(number + i) % len(group.cases)] for i in range(len(group.cases))]
        due = [case for case in turned if _due(case, number)]
        measured_peaks = peaks.measure()
        samples = {case.name: time_units(works[case.name], units[case.name], group.device) for case in due}
        taken.append(Round(measured_peaks, {c.name: samples[c.name] for c in group.cases if c in due}))
    return Measured(group, taken)


def time_units(work: Work, units: int, device: str = "cpu") -> Sample:
    """CPU and wall time of that many calls; garbage of earlier cases is collected before the clock starts.

    Processes that a call starts and waits for count as its own.
    """
    gc.collect()
    wait_for(device)
    wall, cpu = time.perf_counter(), _cpu_seconds()
    for _ in range(units):
        work()
    wait_for(device)
    return Sample(_cpu_seconds() - cpu, time.perf_counter() - wall, units)


def _cpu_seconds() -> float:
    """Of this process and of all its children that have ended."""
    of_children = os.times()
    return time.process_time() + of_children.children_user + of_children.children_system


def _due(case: Case, number: int) -> bool:
    return case.max_rounds is None or number < case.max_rounds


def _units(work: Work, device: str) -> int:
    """How many calls make LEAST_SECONDS, after one call that warms up."""
    first = time_units(work, 1, device).seconds(device)
    if first >= LEAST_SECONDS:
        return 1
    return max(1, round(LEAST_SECONDS / max(time_units(work, 1, device).seconds(device), 1e-6)))
