"""What else a study tried: the mixture with one thing changed, beside the study's own, on validation text.

Ablations are of one seed, so their intervals cover documents alone; the smallest effect that is claimed is still
twice the deviation of the study's own model over its seeds, where there are several.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nano_think.evals import plots
from nano_think.evals.bootstrap import RESOLUTION
from nano_think.evals.report import Report
from nano_think.evals.seeds import SeedDifference, difference_over_seeds, seed_deviation
from nano_think.evals.study_experts import spaces
from nano_think.evals.study_parts import memory, steps_chart
from nano_think.evals.study_record import ABLATIONS
from nano_think.evals.study_sections import COLOURS, DIFFERENCE, label
from nano_think.evals.study_statistics import EXPERTS, StudyStatistics
from nano_think.evals.study_values import Values, as_interval, number, table

# The row of a mixture whose memory is looked away from.
OFF = "without memory"


def ablations(report: Report, stats: StudyStatistics, folder: Path) -> None:
    """A section of its own, none where nothing was tried: what changed, what it cost, and what came of it."""
    for seed, facts in stats.record.seeds.items():
        if tried := facts.get(ABLATIONS):
            _section(report, Tried(stats, seed, tried), folder)


class Tried:
    """The ablations of one seed: facts by name, and their losses."""

    def __init__(self, stats: StudyStatistics, seed: int, facts: Mapping[str, Mapping[str, Any]]) -> None:
        self.stats, self.seed, self.facts = stats, seed, facts
        self.rows = stats.record.losses[ABLATIONS, seed].models

    def loss(self, row: str) -> float:
        """Nats a token of a row."""
        return self.stats.record.of(row, ABLATIONS, self.seed).loss()

    def baseline(self, name: str) -> str:
        """What an ablation is compared with: a row, or a model of the study."""
        return self.facts[name].get("against") or f"fused_{self.facts[name]['stage']}"

    def called(self, key: str) -> str:
        """How the report calls a row or a model of the study."""
        return key.replace("_", " ") if key in self.facts else label(self.stats, key)

    def difference(self, row: str, baseline: str) -> SeedDifference:
        """row - baseline, paired by document; baseline: another row, or a model of the study."""
        record = self.stats.record
        where = ABLATIONS if baseline in self.rows else "val"
        effect = None
        if where == "val":
            seeds = record.scored_seeds(baseline, "val")
            deviation = seed_deviation([record.of(baseline, "val", seed) for seed in seeds])
            effect = None if math.isnan(deviation) else 2 * deviation
        return difference_over_seeds(
            [record.of(row, ABLATIONS, self.seed)],
            [record.of(baseline, where, self.seed)],
            minimum_effect=effect,
            n_resamples=self.stats.n_resamples,
        )


def _section(report: Report, tried: Tried, folder: Path) -> None:
    report.heading("What else was tried")
    report.text(
        f"Each has the study's own settings, tuning included, but for what is named, and seed {tried.seed} alone. "
        "It is measured on the study's validation text, never on test, and compared document by document with the "
        "study's own mixture after the same stage, or with the other ablation that is named. Intervals cover the "
        "choice of documents, not that of seeds."
    )
    differences = {name: tried.difference(name, tried.baseline(name)) for name in tried.facts}
    _table(report, tried, differences)
    path = plots.intervals(
        folder / "ablations.png",
        {
            f"{tried.called(name)} − {tried.called(tried.baseline(name))}": d
            for name, d in differences.items()
        },
        x_label="ablation minus what it is compared with (nats per token); left is better",
        least=RESOLUTION,
    )
    report.figure(path, f"Paired differences on validation with 95% intervals over documents: {COLOURS}")
    _elsewhere(report, tried, differences)
    _experts(report, tried)
    _fits(report, tried)
    for name, facts in tried.facts.items():
        if "memory" in facts:
            _memory(report, tried, name, folder)
        _evidence(report, tried, name, folder)


def _table(report: Report, tried: Tried, differences: Mapping[str, SeedDifference]) -> None:
    rows: list[list[Any]] = []
    models = tried.stats.record.models
    for key in dict.fromkeys(f"fused_{facts['stage']}" for facts in tried.facts.values()):
        own = models[key]
        loss = tried.stats.record.of(key, "val", tried.seed).loss()
        costs = map(own.get, ("parameters", "training_flops", "inference_flops_per_token"))
        rows.append([label(tried.stats, key), "the study's own", *costs, loss, None, None, None, None])
    for name, facts in tried.facts.items():
        costs = map(facts.get, ("parameters", "training_flops", "inference_flops_per_token"))
        found = differences[name]
        compared = tried.called(tried.baseline(name))
        rows.append(
            [
                tried.called(name),
                facts["what"],
                *costs,
                tried.loss(name),
                compared,
                found,
                found.least,
                found.verdict,
            ]
        )
    report.table(
        ["name", "what changed", "parameters", "training FLOPs as planned", "inference FLOPs/token",
         "validation loss", "compared with", DIFFERENCE, "smallest effect claimed", "verdict"],
        rows,
        formats=["", "", ",", ".3g", ".3g", ".4f", "", "+.4f", ".4f", ""],
        title="Ablations, validation",
    )  # fmt: skip
    settings = [
        [tried.called(name), f"`{' '.join(facts['overrides']) or 'none'}`", f"`{facts['command']}`"]
        for name, facts in tried.facts.items()
    ]
    headers = ["name", "settings beyond the study's", "command"]
    report.table(headers, settings, title="What each ablation sets")


def _elsewhere(report: Report, tried: Tried, differences: Mapping[str, SeedDifference]) -> None:
    """Where the ablations were not made where the seed was, and what that alone does."""
    own = tried.stats.record.seeds[tried.seed].get("measured_with", {}).get("machine")
    others = {facts["measured_with"]["machine"] for facts in tried.facts.values()} - {own}
    if own and others:
        report.text(f"Seed {tried.seed} was made on {own}, ablations also on {', '.join(sorted(others))}.")
    for name, found in differences.items():
        if name.startswith("again_"):
            report.text(
                f"What the study has ({tried.called(tried.baseline(name))}), made again for the ablations, "
                f"differs by {found:+.4f} nats a token from its record: so much may come of the machine alone."
            )


def _experts(report: Report, tried: Tried) -> None:
    """Experts that are not the study's own, alone: what training made of them, or what 7c let them forget."""
    rows, forgets = [], False
    for name, facts in tried.facts.items():
        trained_on = any("unfreeze" in override for override in facts["overrides"])
        for expert in EXPERTS:
            if (row := f"{name}/{expert}") in tried.rows:
                found = tried.difference(row, expert)
                before = tried.stats.record.of(expert, "val", tried.seed).loss()
                rows.append(
                    [tried.called(name), tried.called(expert), before, tried.loss(row), found, found.verdict]
                )
                forgets = forgets or trained_on
    if not rows:
        return
    report.table(
        ["name", "expert", "the study's own alone", "this one alone", DIFFERENCE, "verdict"],
        rows,
        formats=["", "", ".4f", ".4f", "+.4f", ""],
        title="Experts alone, validation (nats/token)",
    )
    if forgets:
        report.text(
            "Where 7c trains the experts too, this one alone is the expert after 7c and the study's own is what "
            "it was before, both with the table of its pre-training: what it is worse by, it has forgotten. "
            "Frozen experts keep every bit, and are not listed."
        )


def _fits(report: Report, tried: Tried) -> None:
    rows = [
        [tried.called(name), tried.called(key), *map(fit.get, ("steps", "tokens", "best_step", "val_loss",
         "fall_per_epoch", "lr", "planned_flops"))]
        for name, facts in tried.facts.items()
        for key, fit in facts["fits"].items()
    ]  # fmt: skip
    if rows:
        report.table(
            ["name", "fit", "steps", "tokens", "best step", "validation loss", "fall an epoch at the end",
             "learning rate", "planned FLOPs"],
            rows,
            formats=["", "", ",", ",", ",", ".4f", ".2%", "g", ".3g"],
            title="Fits that the ablations do not share with the study",
        )  # fmt: skip


def _memory(report: Report, tried: Tried, name: str, folder: Path) -> None:
    """Loss and FLOPs a token with memory off and on, then the whole evidence of that memory."""
    facts, called = tried.facts[name], tried.called(name)
    off, on = f"{name}/{OFF}", name
    found = tried.difference(on, off)
    more = facts["inference_flops_per_token"] - facts["flops_without_memory"]
    report.table(
        ["memory", "inference FLOPs/token", "validation loss", "on minus off", "verdict", "nats a GFLOP more"],
        [
            ["off", facts["flops_without_memory"], tried.loss(off), None, None, None],
            ["on", facts["inference_flops_per_token"], tried.loss(on), found, found.verdict,
             -found.estimate / (more / 1e9) if more > 0 else None],
        ],
        formats=["", ".4g", ".4f", "+.4f", "", "+.3f"],
        title=f"Memory of {called}: loss by compute",
    )  # fmt: skip
    report.text(f"What the memory of {called} is worth, as for that of the study:")
    memory(report, facts["memory"], folder / name)


def _evidence(report: Report, tried: Tried, name: str, folder: Path) -> None:
    """What an ablation was asked beside its losses, where there is an answer."""
    found = tried.facts[name].get("evidence", {})
    if (value := found.get("spaces")) and "reason" not in value:
        report.text(f"Whether the experts of {tried.called(name)} share a space, as for those of the study:")
        spaces(report, value, folder / name)
    if value := found.get("steps_curve"):
        _steps(report, tried, name, value, folder / name)


def _steps(report: Report, tried: Tried, name: str, value: Values, folder: Path) -> None:
    """What denoising steps are worth to its diffuser, beside that of the study, on the same tokens."""
    denoiser = tried.stats.record.seeds[tried.seed].get("evidence", {}).get("denoiser", {})
    curves = {f"{tried.called(name)} ({value['target']})": value}
    if own := denoiser.get("steps_curve"):
        curves = {f"the study's own ({own['target']})": own, **curves}
    path = steps_chart(folder / "denoising_loss.png", curves)
    report.figure(path, f"Loss by number of denoising steps, {' and '.join(curves)}.")
    by_steps = {who: {entry["steps"]: entry for entry in one["curve"]} for who, one in curves.items()}
    rows = [
        [
            steps,
            *(
                entries.get(steps, {}).get(n)
                for entries in by_steps.values()
                for n in ("loss", "minus_one_step")
            ),
        ]
        for steps in sorted({steps for entries in by_steps.values() for steps in entries})
    ]
    headers = ["steps", *(text for who in curves for text in (f"loss of {who}", "minus one step"))]
    title = f"Denoising steps of {tried.called(name)} (nats/token), {value['tokens']:,} tokens"
    report.table(table(headers, rows, title, ["", *[".4f", "+.4f"] * len(curves)]))
    report.text(" ".join(_best_steps(who, one["curve"]) for who, one in curves.items()))


def _best_steps(who: str, curve: Sequence[Values]) -> str:
    """With how many steps a diffuser does best, and what the most of them do to it."""
    best = min(curve, key=lambda entry: number(entry["loss"]["estimate"]))
    most = as_interval(curve[-1]["minus_one_step"])
    changed = f"K = {curve[-1]['steps']} minus K = {curve[0]['steps']} is {most:+.4f}"
    return f"Lowest loss of {who} with K = {best['steps']}; {changed}."
