"""Equal trials for everything a study compares: the same number of learning rates, judged on validation text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nano_think.phases.run import Maker
from nano_think.phases.study_costs import planned_tokens
from nano_think.phases.study_fits import make_all
from nano_think.phases.study_plan import FAMILIES, SINGLE, Plan

# Each group needs what the ones before it chose.
GROUPS = (("transformer",), ("diffuser", "state_space", *SINGLE), ("fused_7c", "finetuned_transformer"))


@dataclass(frozen=True)
class Trial:
    """One learning rate of one family, and what it came to."""

    family: str
    rate: float
    tokens: int
    val_loss: float
    chosen: bool


def tune(plan: Plan, workers: int) -> list[Trial]:
    """Try every family; the plan's seed is the only one that is tuned on, its rates are set by the way."""
    found: list[Trial] = []
    for group in GROUPS:
        makers = {family: _trials(plan, family) for family in group}
        make_all(plan.run, [maker for trials in makers.values() for maker in trials.values()], workers)
        for family, trials in makers.items():
            found += _judged(plan, family, trials)
        plan.rates |= {trial.family: trial.rate for trial in found if trial.chosen}
    return found


def _trials(plan: Plan, family: str) -> dict[float, Maker]:
    """The artefact of each learning rate; short runs of a pre-training, whole ones of the cheap last stages."""
    tuning, where = plan.settings["tuning"], FAMILIES[family]
    whole = plan.fit(family)
    pre_training = where.phase == "expert"
    factors = tuning["factors" if pre_training else "fusion_factors"]
    steps = [] if not pre_training else [f"++{_node(where.key)}.max_steps={_steps(whole, tuning['share'])}"]
    rates = [float(f"{whole.spec['fit']['lr'] * factor:.3g}") for factor in factors]
    return {rate: plan.fit(family, *steps, f"++{where.key}={rate}") for rate in rates}


def _node(key: str) -> str:
    return key.rpartition(".")[0]


def _steps(whole: Maker, share: float) -> int:
    fit: dict[str, Any] = whole.spec["fit"]
    step = fit["batch_size"] * fit["accumulate"] * fit["seq_len"]
    return max(1, round(share * planned_tokens(fit) / step))


def _judged(plan: Plan, family: str, trials: dict[float, Maker]) -> list[Trial]:
    losses = {rate: plan.result(maker)["val_loss"] for rate, maker in trials.items()}
    best = min(losses, key=losses.__getitem__)
    return [
        Trial(family, rate, planned_tokens(maker.spec["fit"]), losses[rate], rate == best)
        for rate, maker in trials.items()
    ]
