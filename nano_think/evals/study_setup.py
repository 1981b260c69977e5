"""How a study was made: question, data, models, tuning, curves, what would change our mind, provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nano_think.evals import plots
from nano_think.evals.bootstrap import RESOLUTION
from nano_think.evals.report import Report
from nano_think.evals.seeds import SeedDifference
from nano_think.evals.study_record import MODELS
from nano_think.evals.study_sections import headline, label
from nano_think.evals.study_statistics import RIVALS, StudyStatistics, word

# share of the loss by which a curve may fall an epoch at its end; one that falls faster was stopped too early
PLATEAU = 0.01


def settings_rows(facts: Mapping[str, Any], prefix: str = "") -> Iterator[list[str]]:
    """Nested settings as rows of dotted name and value."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from settings_rows(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            yield [f"{prefix}{key}", f"{text:,}" if isinstance(text, int) else str(text)]


def question(report: Report, stats: StudyStatistics) -> None:
    """The question, and what is missing from the answer."""
    facts = stats.record.facts
    report.heading("Question").text(str(facts.get("question", "No question was recorded.")))
    if missing := stats.record.missing():
        report.text("**This study is not whole.** Missing:\n\n" + "\n".join(f"- {line}" for line in missing))
    if changed := stats.record.changed:
        report.text(f"**Changed since SHA256SUMS was written:** {', '.join(changed)}.")


def setup(report: Report, stats: StudyStatistics) -> None:
    """Data, settings and models, and how figures are made."""
    record = stats.record
    report.heading("Set-up")
    report.table(["data", "value"], list(settings_rows(record.facts["data"])), align=["l", "l"], title="Data")
    rows = list(settings_rows(record.facts.get("settings", {})))
    report.table(["setting", "value"], rows, align=["l", "l"], title="Settings")
    models = [
        [label(stats, key), MODELS[key], facts.get("description"), facts.get("trained_parameters")]
        for key, facts in record.models.items()
    ]
    headers = ["model", "is", "what it is", "parameters trained"]
    report.table(headers, models, formats=["", "", "", ","], title="Models")
    report.text(_method(stats))


def _method(stats: StudyStatistics) -> str:
    """How figures are made, and when a difference is claimed."""
    fused, best = (label(stats, key) if key else "none" for key in (stats.fused, stats.best_expert))
    over_seeds = (
        "They also cover the choice of seeds (Student's t over the seeds). A difference is called better or "
        f"worse only where its interval leaves out 0 and it is at least {RESOLUTION:g} and twice the "
        "deviation of the baseline over its seeds."
        if len(stats.record.seeds) > 1
        else "They know nothing of other seeds. A difference is called better or worse only where its interval "
        f"leaves out 0 and it is at least {RESOLUTION:g}."
    )
    return (
        f"The mixture that is compared ({fused}) and the best expert ({best}) are those of the lowest loss "
        "on validation. A loss is nats a token, the mean over seeds. Intervals (95% each, however many there "
        f"are) cover the choice of documents: bootstrap over documents, never tokens, {stats.n_resamples:,} "
        f"resamples, both models of a comparison on the same ones. {over_seeds} Bounds (oracles that see the "
        "labels, choices that know the domain) are no models, and nothing is claimed against them."
    )


def training(report: Report, stats: StudyStatistics, folder: Path) -> None:
    """Tuning trials of every family, where each fit stopped and whether it had ended, and the curves."""
    record = stats.record
    if tuning := record.facts.get("tuning"):
        _tuning(report, tuning)
    rows, moving, known = [], [], True
    keys = {key for facts in record.seeds.values() for key in facts.get("fits", {})}
    for key in (*(key for key in record.models if key in keys), *sorted(keys - set(record.models))):
        fits = [facts["fits"][key] for facts in record.seeds.values() if key in facts.get("fits", {})]
        fall = _mean(fits, "fall_per_epoch")
        known = known and fall is not None
        if fall is not None and fall > PLATEAU:
            moving.append(label(stats, key))
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
    if moving:
        still = f"Still falling by more than {PLATEAU:.0%} an epoch when they ended, so not fully trained"
        report.text(f"{still}: {', '.join(moving)}.")
    elif rows and known:
        report.text(f"Every validation curve fell by at most {PLATEAU:.0%} an epoch at its end: a plateau.")
    _curves(report, stats, folder)


def _tuning(report: Report, trials: Sequence[Mapping[str, Any]]) -> None:
    """Every trial with whatever settings were tried."""
    families = [str(trial.get("family")) for trial in trials]
    counts = ", ".join(f"{family} {families.count(family)}" for family in dict.fromkeys(families))
    report.text(f"Tuning trials a family: {counts}.")
    names = list(dict.fromkeys(name for trial in trials for name in trial if name != "chosen"))
    formats = {"family": "", "tokens": ",", "val_loss": ".4f"}
    report.table(
        [*(name.replace("_", " ") for name in names), "chosen"],
        [[*map(trial.get, names), "chosen" if trial.get("chosen") else ""] for trial in trials],
        formats=[*(formats.get(name, "g") for name in names), ""],
        title="Tuning record",
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
        steps = sorted(set.intersection(*(set(h) for h in histories))) if histories else []
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
            )
            report.figure(path, f"Validation loss against {x_label}, mean over seeds.")


def change_our_mind(report: Report, stats: StudyStatistics) -> None:
    """For each headline verdict the figure that would turn it."""
    fused = stats.fused
    lines = []
    pairs = dict(headline(stats))
    if fused is not None:
        pairs |= {f"mixture minus {label(stats, key)}": stats.difference(fused, key) for key in RIVALS}
    pairs["router (7b) minus static weights (7a)"] = stats.difference("fused_7b", "static")
    for text, difference in pairs.items():
        if difference is None:
            lines.append(f"{text}: any measurement, as there is none.")
            continue
        lines.append(f"{text} ({word(difference)}): {_turn(difference)}.")
    lines.append(
        "Size: everything here holds for the number of parameters and tokens of the set-up. A different "
        "order at a larger size would change what we recommend, not these figures."
    )
    lines += [str(line) for line in stats.record.facts.get("change_our_mind", [])]
    report.heading("What would change our mind").text("\n".join(f"- {line}" for line in lines))


def _turn(difference: SeedDifference) -> str:
    """The figures that would turn a verdict."""
    low, high, least = f"{difference.low:+.4f}", f"{difference.high:+.4f}", f"{difference.least:.4f}"
    if difference.verdict == "better":
        moved = f"moved the upper end above 0 (it is {high}) or the gain below {least}"
        return f"we would give the claim up if more seeds or other text {moved}"
    if difference.verdict == "worse":
        more = f"{difference.estimate + difference.least:.4f}"
        fell = f"the upper end, now {high}, fell below 0 and the loss by {more} nats or more"
        return f"we would claim a gain if {fell}"
    if difference.significant:
        return f"we would decide if the difference, now {difference.estimate:+.4f}, grew to {least} or more"
    moved = f"moved one end of [{low}, {high}] over 0 and the difference were at least {least}"
    return f"we would decide if more seeds or documents {moved}"


def provenance(report: Report, stats: StudyStatistics) -> None:
    """Commands, commit and machine that wrote the record, reads of the test split and hashes of all inputs."""
    record, facts = stats.record, stats.record.facts
    report.heading("How to repeat it")
    commands = "\n".join(map(str, facts.get("commands", []))) or "no commands were recorded"
    report.text(f"```\n{commands}\n```")
    rows: list[list[Any]] = [
        ["leak audit", facts.get("audit", "not recorded")],
        ["reads of the test split", str(facts.get("test_reads", "not recorded"))],
        ["hash of all inputs", f"`{record.digest()}`"],
        *settings_rows(facts.get("versions", {})),
    ]
    for seed, made in record.seeds.items():
        if where := made.get("measured_with"):
            rows.append([f"seed {seed}", f"commit {where['commit']}, {where['machine']}"])
    report.table(["what", "value"], rows, align=["l", "l"])
    commands_of = {
        label(stats, key): fit["command"]
        for seed in record.seeds.values()
        for key, fit in seed.get("fits", {}).items()
        if fit.get("command")
    }
    if commands_of:
        rows = [[name, f"`{command}`"] for name, command in commands_of.items()]
        report.table(["fit", "command"], rows, title="The command of each fit, last seed")
    hashes = [[name, f"`{value}`"] for name, value in sorted(record.hashes.items())]
    report.table(["input", "SHA-256"], hashes, align=["l", "l"], title="Inputs of this report")
