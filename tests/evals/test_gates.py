"""Every gate on both sides of its threshold, and open where a figure is missing."""

from __future__ import annotations

import json
import math

import pytest

from nano_think.evals.bootstrap import Difference
from nano_think.evals.gates import (
    diffuser_gate,
    final_gate,
    memory_gate,
    router_gate,
    state_space_gate,
    static_gain_gate,
    training_gate,
    transformer_gate,
    usefulness_gate,
)
from nano_think.evals.report import plain
from nano_think.evals.seeds import SeedDifference

BETTER = Difference(-0.05, -0.08, -0.02, 40)
NOISE = Difference(-0.05, -0.12, 0.02, 40)
WORSE = Difference(0.05, 0.02, 0.08, 40)
UNKNOWN = Difference(-0.05, math.nan, math.nan, 1)
# sure of its sign, and below what seeds alone make of the baseline
SMALL = SeedDifference(-0.01, -0.012, -0.008, 40, 0.95, (-0.01,) * 3, 0.001, 0.001, "loss", 0.02)
USED = {1: 3.70, 4: 3.60, 10: 3.56}

CASES = [
    (transformer_gate, (3.79, 4.0), True),
    (transformer_gate, (3.81, 4.0), False),
    (transformer_gate, (None, 4.0), None),
    (transformer_gate, (3.0, math.nan), None),
    (state_space_gate, (3.64, 3.5), True),
    (state_space_gate, (3.66, 3.5), False),
    (state_space_gate, (3.3, 3.5), True),
    (state_space_gate, (3.6, None), None),
    (diffuser_gate, (3.99, 4.0, USED, 4), True),
    (diffuser_gate, (4.0, 4.0, USED, 4), False),
    (diffuser_gate, (3.6, 4.0, {**USED, 10: 3.54}, 4), False),
    (diffuser_gate, (3.6, 4.0, {1: 3.7}, 4), None),
    (diffuser_gate, (3.6, 4.0, None, 4), None),
    (diffuser_gate, (4.1, 4.0, None, 4), False),
    (usefulness_gate, ({"t": 0.0, "d": 0.29, "s": 0.1}, {"t": 0.0, "d": 0.3, "s": 0.2}, "t"), True),
    (usefulness_gate, ({"t": 0.0, "d": 0.30, "s": 0.1}, {"t": 0.0, "d": 0.3, "s": 0.2}, "t"), False),
    (usefulness_gate, ({"t": 0.0, "d": 0.29}, {"t": 0.0, "d": 0.3, "s": 0.2}, "t"), None),
    (usefulness_gate, ({"t": 0.0, "d": 0.4}, {"t": 0.0, "d": 0.3, "s": 0.2}, "t"), False),
    (usefulness_gate, ({}, {}, "t"), None),
    (static_gain_gate, (0.0201, 0.01), True),
    (static_gain_gate, (0.02, 0.01), True),
    (static_gain_gate, (0.0199, 0.01), False),
    (static_gain_gate, (0.0, 0.0), False),
    (static_gain_gate, (4.9e-4, 1e-6), False),
    (static_gain_gate, (5.1e-4, 1e-6), True),
    (static_gain_gate, (-0.02, 0.0), False),
    (static_gain_gate, (0.02, math.nan), None),
    (static_gain_gate, (None, 0.01), None),
    (router_gate, (BETTER, 0.1, 0.049), True),
    (router_gate, (BETTER, 0.1, 0.05), False),
    (router_gate, (NOISE, 0.1, 0.005), False),
    (router_gate, (BETTER, 0.1, None), None),
    (router_gate, (None, 0.1, 0.005), None),
    (router_gate, (WORSE, None, None), False),
    (training_gate, (BETTER, BETTER), True),
    (training_gate, (BETTER, SMALL), False),
    (training_gate, (NOISE, BETTER), False),
    (training_gate, (BETTER, None), None),
    (training_gate, (WORSE, None), False),
    (memory_gate, (BETTER,), True),
    (memory_gate, (NOISE, BETTER), False),
    (memory_gate, (UNKNOWN,), None),
    (memory_gate, (None, BETTER), None),
    (final_gate, ({"B1": BETTER, "B6": WORSE, "B9": NOISE}, ["B1", "B6"], 1), True),
    (final_gate, ({"B1": BETTER, "B6": WORSE}, ["B1", "B6"], 2), False),
    (final_gate, ({"B1": BETTER, "B6": None}, ["B1", "B6"], 1), None),
    (final_gate, ({"B1": BETTER, "B6": UNKNOWN}, ["B1", "B6"], 1), None),
    (final_gate, ({"B1": BETTER}, ["B1"], None), None),
]


@pytest.mark.parametrize(("gate", "figures", "passed"), CASES)
def test_both_sides_of_every_threshold_and_what_is_missing(gate, figures, passed):
    got = gate(*figures)
    assert got.passed is passed
    assert got.answer == {True: "passed", False: "failed", None: "open"}[passed]
    assert got.name.startswith("G")
    assert got.question.endswith("?")
    assert got.reason
    json.dumps(plain(got), allow_nan=False)


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        (transformer_gate(3.81, 4.0), "Transformer 3.8100 is not below bigram - 0.2 = 3.8000"),
        (state_space_gate(3.6, 3.5), "state space 3.6000 is below Transformer + 0.15 = 3.6500"),
        (static_gain_gate(0.01, 0.01), "gain 0.0100 nats a token, 2 standard errors are 0.0200"),
        (router_gate(BETTER, 0.1, 0.2), "I(domain; expert) has p = 0.200"),
        (training_gate(BETTER, None), "7c - B5 is not known"),
        (memory_gate(NOISE), "real - shuffled memory = -0.0500 [-0.1200, +0.0200]: not distinguishable"),
        (final_gate({"B1": BETTER}, ["B1", "B6"], 1), "missing: B6"),
    ],
)
def test_the_reason_is_what_decided(gate, reason):
    assert gate.reason == reason


def test_thresholds_can_be_set_and_stand_among_the_figures():
    assert transformer_gate(3.81, 4.0, margin=0.1).passed
    assert not state_space_gate(3.6, 3.5, near=0.05).passed
    assert static_gain_gate(0.01, 0.01, least=1).passed
    assert diffuser_gate(3.6, 4.0, {**USED, 10: 3.54}, 4, margin=0.1).passed
    assert transformer_gate(3.81, 4.0).figures == {"transformer": 3.81, "bigram": 4.0, "margin": 0.2}
    assert final_gate({"B1": BETTER, "B6": WORSE}, ["B1"], 1).figures["verdicts"] == {
        "B1": "better",
        "B6": "worse",
    }
