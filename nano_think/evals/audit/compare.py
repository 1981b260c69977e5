"""Two ways to compute the same, where they part, and how far rounding alone may take them apart."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nano_think.evals.audit.finding import Finding
from nano_think.evals.audit.plan import Plan
from nano_think.evals.audit.subject import GIVEN, Said, Subject, component
from nano_think.evals.audit.trace import Differs, Trace, distance, first_difference, recording
from nano_think.ops.layout import Layout

# Rounding may move what is said by this many times what a last digit of every parameter does: the most that was
# seen is 1.4 times, in trained models.
MARGIN = 4.0
# A model that rounding moves by more than this hides what the checks look for.
LOOSE = 1e-2

Blame = Callable[[], str | None]
# Rows and positions of a batch.
Part = tuple[slice, slice]


class Comparison:
    """Collects the largest distance over many comparisons, and the first failure with who is to blame."""

    def __init__(self, check: str, title: str, plan: Plan) -> None:
        self.check, self.title, self.plan = check, title, plan
        self.largest = 0.0
        self.failure: Finding | None = None

    def __call__(self, expected: Said, found: Said, note: str, blame: Blame) -> None:
        """After the first failure nothing is compared any more."""
        for name, value in found.items():
            if self.failure is not None:
                return
            off = distance(expected[name], value)
            self.largest = max(self.largest, float(off.max()))
            # not (off > tolerance), which NaN would pass
            too_far = ~(off <= self.plan.tolerance)
            if bool(too_far.any()):
                self.failure = Finding(
                    check=self.check,
                    title=self.title,
                    verdict="fail",
                    violation=float(off[too_far].max()),
                    position=first_position(too_far),
                    component=answerable(name, blame),
                    note=f"{name}: {note}",
                )

    def finding(self, note: str) -> Finding:
        """The failure, or a pass with the largest distance seen."""
        if self.failure is None and self.plan.tolerance > LOOSE:
            note = f"rounding alone may move the outputs by {self.plan.tolerance:.1g} of their size"
            return Finding(self.check, self.title, "vacuous", self.largest, note=note)
        return self.failure or Finding(self.check, self.title, "pass", self.largest, note=note)


def answerable(name: str, blame: Blame) -> str:
    """The component to blame for a fault that shows in what is said under `name`.

    What the model is given is not its fault. Where its modules agree, the fault lies in the code that works with
    what they return.
    """
    if name == GIVEN:
        return component(name)
    path = blame()
    return component(name) if path is None else path or "model"


def first_position(where: Tensor) -> int:
    """The first position of a bool (B, L) in any row."""
    return int(where.any(0).nonzero()[0])


def rounding(subject: Subject, plan: Plan) -> float:
    """How far two computations of one value may part by rounding in this model: `plan.tolerance` or more.

    Measured on a copy in which every parameter is off by one unit in its last place. Depth can make a hundred
    times more of it in one model than in another, above all in a recurrence whose matrices are large.
    """
    if subject.module is None:
        return plan.tolerance
    moved, generator = copy.deepcopy(subject.module), plan.generator(15)
    with torch.no_grad():
        for parameter in moved.parameters():
            up = torch.randint(2, parameter.shape, generator=generator).bool().to(parameter.device)
            away = torch.where(up, math.inf, -math.inf).to(parameter.dtype)
            parameter.copy_(torch.nextafter(parameter, away))
    tokens = plan.tokens(16)
    exact, off = subject.observe(tokens), subject.with_model(moved).observe(tokens)
    largest = max(float(distance(exact[name], off[name]).max()) for name in exact if name != GIVEN)
    # NaN is for the checks to find
    return max(plan.tolerance, MARGIN * largest) if math.isfinite(largest) else plan.tolerance


def further_than(tolerance: float) -> Differs:
    """Whether two tensors differ by more than rounding."""
    return lambda one, other: not bool((distance(one, other) <= tolerance).all())


def traced(module: nn.Module, tokens: Tensor, run: Callable[[], object], like: Trace | None = None) -> Trace:
    """What passes through the modules while something is done with tokens (B, L)."""
    with recording(module, tokens.shape, like) as trace:
        run()
    return trace


def blame_part(
    subject: Subject, plan: Plan, alone: Tensor, together: Tensor, layout: Layout | None, own: Part
) -> str | None:
    """Where tokens alone and the same tokens as the part `own` of more part ways."""
    if subject.module is None:
        return None
    # the longer one first: its length is no dimension of the model
    more = traced(subject.module, together, lambda: subject.observe(together, layout))
    less = traced(subject.module, alone, lambda: subject.observe(alone), like=more)
    return first_difference(more.part(*own), less, differs=further_than(plan.tolerance))
