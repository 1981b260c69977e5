"""The rounds: gates before the clock, every case in every round, an order that turns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.harness.case import Case, GateError, Group, close
from benchmarks.harness.measure import measure, time_units
from benchmarks.harness.peaks import Peaks


class Log:
    """What happened, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def case(
        self, name: str, check: Callable[[], object] | None = None, max_rounds: int | None = None
    ) -> Case:
        def setup() -> Callable[[], object]:
            self.events.append(f"setup {name}")
            return lambda: self.events.append(name)

        return Case(name, setup, tokens=1, check=check, max_rounds=max_rounds)


def quiet(_: str) -> None:
    pass


@pytest.fixture(autouse=True)
def small_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks of the size of a test, whatever a run asks for."""
    monkeypatch.setattr("benchmarks.harness.measure.Peaks", lambda quick, device: Peaks(quick=True))


def test_every_case_runs_once_a_round_in_a_turning_order() -> None:
    log = Log()
    measured = measure(Group("t", [log.case(name) for name in "abc"]), 3, quick=True, say=quiet)
    assert log.events == ["setup a", "setup b", "setup c", *"abc", *"bca", *"cab"]
    assert [list(r.samples) for r in measured.rounds] == [["a", "b", "c"]] * 3
    assert all(set(r.peaks) == {"fp32", "bf16", "read"} for r in measured.rounds)


def test_a_slow_peer_runs_in_its_rounds_only() -> None:
    log = Log()
    measured = measure(Group("t", [log.case("a"), log.case("slow", max_rounds=1)]), 2, quick=True, say=quiet)
    assert ["slow" in r.samples for r in measured.rounds] == [True, False]
    assert log.events.count("slow") == 1


def test_time_that_is_up_ends_the_rounds_and_keeps_those_that_are_done() -> None:
    said: list[str] = []
    group = Group("t", [Log().case("a")])
    measured = measure(group, 9, quick=True, say=said.append, seconds=0)
    assert len(measured.rounds) == 1
    assert said[-1] == "no time for more than 1 of 9 rounds"


def test_short_work_is_repeated_within_a_round() -> None:
    square = torch.ones(64, 64)
    measured = measure(Group("t", [Case("a", lambda: lambda: square @ square, tokens=1)]), 1, say=quiet)
    assert measured.rounds[0].samples["a"].units > 10


def test_a_failed_gate_times_nothing() -> None:
    def wrong() -> None:
        close("the output", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), 1e-3)

    log = Log()
    group = Group("t", [log.case("a"), log.case("b", check=wrong)])
    with pytest.raises(GateError, match=r"b is wrong, so nothing was timed: the output differs by 0\.048"):
        measure(group, 3, say=quiet)
    assert log.events == []


def test_a_gate_that_breaks_fails_too_and_a_shared_one_runs_once() -> None:
    calls: list[int] = []

    def shared() -> None:
        calls.append(1)

    def broken() -> None:
        raise RuntimeError("no such weight")

    log = Log()
    group = Group("t", [log.case("a", shared), log.case("b", shared), log.case("c", broken)])
    with pytest.raises(GateError, match=r"c is wrong.*no such weight"):
        measure(group, 1, say=quiet)
    assert len(calls) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.2])
def test_close_refuses_what_is_far_or_not_finite(value: float) -> None:
    close("x", torch.ones(2), torch.ones(2) * (1 + 1e-6), 1e-4)
    with pytest.raises(GateError):
        close("x", torch.tensor([1.0, value]), torch.ones(2), 1e-2)


def test_units_are_counted_and_timed() -> None:
    calls: list[int] = []
    sample = time_units(lambda: calls.append(1), 7)
    assert (len(calls), sample.units) == (7, 7)
    assert sample.seconds() == sample.cpu / 7
    assert sample.seconds("cuda") == sample.wall / 7


def test_peaks_are_positive_and_leave_the_precision_alone() -> None:
    before = torch.get_float32_matmul_precision()
    peaks = Peaks(quick=True).measure()
    assert all(rate > 1e6 for rate in peaks.values())
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(("stays", "tried"), [(True, {"highest", "medium"}), (False, {"highest"})])
def test_the_fp32_peak_is_of_fp32_arithmetic(
    monkeypatch: pytest.MonkeyPatch, stays: bool, tried: set[str]
) -> None:
    """Where "medium" rounds to bf16 its products are faster, and no peak of fp32."""
    seen: set[str] = set()

    def mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        if a.dtype == torch.float32:
            seen.add(torch.get_float32_matmul_precision())

    monkeypatch.setattr("benchmarks.harness.peaks.fp32_stays", lambda setting: stays)
    monkeypatch.setattr("torch.mm", mm)
    Peaks(quick=True).measure()
    assert seen == tried
