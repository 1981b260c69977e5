"""Equal trials for everything a study compares, judged on validation text: learning rates, then dropout.

One family gets more: the Transformer that may take the FLOPs of the whole mixture may also stop sooner.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nano_think.phases.run import Maker
from nano_think.phases.study_costs import planned_tokens
from nano_think.phases.study_fits import make_all
from nano_think.phases.study_plan import FAMILIES, SINGLE, Plan

# Each group needs what the ones before it chose.
GROUPS = (("transformer",), ("diffuser", "state_space", *SINGLE), ("fused_7c", "finetuned_transformer"))


@dataclass(frozen=True)
class Trial:
    """What one family was tried with, and what it came to.

    dropout: None where it was as the settings have it. horizon: share of its budget that a run was planned for,
    None where that was not the question. chosen: the best of those that were tried beside it.
    """

    family: str
    rate: float
    dropout: float | None
    horizon: float | None
    tokens: int
    val_loss: float
    chosen: bool


def tune(plan: Plan, workers: int) -> list[Trial]:
    """Try every family; the plan's seed is the only one that is tuned on, its choices are set by the way."""
    found: list[Trial] = []
    for group in GROUPS:
        for tried in (_rates, _dropouts, _horizons):
            makers = {family: tried(plan, family) for family in group}
            make_all(plan.run, [maker for trials in makers.values() for _, maker in trials], workers)
            for family, trials in makers.items():
                found += _judged(plan, family, trials)
            plan.chosen |= chosen(found)
    return found


def chosen(trials: Iterable[Trial]) -> dict[str, dict[str, float]]:
    """`rate`, `dropout` and `horizon` by family, as `Plan` takes them."""
    found: dict[str, dict[str, float]] = {}
    for trial in trials:
        if trial.chosen:
            values = {"rate": trial.rate, "dropout": trial.dropout, "horizon": trial.horizon}
            found[trial.family] = {name: value for name, value in values.items() if value is not None}
    return found


def _rates(plan: Plan, family: str) -> list[tuple[dict[str, float], Maker]]:
    """The artefact of each learning rate; short runs of a pre-training, whole ones of the cheap last stages."""
    tuning, where = plan.settings["tuning"], FAMILIES[family]
    whole = plan.fit(family)
    pre_training = where.phase == "expert"
    factors = tuning["factors" if pre_training else "fusion_factors"]
    steps = [] if not pre_training else [f"++{_node(where.key)}.max_steps={_steps(whole, tuning['share'])}"]
    rates = [float(f"{whole.spec['fit']['lr'] * factor:.3g}") for factor in factors]
    return [({"rate": rate}, plan.fit(family, *steps, f"++{where.key}={rate}")) for rate in rates]


def _dropouts(plan: Plan, family: str) -> list[tuple[dict[str, float], Maker]]:
    """The artefact of each dropout with the rate that was chosen: whole runs, for short ones cannot overfit."""
    where, rate = FAMILIES[family], plan.chosen[family]["rate"]
    if where.phase != "expert":
        return []
    tried = [{"rate": rate, "dropout": dropout} for dropout in plan.settings["tuning"]["dropouts"]]
    return [
        (values, plan.fit(family, *(f"++{key}={value}" for key, value in where.settings(values).items())))
        for values in tried
    ]


def _horizons(plan: Plan, family: str) -> list[tuple[dict[str, float], Maker]]:
    """The artefact of each share of the budget, for the family that has one beyond what its text can teach it.

    To read the same text too often is no use of a budget that its owner would choose.
    """
    if family != "equal_training_flops":
        return []
    found = []
    for horizon in plan.settings["tuning"]["horizons"]:
        values = {**plan.chosen[family], "horizon": horizon}
        found.append((values, replace(plan, chosen={**plan.chosen, family: values}).fit(family)))
    return found


def _node(key: str) -> str:
    return key.rpartition(".")[0]


def _steps(whole: Maker, share: float) -> int:
    fit: dict[str, Any] = whole.spec["fit"]
    step = fit["batch_size"] * fit["accumulate"] * fit["seq_len"]
    return max(1, round(share * planned_tokens(fit) / step))


def _judged(plan: Plan, family: str, tried: Sequence[tuple[dict[str, float], Maker]]) -> list[Trial]:
    losses = [plan.result(maker)["val_loss"] for _, maker in tried]
    return [
        Trial(
            family,
            values["rate"],
            values.get("dropout"),
            values.get("horizon"),
            planned_tokens(maker.spec["fit"]),
            loss,
            chosen=number == losses.index(min(losses)),
        )
        for number, ((values, maker), loss) in enumerate(zip(tried, losses, strict=True))
    ]
