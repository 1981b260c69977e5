"""Medians, ratios and shares on invented rounds whose answers are known."""

from __future__ import annotations

import json

import pytest

from benchmarks.harness.case import Case, Group
from benchmarks.harness.statistics import FlopsError, Measured, Round, Sample, as_json, from_json, slope

PEAKS = {"fp32": 100.0, "bf16": 200.0, "read": 10.0}


def nothing() -> object:
    return lambda: None


def case(name: str, **more: object) -> Case:
    return Case(name, nothing, **{"tokens": 10, **more})


def rounds(*speeds: dict[str, float]) -> list[Round]:
    """Rounds in which a case takes that many CPU seconds a unit, twice as many on the wall, two units each."""
    return [
        Round(PEAKS, {name: Sample(2 * seconds, 4 * seconds, 2) for name, seconds in speed.items()})
        for speed in speeds
    ]


def test_rates_are_medians_with_quartiles() -> None:
    measured = Measured(Group("t", [case("a")]), rounds({"a": 1}, {"a": 2}, {"a": 4}, {"a": 5}, {"a": 10}))
    (row,) = measured.rows()
    assert (row.rate, row.low, row.high) == (10 / 4, 10 / 5, 10 / 2)
    assert row.milliseconds == 4000
    assert row.wall_rate == 10 / 8
    assert (row.share, row.ratios) == (None, {})


def test_a_ratio_is_taken_inside_each_round_before_the_median() -> None:
    group = Group("t", [case("ours", peers=("theirs",)), case("theirs")])
    # a machine that slows down by 10 between the rounds: medians of the rates would say 0.5, 5 or 50
    measured = Measured(group, rounds({"ours": 1, "theirs": 5}, {"ours": 10, "theirs": 50}))
    assert measured.rows()[0].ratios == {"theirs": 5.0}


def test_a_ratio_counts_the_tokens_of_each() -> None:
    group = Group("t", [case("ours", tokens=10, peers=("theirs",)), case("theirs", tokens=40)])
    assert Measured(group, rounds({"ours": 1, "theirs": 4})).rows()[0].ratios == {"theirs": 1.0}


def test_a_peer_that_stopped_counts_in_its_own_rounds() -> None:
    group = Group("t", [case("ours", peers=("slow",)), case("slow", max_rounds=1)])
    measured = Measured(group, rounds({"ours": 1, "slow": 8}, {"ours": 2}, {"ours": 3}))
    ours, slow = measured.rows()
    assert ours.ratios == {"slow": 8.0}
    assert (slow.rate, slow.low, slow.high) == (10 / 8, 10 / 8, 10 / 8)


def test_a_peer_that_is_not_there_leaves_no_ratio() -> None:
    from benchmarks.harness.case import Missing

    group = Group("t", [case("ours", peers=("gone",))], [Missing("gone", "not installed")])
    assert Measured(group, rounds({"ours": 1})).rows()[0].ratios == {}


@pytest.mark.parametrize(("peak", "share"), [("fp32", 0.8), ("bf16", 0.4)])
def test_the_share_is_of_the_peak_of_the_same_round(peak: str, share: float) -> None:
    measured = Measured(Group("t", [case("a", flops=160, peak=peak)]), rounds({"a": 2}))
    assert measured.rows()[0].share == pytest.approx(share)


def test_the_share_of_bandwidth_counts_bytes() -> None:
    measured = Measured(Group("t", [case("a", flops=1e9, bytes=5, peak="read")]), rounds({"a": 1}))
    assert measured.rows()[0].share == 0.5


def test_more_than_the_peak_is_an_error_that_blames_the_formula() -> None:
    measured = Measured(Group("t", [case("a", flops=101)]), rounds({"a": 1}))
    with pytest.raises(FlopsError, match=r"a would run at 1\.01 of the fp32 peak.*formula of its FLOPs"):
        measured.rows()


def test_figures_of_a_group_are_medians_over_rounds() -> None:
    group = Group(
        "t",
        [case("a"), case("b")],
        derived={"sum": lambda m: m.over_rounds(lambda s: s["a"] + s["b"])},
    )
    measured = Measured(group, rounds({"a": 1, "b": 1}, {"a": 5, "b": 6}, {"a": 2, "b": 1}))
    assert measured.derived() == {"sum": 3}
    assert measured.seconds("b") == [1, 6, 1]
    assert measured.peak("read") == 10.0


@pytest.mark.parametrize("power", [1, 2])
def test_slope_of_a_power(power: int) -> None:
    sizes = [256, 512, 1024, 4096]
    assert slope(sizes, [3e-5 * size**power for size in sizes]) == pytest.approx(power)


def test_rounds_survive_json() -> None:
    taken = rounds({"a": 1, "b": 2}, {"a": 3})
    assert from_json(json.loads(json.dumps(as_json(taken)))) == taken


def test_groups_refuse_equal_names_and_unknown_peers() -> None:
    with pytest.raises(ValueError, match="names of their own"):
        Group("t", [case("a"), case("a")])
    with pytest.raises(ValueError, match="unknown cases"):
        Group("t", [case("a", peers=("b",))])
