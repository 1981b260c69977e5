"""The results of a study, section by section: tables, figures and the sentences that follow from them.

Every sentence is chosen by a verdict, so a changed figure changes the text. Differences are model minus baseline
in nats a token: negative is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nano_think.evals import plots
from nano_think.evals.bootstrap import RESOLUTION, Interval
from nano_think.evals.report import Report
from nano_think.evals.seeds import SeedDifference
from nano_think.evals.study_record import MODELS
from nano_think.evals.study_statistics import RIVALS, UNIFORM, StudyStatistics, word
from nano_think.evals.study_values import shown

DIFFERENCE = "difference (nats/token)"
HEADERS = [DIFFERENCE, "each seed", "smallest effect claimed", "verdict"]
# How `plots.intervals` colours differences.
COLOURS = (
    "blue where the interval lies below 0, red where it lies above, grey where it holds 0 or the difference is "
    f"below {RESOLUTION:g}."
)


def label(stats: StudyStatistics, key: str) -> str:
    """How the report calls a model."""
    return str(stats.record.models.get(key, {}).get("label", key.replace("_", " ")))


def covered(stats: StudyStatistics) -> str:
    """What intervals over seeds cover."""
    return "documents and seeds" if len(stats.record.seeds) > 1 else "documents"


def per_seed(difference: SeedDifference) -> str:
    """The value of each seed."""
    return ", ".join(f"{value:+.4f}" for value in difference.per_seed)


def difference_cells(difference: SeedDifference | None) -> list[Any]:
    """Cells under HEADERS."""
    if difference is None:
        return [None, None, None, word(None)]
    return [difference, per_seed(difference), difference.least, difference.verdict]


def sentence(difference: SeedDifference | None, model: str, baseline: str) -> str:
    """A comparison as one plain sentence."""
    if difference is None:
        return f"{model} against {baseline}: not measured."
    ways = {"better": "is better than", "worse": "is worse than"}
    way = ways.get(difference.verdict, "cannot be told apart from")
    note = ""
    if difference.significant and difference.verdict not in ways:
        note = f"; the interval leaves out 0, but less than {difference.least:.4f} is not claimed"
    return f"{model} {way} {baseline}: {difference:+.4f} nats a token ({difference.basis}){note}."


def main_table(report: Report, stats: StudyStatistics, folder: Path) -> None:
    """Cost and test losses of every model, then bits a byte by domain."""
    record = stats.record
    rows, domain_rows, bars = [], [], {}
    for key, facts in record.models.items():
        errors = [e for seed in record.seeds.values() if (e := _calibration(seed).get(key)) is not None]
        validation = stats.validation(key)
        rows.append(
            [
                label(stats, key),
                MODELS[key],
                facts.get("parameters"),
                facts.get("training_flops"),
                facts.get("inference_flops_per_token"),
                validation,
                stats.loss(key),
                stats.loss(key, "bpb"),
                stats.loss(key, "bpb", average="macro"),
                sum(errors) / len(errors) if errors else None,
                len(record.scored_seeds(key)),
            ]
        )
        by_domain = {
            name: value
            for index, name in enumerate(record.domains)
            if (value := stats.loss(key, "bpb", domain=index)) is not None
        }
        domain_rows.append([label(stats, key), *(by_domain.get(name) for name in record.domains)])
        if by_domain and key in _shown(stats):
            bars[label(stats, key)] = by_domain
    report.table(
        ["model", "is", "parameters", "training FLOPs as planned", "inference FLOPs/token", "validation loss",
         "test loss (nats/token)", "bits/byte, of all text", "bits/byte, mean of the domains",
         "ECE (validation)", "seeds"],
        rows,
        formats=["", "", ",", ".3g", ".3g", ".4f", ".4f", ".4f", ".4f", ".4f", ""],
        title="Every model: what it costs and what it reaches",
    )  # fmt: skip
    report.table(
        ["model", *record.domains],
        domain_rows,
        formats=["", *[".4f"] * len(record.domains)],
        title="Bits a byte by domain, test",
    )
    if bars:
        path = plots.domain_bars(folder / "domains.png", bars, y_label="bits per byte")
        report.figure(path, f"Bits per byte by domain, with 95% intervals over {covered(stats)}.")


def _calibration(seed: Mapping[str, Any]) -> Mapping[str, float]:
    """ECE by model of one seed, where it was measured."""
    return seed.get("evidence", {}).get("calibration", {}).get("ece", {})


def _shown(stats: StudyStatistics) -> list[str | None]:
    return [stats.best_expert, stats.best_uniform, "static", stats.fused, *RIVALS]


def differences(report: Report, stats: StudyStatistics, folder: Path) -> None:
    """Fused minus every baseline, overall and by domain for the most important ones."""
    fused = stats.fused
    if fused is None:
        report.text("No mixture was scored, so nothing can be compared.")
        return
    measured = {key: stats.difference(fused, key) for key in stats.compared()}
    rows = [[label(stats, key), *difference_cells(value)] for key, value in measured.items()]
    report.table(
        ["baseline", *HEADERS],
        rows,
        formats=["", "+.4f", "", ".4f", ""],
        title=f"{label(stats, fused)} minus each baseline, test",
    )
    shown: dict[str, Interval] = {
        label(stats, k): v for k, v in measured.items() if v and abs(v.estimate) < 1
    }
    if shown:
        path = plots.intervals(
            folder / "differences.png",
            shown,
            x_label="mixture minus baseline (nats per token); left is better",
            least=RESOLUTION,
        )
        far = "Baselines a nat or further off are left out."
        report.figure(path, f"Paired differences with 95% intervals over {covered(stats)}: {COLOURS} {far}")
    domains = stats.record.domains
    table = [
        [label(stats, key), *(_cell(stats.difference(fused, key, domain=i)) for i in range(len(domains)))]
        for key in _shown(stats)
        if key in measured
    ]
    report.table(
        ["baseline", *domains],
        table,
        align=["l"] * (1 + len(domains)),
        title="The same by domain (nats/token)",
    )


def _cell(difference: SeedDifference | None) -> str | None:
    return None if difference is None else f"{difference:+.4f}, {difference.verdict}"


def standing(report: Report, stats: StudyStatistics) -> None:
    """Against the Transformers of equal cost, in sentences, with the reason worked out from the stages."""
    fused = stats.fused
    if fused is None:
        return
    for key, what in RIVALS.items():
        difference = stats.difference(fused, key)
        lines = [f"**Against {what}.** {sentence(difference, 'The mixture', 'it')}"]
        if difference is not None:
            lines += [_decomposition(stats, fused, key), _cost(stats, fused, key)]
        if note := stats.record.facts.get("reasons", {}).get(key):
            lines.append(str(note))
        report.text(" ".join(line for line in lines if line))


def _decomposition(stats: StudyStatistics, fused: str, rival: str) -> str:
    """fused - rival = (best expert - rival) + the gains of the stages: an identity, so a reason."""
    best = stats.best_expert
    start = stats.difference(best, rival) if best else None
    steps = [(stage.name, stats.difference(stage.model, stage.before)) for stage in stats.steps_to(fused)]
    if best is None or start is None or any(value is None for _, value in steps):
        return "The steps that lead there were not all measured, so no reason can be given."
    parts = ", ".join(f"{value.estimate:+.4f} by {name}" for name, value in steps if value is not None)
    total = sum(value.estimate for _, value in steps if value is not None)
    where = "behind" if start.estimate > 0 else "ahead of"
    reach = "more" if -total > start.estimate else "less"
    alone = f"our best expert alone ({label(stats, best)}) is {abs(start.estimate):.4f} nats {where} it"
    why = f"Why: {alone}, and mixing"
    gain = f"changes that by {total:+.4f} ({parts})"
    if start.estimate > 0:
        return f"{why} {gain}, {reach} than that distance."
    return f"{why} {gain}."


def _cost(stats: StudyStatistics, fused: str, rival: str) -> str:
    names = {
        "parameters": "parameters",
        "training_flops": "planned training FLOPs",
        "inference_flops_per_token": "inference FLOPs a token",
    }
    ours, theirs = stats.record.models[fused], stats.record.models[rival]
    ratios = [
        f"{ours[name] / theirs[name]:.2f} times its {text}"
        for name, text in names.items()
        if ours.get(name) and theirs.get(name)
    ]
    return f"The mixture takes {', '.join(ratios)}." if ratios else ""


def gates(report: Report, stats: StudyStatistics) -> None:
    """The gates of each seed; where a headline comparison is not won, what failed and what was tried."""
    record = stats.record
    by_seed = {seed: {g["name"]: g for g in facts.get("gates", [])} for seed, facts in record.seeds.items()}
    names = list(dict.fromkeys(name for found in by_seed.values() for name in found))
    rows, failed = [], []
    for name in names:
        found = {seed: gates_of[name] for seed, gates_of in by_seed.items() if name in gates_of}
        first = next(iter(found.values()))
        words = [_passed(found[seed]) if seed in found else None for seed in by_seed]
        if "no" in words:
            failed.append(f"{name} ({first.get('question', '')})")
        reasons = "; ".join(dict.fromkeys(str(gate.get("reason", "")) for gate in found.values()))
        rows.append([name, first.get("question"), *words, _figures(first.get("figures", {})), reasons])
    if rows:
        seeds = [f"seed {seed}" for seed in by_seed]
        headers = ["gate", "question", *seeds, "figures of the first seed", "reason"]
        report.table(headers, rows, align=["l"] * len(headers), title="Gates")
        report.text(
            "Gates are decided on validation, but for the usefulness of G4, which is measured on the text "
            "that the static weights were fitted on, and for G8, which asks whether the table of test is "
            "whole."
        )
    lost = [text for text, difference in headline(stats).items() if difference and not difference.high < 0]
    if lost:
        named = f"The gates that failed: {'; '.join(failed)}." if failed else "No gate failed."
        why = "because the upper end of the interval is not below 0"
        report.text(f"Not won on test, {why}: {'; '.join(lost)}. {named}")
    _tries(report, record.facts.get("tries", []), needed=5 if lost else 0)


def headline(stats: StudyStatistics) -> Mapping[str, SeedDifference | None]:
    """The comparisons that a mixture exists for: best expert and uniform pools."""
    if stats.fused is None:
        return {}
    keys = [key for key in (stats.best_expert, *UNIFORM) if key in stats.compared()]
    return {f"mixture minus {label(stats, key)}": stats.difference(stats.fused, key) for key in keys if key}


def _passed(gate: Mapping[str, Any]) -> str:
    return {True: "yes", False: "no", None: "undecided"}[gate.get("passed")]


def _figures(figures: Mapping[str, Any]) -> str:
    """Figures of a gate in words, without those that are empty."""
    found = [(name.replace("_", " "), shown(value)) for name, value in figures.items()]
    return ", ".join(f"{name} {value.replace('_', ' ')}" for name, value in found if value)


def _tries(report: Report, tries: list[Mapping[str, Any]], needed: int) -> None:
    if tries:
        rows = [
            [*map(t.get, ("what", "why", "val_before", "val_after")), "yes" if t.get("kept") else "no",
             *map(t.get, ("note", "command", "commit"))]
            for t in tries
        ]  # fmt: skip
        report.table(
            [
                "what was tried",
                "why",
                "validation loss before (nats/token)",
                "after",
                "kept",
                "note",
                "command",
                "commit",
            ],
            rows,
            formats=["", "", ".4f", ".4f", "", "", "", ""],
            title="What was tried to improve the mixture",
        )
    if len(tries) < needed:
        report.text(
            f"Only {len(tries)} of at least {needed} tries are recorded: the search for a remedy is not done."
        )
    elif not tries:
        report.text("Nothing had to be mended, and no tries are recorded.")
