"""The record of a study: what was trained, what it cost, what was measured. The report is drawn from it alone."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from nano_think.errors import UserError
from nano_think.evals.study_record import StudyLosses, StudyRecord
from nano_think.evals.study_report import write_study_report
from nano_think.phases.data import load_corpus
from nano_think.phases.machine import versions
from nano_think.phases.run import Maker, Run
from nano_think.phases.sections import fall_per_epoch
from nano_think.phases.study_ablations import planned_names
from nano_think.phases.study_audit import audited
from nano_think.phases.study_costs import planned_tokens
from nano_think.phases.study_evidence import load_evidence
from nano_think.phases.study_gates import study_gates
from nano_think.phases.study_measure import load_losses, losses_maker, test_reads
from nano_think.phases.study_models import ModelCosts, model_facts
from nano_think.phases.study_plan import Plan
from nano_think.phases.study_tuning import Trial

# What people have to say, beside the record.
NOTES = "notes.yaml"


def write_record(
    out: Path,
    plans: Sequence[Plan],
    trials: Sequence[Trial],
    seeds: Sequence[int],
    kept: StudyRecord | None = None,
) -> str:
    """Write the record of the seeds that are measured here into `out`; returns its digest.

    seeds: all that the study is to have. kept: a record of the same study, whose other seeds stay in it.
    """
    first = plans[0]
    losses = {
        (short, plan.seed): StudyLosses.collect(load_losses(plan, losses_maker(plan, split)))
        for plan in plans
        for short, split in (("val", "validation"), ("test", "test"))
    }
    made = {str(plan.seed): _seed(plan) for plan in plans}
    reads = [test_reads(plan) for plan in plans]
    asked = planned(first, kept)
    if kept is not None:
        losses = {**kept.losses, **losses}
        for seed, old in kept.facts["seeds"].items():
            tried = {"ablations": old["ablations"]} if "ablations" in old else {}
            made[seed] = {**made[seed], **tried} if seed in made else old
        reads.append(kept.facts.get("test_reads", 0))
    facts = {
        "question": first.settings["question"],
        "commands": [portable(first.run.command(phase="study"))],
        "settings": record_settings(first, seeds),
        "versions": versions(),
        "data": _data(first, losses["test", first.seed]),
        "models": model_facts(first),
        "tuning": [asdict(trial) for trial in trials],
        "seeds": dict(sorted(made.items(), key=lambda item: int(item[0]))),
        **by_hand(out),
        "test_reads": max(reads),
        **({"planned_ablations": asked} if asked else {}),
    }
    return StudyRecord(facts, losses).save(out)


def planned(plan: Plan, kept: StudyRecord | None) -> list[str]:
    """The names of all ablations that a study is to have: those of its record and those that are asked for."""
    there = [] if kept is None else kept.facts.get("planned_ablations", [])
    return list(dict.fromkeys([*there, *planned_names(plan.settings)]))


def portable(command: str) -> str:
    """A command as it can be typed elsewhere: the corpus is $DATA, results lie where they lie by default."""
    words = [word for word in shlex.split(command) if not word.startswith(("run.root=", "study.out="))]
    return " ".join(
        "data.root=$DATA" if word.startswith("data.root=") else shlex.quote(word) for word in words
    )


def draw(out: Path, run: Run) -> Path:
    """Draw the report of a record into its folder, from the committed files alone."""
    digest = write_study_report(out)
    run.say(f"[bold]report[/bold]: {out / 'report.md'}, {out / 'report.html'}\n[bold]record[/bold]: {digest}")
    return out / "report.md"


def record_settings(plan: Plan, seeds: Sequence[int]) -> dict[str, Any]:
    """What decides the figures, without where they go and how many processes made them.

    Ablations are left out: a record may get them later.
    """
    kept = {
        key: value
        for key, value in plan.settings.items()
        if key not in ("question", "out", "workers", "redraw", "ablations", "widths")
    }
    return {**kept, "seeds": list(seeds), "size": plan.run.plain(plan.run.cfg.size)}


def _data(plan: Plan, test: StudyLosses) -> dict[str, Any]:
    corpus = load_corpus(plan.run, plan.shards.needs["corpus"]).manifest
    tokenizer = plan.result(plan.shards.needs["tokenizer"])
    return {
        "source": corpus["source"]["name"],
        "corpus_hash": corpus["hash"],
        "tokenizer_hash": tokenizer["hash"],
        "domains": list(corpus["domains"]),
        "train_tokens": plan.settings["expert_tokens"],
        "fusion_tokens": plan.settings["fusion_tokens"],
        "test_tokens": int(test.num_tokens.sum()),
        "test_documents": len(test.uid),
    }


def _seed(plan: Plan) -> dict[str, Any]:
    """Fits, gates, leak audit and evidence of one seed."""
    fits, costs = {}, ModelCosts(plan)
    for key, maker in plan.trained.items():
        if "history" in plan.result(maker):
            fits[key] = fit_facts(plan, maker, costs.fit_flops(key))
    static = plan.result(plan.trained["fused_7a"])
    evidence = load_evidence(plan)
    gates = study_gates(plan, evidence, test_reads(plan))
    return {
        "fits": fits,
        "static": static,
        "gates": gates,
        "audit": audited(plan),
        "evidence": evidence,
        "measured_with": made_with(plan, losses_maker(plan, "test")),
    }


def fit_facts(plan: Plan, maker: Maker, flops: float) -> dict[str, Any]:
    """Where a fit stood at its end, and its command; flops: of its planned steps."""
    result, fit = plan.result(maker), maker.spec["fit"]
    kept = ("history", "steps", "tokens", "epochs", "best_step", "val_loss")
    return {
        **{name: result[name] for name in kept},
        "planned_flops": flops,
        "planned_tokens": planned_tokens(fit),
        "fall_per_epoch": fall_per_epoch(result["history"], result["steps"] / result["epochs"]),
        "lr": fit["lr"],
        "hash": maker.recipe.hash,
        "command": portable(maker.command),
    }


def made_with(plan: Plan, maker: Maker) -> dict[str, Any]:
    """Commit and machine of what was measured: parts of one study may come from several machines."""
    made = plan.run.provenance_of(maker.recipe.path(plan.run.artifacts))["made_by"]
    return {name: made[name] for name in ("commit", "machine")}


def by_hand(out: Path) -> dict[str, Any]:
    """What people wrote beside the record: tries, reasons by model key, what would change their mind."""
    path = out / NOTES
    if not path.is_file():
        return {"tries": []}
    notes = yaml.safe_load(path.read_text(encoding="utf-8"))
    kinds = {"tries": list, "reasons": dict, "change_our_mind": list}
    if not isinstance(notes, dict) or any(not isinstance(notes[key], kinds.get(key, ())) for key in notes):
        raise UserError(
            f"{path} holds tries (a list of what, why, command, val_before, val_after, kept), reasons (a text by "
            "model) and change_our_mind (a list of texts), and nothing else"
        )
    return {"tries": [], **notes}
