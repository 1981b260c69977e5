"""How much of a difference the audit puts down to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nano_think.evals.audit.compare import LOOSE, MARGIN, rounding
from nano_think.evals.audit.plan import Plan
from nano_think.evals.audit.run import audit
from nano_think.evals.audit.subject import Subject

VOCAB = 11
LAST_DIGIT = 2.0**-23  # of numbers in [1, 2)


class Cancelling(nn.Module):
    """Causal mean of what tokens say, times (scale - 1): what is lost in that difference is known exactly."""

    def __init__(self, excess: float) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)))
        self.scale = nn.Parameter(torch.tensor(1 + excess))

    def forward(self, tokens: Tensor) -> Tensor:
        said = self.table[tokens].cumsum(1) / torch.arange(1, tokens.shape[1] + 1).unsqueeze(1)
        return said * (self.scale - 1)


def test_a_last_digit_is_followed_through_the_model() -> None:
    plan, excess = Plan(VOCAB), 2.0**-10
    # one last digit of the scale is this much of its excess over 1; the distance is relative to the mean square
    moved = LAST_DIGIT / excess
    subject = Subject(Cancelling(excess), VOCAB)
    said = subject.observe(plan.tokens(16))["logits"]
    largest = float(said.abs().max() / said.square().mean().sqrt()) * moved
    assert rounding(subject, plan) == pytest.approx(MARGIN * largest, rel=1e-2)


def test_the_plan_s_tolerance_is_the_least() -> None:
    plan = Plan(VOCAB)
    assert rounding(Subject(Cancelling(1.0), VOCAB), plan) == plan.tolerance
    assert rounding(Subject(lambda tokens: Cancelling(2.0**-20)(tokens), VOCAB), plan) == plan.tolerance


def test_measuring_it_leaves_the_model_alone() -> None:
    model = Cancelling(2.0**-10)
    rounding(Subject(model, VOCAB), Plan(VOCAB))
    assert model.scale.item() == 1 + 2.0**-10


@pytest.mark.parametrize(("excess", "verdict"), [(2.0**-10, "pass"), (2.0**-20, "vacuous")])
def test_a_model_that_is_all_rounding_proves_nothing(excess: float, verdict: str) -> None:
    found = audit(Cancelling(excess), VOCAB, checks=("A3", "A5"))
    assert [finding.verdict for finding in found.findings] == [verdict] * 2
    assert (found.setting["tolerance"] > LOOSE) == (verdict == "vacuous")
