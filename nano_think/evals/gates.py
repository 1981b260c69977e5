"""The gates of the work: questions with thresholds, answered from plain figures, before the next step is taken.

A gate has passed, failed, or is open (None) where a figure is missing; one part that fails is enough to fail, what
is missing beside it or not. Losses are nats a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nano_think.evals.bootstrap import RESOLUTION

# how far below the bigram a Transformer must be, and how near to it a state-space expert, nats a token
BIGRAM_MARGIN = 0.2
NEAR = 0.15
# what the number of denoising steps in use may cost against the best number measured
STEPS_MARGIN = 0.05
STANDARD_ERRORS = 2.0
SIGNIFICANT = 0.05

Check = tuple[bool | None, str]


class Comparison(Protocol):
    """model - baseline, as `Difference` and `SeedDifference` have it."""

    @property
    def estimate(self) -> float:
        """Nats a token."""

    @property
    def low(self) -> float:
        """Lower end of the interval."""

    @property
    def high(self) -> float:
        """Upper end."""

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "not distinguishable"."""


@dataclass(frozen=True)
class Gate:
    """A question and its answer.

    Attributes:
        passed: None while a figure is missing.
        figures: what the answer was computed from, plain values.
        reason: why it failed or is open, or on what it passed.
    """

    name: str
    question: str
    passed: bool | None
    figures: dict[str, Any]
    reason: str

    @property
    def answer(self) -> str:
        """Return "passed", "failed" or "open"."""
        return {True: "passed", False: "failed", None: "open"}[self.passed]


def transformer_gate(transformer: float | None, bigram: float | None, margin: float = BIGRAM_MARGIN) -> Gate:
    """G1: the Transformer's loss is at least `margin` below that of a bigram of the same text."""
    return _gate(
        "G1",
        "Does the Transformer beat a bigram by a wide margin?",
        {"transformer": transformer, "bigram": bigram, "margin": margin},
        [_at_most("Transformer", transformer, bigram, -margin, "bigram")],
    )


def state_space_gate(state_space: float | None, transformer: float | None, near: float = NEAR) -> Gate:
    """G2: the state-space expert is at most `near` behind the Transformer."""
    return _gate(
        "G2",
        "Is the state-space expert near the Transformer?",
        {"state_space": state_space, "transformer": transformer, "near": near},
        [_at_most("state space", state_space, transformer, near, "Transformer")],
    )


def diffuser_gate(
    diffuser: float | None,
    bigram: float | None,
    ce_by_steps: Mapping[int, float] | None,
    steps: int,
    margin: float = STEPS_MARGIN,
) -> Gate:
    """G3: the diffuser beats the bigram, and no other number of denoising steps is better by more than `margin`.

    Args:
        diffuser: its loss as the fused model uses it, with `steps` steps.
        ce_by_steps: loss by number of steps, `steps` among them.
    """
    curve = dict(ce_by_steps or {})
    used, best = curve.get(steps), min(curve, key=curve.__getitem__, default=None)
    named = f"best number of steps ({best})"
    return _gate(
        "G3",
        "Does the diffuser beat a bigram, with the right number of steps?",
        {"diffuser": diffuser, "bigram": bigram, "ce_by_steps": curve, "steps": steps, "margin": margin},
        [
            _at_most("diffuser", diffuser, bigram, 0.0, "bigram", strictly=True),
            _at_most(f"{steps} steps", used, None if best is None else curve[best], margin, named),
        ],
    )


def usefulness_gate(gap: Mapping[str, float], mean_kl: Mapping[str, float], reference: str) -> Gate:
    """G4: every expert beside the reference can help it: its loss gap is below its mean KL from the reference.

    Args:
        gap, mean_kl: by expert, as `ops.pooling.usefulness` has them; the reference's own are left out.
    """
    others = [name for name in {**gap, **mean_kl} if name != reference]
    checks = [
        _at_most(f"gap of {name}", gap.get(name), mean_kl.get(name), 0.0, "mean KL", strictly=True)
        for name in others
    ]
    return _gate(
        "G4 usefulness",
        "Can each other expert help the best one?",
        {"gap": dict(gap), "mean_kl": dict(mean_kl), "reference": reference},
        checks or [(None, "there is no other expert")],
    )


def static_gain_gate(
    gain: float | None, standard_error: float | None, least: float = STANDARD_ERRORS
) -> Gate:
    """G4: static weights gain over the best expert, by `least` standard errors over documents or more.

    Without such a gain the experts know the same, and no router can help: the line stops here. Equal experts gain
    by rounding, surely and nothing: less than RESOLUTION is no gain.
    """
    figures = {"gain": gain, "standard_error": standard_error, "least": least}
    question = "Do static weights beat the best expert beyond doubt?"
    if gain is None or standard_error is None or not _known(gain, standard_error):
        return _gate("G4 static gain", question, figures, [(None, "gain or standard error is not known")])
    said = f"gain {gain:.4f} nats a token, {least:g} standard errors are {least * standard_error:.4f}"
    passed = gain >= max(RESOLUTION, least * standard_error)
    return _gate("G4 static gain", question, figures, [(passed, said)])


def router_gate(over_static: Comparison | None, information: float | None, p_value: float | None) -> Gate:
    """G5: the router of 7b beats static weights on validation, and its use of experts depends on the domain.

    Args:
        over_static: 7b - 7a.
        information: I(domain; expert) in nats. p_value: against domain labels permuted over documents.
    """
    known = p_value is not None and _known(p_value)
    chance: Check = (
        (bool(p_value < SIGNIFICANT), f"I(domain; expert) has p = {p_value:.3f}")
        if p_value is not None and known
        else (None, "I(domain; expert) was not tested")
    )
    figures = {**_figures("over_static", over_static), "information": information, "p_value": p_value}
    return _gate(
        "G5", "Does the router beat static weights?", figures, [_better("7b - 7a", over_static), chance]
    )


def training_gate(over_router: Comparison | None, over_finetuned: Comparison | None) -> Gate:
    """G6: training table, MLA and router (7c) beats the router alone, and one expert with the same training.

    Args:
        over_router: 7c - 7b. over_finetuned: 7c - B5, the Transformer fine-tuned with the same parameters.
    """
    return _gate(
        "G6",
        "Does 7c beat 7b and the fine-tuned Transformer?",
        {**_figures("over_router", over_router), **_figures("over_finetuned", over_finetuned)},
        [_better("7c - 7b", over_router), _better("7c - B5", over_finetuned)],
    )


def memory_gate(over_shuffled: Comparison | None, over_none: Comparison | None = None) -> Gate:
    """G7: what memory returns is better than the same memory shuffled, which alone proves that content counts.

    Args:
        over_shuffled: real - shuffled. over_none: 7d - 7c, shown beside it.
    """
    return _gate(
        "G7",
        "Is real memory better than shuffled memory?",
        {**_figures("over_shuffled", over_shuffled), **_figures("over_none", over_none)},
        [_better("real - shuffled memory", over_shuffled)],
    )


def final_gate(
    differences: Mapping[str, Comparison | None], required: Sequence[str], test_reads: int | None
) -> Gate:
    """G8: every required baseline stands in the final table, from one reading of the test split.

    That the table is complete is the gate; what it says is in the figures.

    Args:
        differences: the model - each baseline on test, by name.
    """
    missing = [name for name in required if not _compared(differences.get(name))]
    told = {name: value.verdict for name, value in differences.items() if value and _compared(value)}
    count = {verdict: list(told.values()).count(verdict) for verdict in ("better", "worse")}
    said = f"{len(told)} baselines: better than {count['better']}, worse than {count['worse']}"
    complete: Check = (None, f"missing: {', '.join(missing)}") if missing else (True, said)
    reads: Check = (
        (None, "how often test was read is not known")
        if test_reads is None
        else (test_reads == 1, f"test was read {test_reads} times")
    )
    return _gate(
        "G8",
        "Is the final table complete, from one reading of test?",
        {"verdicts": told, "missing": missing, "test_reads": test_reads},
        [complete, reads],
    )


def _gate(name: str, question: str, figures: dict[str, Any], checks: Sequence[Check]) -> Gate:
    """The answer of several checks: failed if one fails, else open if one is open."""
    outcomes = [outcome for outcome, _ in checks]
    passed = False if False in outcomes else None if None in outcomes else True
    reason = "; ".join(said for outcome, said in checks if outcome is passed)
    return Gate(name, question, passed, figures, reason)


def _known(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)


def _at_most(
    what: str, value: float | None, limit: float | None, margin: float, name: str, strictly: bool = False
) -> Check:
    """Whether `value` is at most `limit` + `margin`."""
    if value is None or limit is None or not _known(value, limit):
        return None, f"{what} or {name} is not known"
    bound = limit + margin
    passed = value < bound if strictly else value <= bound
    least = f" {'+' if margin > 0 else '-'} {abs(margin):g}" if margin else ""
    return passed, f"{what} {value:.4f} is {'' if passed else 'not '}below {name}{least} = {bound:.4f}"


def _compared(value: Comparison | None) -> bool:
    return value is not None and _known(value.estimate, value.low, value.high)


def _better(what: str, value: Comparison | None) -> Check:
    if value is None or not _compared(value):
        return None, f"{what} is not known"
    said = f"{what} = {value.estimate:+.4f} [{value.low:+.4f}, {value.high:+.4f}]: {value.verdict}"
    return value.verdict == "better", said


def _figures(name: str, value: Comparison | None) -> dict[str, Any]:
    if value is None:
        return {name: None}
    return {name: value.estimate, f"{name}_low": value.low, f"{name}_high": value.high}
