"""The report of a study, a pure function of its committed record: no model, no data, no network.

write_study_report("experiments/results/study")  # report.md, report.html, report.json, figures/
"""

from __future__ import annotations

from pathlib import Path

from nano_think.evals.report import Report
from nano_think.evals.study_ablations import ablations
from nano_think.evals.study_evidence import evidence
from nano_think.evals.study_record import StudyRecord
from nano_think.evals.study_sections import (
    differences,
    gates,
    label,
    main_table,
    sentence,
    standing,
)
from nano_think.evals.study_setup import change_our_mind, provenance, question, setup
from nano_think.evals.study_stages import router_bounds, stage_gains
from nano_think.evals.study_statistics import RIVALS, StudyStatistics
from nano_think.evals.study_training import training


def write_study_report(directory: str | Path, n_resamples: int = 2000) -> str:
    """Redraw report and figures from the record in `directory`.

    Args:
        directory: what StudyRecord.save wrote.
        n_resamples: resamples of the documents behind each interval.

    Returns:
        The digest of all inputs; the same digest means the same report.

    Raises:
        UserError: the record is missing or damaged.
    """
    record = StudyRecord.load(directory)
    study_report(record, Path(directory) / "figures", n_resamples).write(directory)
    return record.digest()


def study_report(record: StudyRecord, figures: str | Path, n_resamples: int = 2000) -> Report:
    """The report of a record; its figures are drawn into the folder `figures`."""
    stats, folder = StudyStatistics(record, n_resamples), Path(figures)
    report = Report("Is a mixture of different experts better than one Transformer?")
    report.json({"inputs": record.digest(), "fused": stats.fused, "best_expert": stats.best_expert})
    question(report, stats)
    _summary(report, stats)
    setup(report, stats)
    report.heading("Losses")
    main_table(report, stats, folder)
    report.heading("The mixture against every baseline")
    differences(report, stats, folder)
    report.heading("Against Transformers of equal cost")
    standing(report, stats)
    report.heading("Where the gain comes from")
    stage_gains(report, stats, folder)
    report.heading("What routing gains, and could gain")
    router_bounds(report, stats, folder)
    report.heading("Gates, and what was tried")
    gates(report, stats)
    ablations(report, stats, folder)
    report.heading("Training")
    training(report, stats, folder)
    evidence(report, record, folder)
    change_our_mind(report, stats)
    provenance(report, stats)
    return report


# What the uniform pools are, for readers who know no names of models.
POOLED = {
    "uniform_prob": "the plain average of its experts' probabilities",
    "uniform_hidden": "the plain average of its experts' hidden states",
}


def _summary(report: Report, stats: StudyStatistics) -> None:
    """The verdicts, before everything else."""
    chosen = label(stats, stats.fused) if stats.fused else "none"
    lines = [f"The mixture is the stage of lowest validation loss: {chosen}."]
    if stats.fused is not None:
        best = {stats.best_expert: "its best expert alone"} if stats.best_expert else {}
        others = {key: f"{what} ({label(stats, key)})" for key, what in (best | POOLED).items()}
        lines += [
            sentence(stats.difference(stats.fused, key), "The mixture", what)
            for key, what in (others | RIVALS).items()
            if key in stats.compared() or key in RIVALS
        ]
    lines.append(sentence(stats.difference("fused_7b", "static"), "The router (7b)", "static weights (7a)"))
    memory = stats.difference("fused_7d", "fused_7c")
    lines.append(sentence(memory, label(stats, "fused_7d"), label(stats, "fused_7c")))
    report.heading("Answer in short").text("\n".join(f"- {line}" for line in lines))
