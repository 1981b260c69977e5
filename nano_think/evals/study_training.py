"""How the models of a study were trained: what was tried for each, where each fit ended, and the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nano_think.evals import plots
from nano_think.evals.report import Report
from nano_think.evals.study_sections import label
from nano_think.evals.study_statistics import StudyStatistics

# share of the loss by which a curve may fall an epoch at its end; one that falls faster was stopped too early
PLATEAU = 0.01
# A fit whose best step lies before this share of its steps went on for long without gain.
LATE = 0.75
# Nats above the lowest loss that the curves show: what an untrained network does is nobody's question.
SHOWN = 1.5
TRIAL = {
    "rate": "learning rate",
    "horizon": "share of its budget",
    "tokens": "tokens read",
    "val_loss": "validation loss (nats/token)",
}


def training(report: Report, stats: StudyStatistics, folder: Path) -> None:
    """Tuning trials of every family, where each fit stopped and whether it had ended, and the curves."""
    record = stats.record
    if tuning := record.facts.get("tuning"):
        _tuning(report, stats, tuning)
    rows, moving, known = [], [], True
    late: dict[str, tuple[float, float]] = {}
    keys = {key for facts in record.seeds.values() for key in facts.get("fits", {})}
    for key in (*(key for key in record.models if key in keys), *sorted(keys - set(record.models))):
        fits = [facts["fits"][key] for facts in record.seeds.values() if key in facts.get("fits", {})]
        fall, best, steps = (_mean(fits, name) for name in ("fall_per_epoch", "best_step", "steps"))
        known = known and fall is not None
        if fall is not None and fall > PLATEAU:
            moving.append(label(stats, key))
        if best is not None and steps and best < LATE * steps:
            late[label(stats, key)] = (best, steps)
        numbers = ("steps", "tokens", "epochs", "best_step", "val_loss")
        rows.append(
            [label(stats, key), *(_mean(fits, n) for n in numbers), fall, _mean(fits, "lr"), len(fits)]
        )
    report.table(
        ["model", "steps", "tokens", "epochs", "best step", "validation loss", "fall an epoch at the end",
         "learning rate", "seeds"],
        rows,
        formats=["", ",.0f", ",.0f", ".2f", ",.0f", ".4f", ".2%", "g", ""],
        title="Where each fit stood at its end, mean over seeds",
    )  # fmt: skip
    report.text(
        "Every model is the one of its best step on validation text, not of its last. A fall below 0 is a rise: "
        "the fit was past its best. An epoch is one reading of the text that the fit may read."
    )
    if moving:
        still = f"Still falling by more than {PLATEAU:.0%} an epoch when they ended, so not fully trained"
        report.text(f"{still}: {', '.join(moving)}.")
    elif rows and known:
        report.text(f"Every validation curve fell by at most {PLATEAU:.0%} an epoch at its end: a plateau.")
    _late(report, late)
    _curves(report, stats, folder)


def _late(report: Report, late: Mapping[str, tuple[float, float]]) -> None:
    """What it means that a fit was best long before its end, or at its very start."""
    idle = [name for name, (best, _) in late.items() if best == 0]
    if idle:
        report.text(
            f"Training gained nothing in {', '.join(idle)}: no step was better than its start, so it is what it "
            "began with."
        )
    early = [f"{name} (step {best:,.0f} of {steps:,.0f})" for name, (best, steps) in late.items() if best]
    if early:
        report.text(
            f"Best before {LATE:.0%} of their steps: {', '.join(early)}. A learning rate that is too high "
            "for a whole run and a text that is read too often both look like this."
        )


def _tuning(report: Report, stats: StudyStatistics, trials: Sequence[Mapping[str, Any]]) -> None:
    """Every trial with whatever settings were tried, and where in its grid the best learning rate lies."""
    families = [str(trial.get("family")) for trial in trials]
    counts = ", ".join(f"{family} {families.count(family)}" for family in dict.fromkeys(families))
    report.text(f"Tuning trials a family: {counts}.")
    names = list(dict.fromkeys(name for trial in trials for name in trial if name != "chosen"))
    formats = {"family": "", "tokens": ",", "val_loss": ".4f"}
    report.table(
        [*(TRIAL.get(name, name.replace("_", " ")) for name in names), "chosen"],
        [[*map(trial.get, names), "chosen" if trial.get("chosen") else ""] for trial in trials],
        formats=[*(formats.get(name, "g") for name in names), ""],
        title="Tuning record",
    )
    _edges(report, stats, trials)


def _edges(report: Report, stats: StudyStatistics, trials: Sequence[Mapping[str, Any]]) -> None:
    """Where the chosen learning rate of each family lies among those that were tried.

    A best one at the edge of its grid says that the search ended too soon.
    """
    rates = [one for one in trials if one.get("dropout") is None and one.get("horizon") is None]
    rows: list[list[str]] = []
    edges: dict[str, list[str]] = {"highest": [], "lowest": []}
    for family in dict.fromkeys(str(one.get("family")) for one in rates):
        own = sorted((one for one in rates if one.get("family") == family), key=lambda one: one["rate"])
        chosen = [one["rate"] for one in own if one.get("chosen")]
        if not chosen:
            continue
        place = (
            "only" if len(own) == 1 else {own[-1]["rate"]: "highest", own[0]["rate"]: "lowest"}.get(chosen[0])
        )
        if place is not None and place in edges:
            edges[place].append(label(stats, family))
        tried = ", ".join(f"{one['rate']:g}" for one in own)
        where = {None: "between others", "only": "the only one"}.get(place, f"the {place} of them")
        rows.append([label(stats, family), tried, f"{chosen[0]:g}", where])
    headers = ["family", "learning rates tried", "best", "it is"]
    report.table(headers, rows, align=["l"] * 4, title="Where the best learning rate lies")
    for place, beyond in (("highest", "higher"), ("lowest", "lower")):
        if edges[place]:
            report.text(
                f"The best learning rate is the {place} that was tried for {', '.join(edges[place])}. A {beyond} "
                "one might be better still: none was tried, so the grid ended too soon for them."
            )
    share = stats.record.facts.get("settings", {}).get("tuning", {}).get("share")
    if share is not None and share < 1:
        report.text(
            f"Learning rates of pre-training are judged after runs of {share:.0%} of the steps. What is best in "
            "so short a run is often too high for a whole one: a chosen rate is the best of its trials, no more."
        )


def _mean(fits: list[Mapping[str, Any]], name: str) -> float | None:
    values = [float(fit[name]) for fit in fits if fit.get(name) is not None]
    return sum(values) / len(values) if values else None


def _curves(report: Report, stats: StudyStatistics, folder: Path) -> None:
    """Validation loss against tokens and against training FLOPs, mean over seeds at the steps all seeds have."""
    by_tokens, by_flops = {}, {}
    for key, facts in stats.record.models.items():
        fits = [s["fits"][key] for s in stats.record.seeds.values() if key in s.get("fits", {})]
        histories = [dict(map(tuple, fit["history"])) for fit in fits if fit.get("history")]
        # before its first step a fit has read nothing, which has no place on a logarithmic axis
        steps = sorted(set.intersection(*(set(h) - {0} for h in histories))) if histories else []
        if not steps:
            continue
        losses = [float(np.mean([history[step] for history in histories])) for step in steps]
        first, name = fits[0], label(stats, key)
        if not first.get("tokens"):
            continue
        tokens = np.array(steps) * first["tokens"] / first["steps"]
        by_tokens[name] = (tokens, losses)
        if (total := facts.get("training_flops")) and (planned := first.get("planned_flops")):
            # what a mixture's experts cost was spent before its own first step
            by_flops[name] = (total - planned * (1 - tokens / first["planned_tokens"]), losses)
    for name, curves, x_label, scale in (
        ("tokens", by_tokens, "training tokens of the fit", "log"),
        ("flops", by_flops, "training FLOPs, experts of a mixture included", "log"),
    ):
        if curves:
            path = plots.line_chart(
                folder / f"curves_{name}.png",
                curves,
                x_label=x_label,
                y_label="validation loss (nats per token)",
                x_scale=scale,
                y_most=min(min(losses) for _, losses in curves.values()) + SHOWN,
            )
            beyond = f"Losses more than {SHOWN:g} nats above the lowest are cut off."
            report.figure(path, f"Validation loss against {x_label}, mean over seeds. {beyond}")
