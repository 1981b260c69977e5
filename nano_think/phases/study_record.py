"""The record of a study: what was trained, what it cost, what was measured. The report is drawn from it alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from nano_think.errors import UserError
from nano_think.evals.study_record import StudyLosses, StudyRecord
from nano_think.evals.study_report import write_study_report
from nano_think.phases.data import load_corpus
from nano_think.phases.run import Run, versions
from nano_think.phases.sections import fall_per_epoch
from nano_think.phases.study_evidence import load_evidence
from nano_think.phases.study_gates import study_gates
from nano_think.phases.study_measure import load_losses, losses_maker, test_reads
from nano_think.phases.study_models import model_facts
from nano_think.phases.study_plan import Plan
from nano_think.phases.study_tuning import Trial

# What was tried to improve the mixture, written by hand beside the record.
TRIES = "tries.yaml"


def write_record(out: Path, plans: Sequence[Plan], trials: Sequence[Trial], seeds: Sequence[int]) -> str:
    """Write the record of the seeds that are measured into `out`; returns its digest."""
    first = plans[0]
    losses = {
        (short, plan.seed): StudyLosses.collect(load_losses(plan, losses_maker(plan, split)))
        for plan in plans
        for short, split in (("val", "validation"), ("test", "test"))
    }
    facts = {
        "question": first.settings["question"],
        "commands": [first.run.command(phase="study")],
        "settings": {**first.settings, "seeds": list(seeds), "size": first.run.plain(first.run.cfg.size)},
        "machine": versions()["machine"],
        "versions": versions(),
        "data": _data(first, losses["test", first.seed]),
        "models": model_facts(first),
        "tuning": [asdict(trial) for trial in trials],
        "seeds": {str(plan.seed): _seed(plan) for plan in plans},
        "tries": _tries(out),
        "test_reads": max(test_reads(plan) for plan in plans),
    }
    return StudyRecord(facts, losses).save(out)


def draw(out: Path, run: Run) -> Path:
    """Draw the report of a record into its folder, from the committed files alone."""
    digest = write_study_report(out)
    run.say(f"[bold]report[/bold]: {out / 'report.md'}, {out / 'report.html'}\n[bold]record[/bold]: {digest}")
    return out / "report.md"


def _data(plan: Plan, test: StudyLosses) -> dict[str, Any]:
    corpus = load_corpus(plan.run, plan.shards.needs["corpus"]).manifest
    return {
        "source": corpus["source"]["name"],
        "corpus_hash": corpus["hash"],
        "tokenizer_hash": plan.run.result_of(plan.shards.needs["tokenizer"].recipe.path(plan.run.artifacts))[
            "hash"
        ],
        "domains": list(corpus["domains"]),
        "train_tokens": plan.settings["expert_tokens"],
        "fusion_tokens": plan.settings["fusion_tokens"],
        "test_tokens": int(test.num_tokens.sum()),
        "test_documents": len(test.uid),
    }


def _seed(plan: Plan) -> dict[str, Any]:
    """Fits, gates and evidence of one seed."""
    fits = {}
    for key, maker in plan.trained.items():
        result, fit = plan.result(maker), maker.spec.get("fit", {})
        if "history" not in result:
            continue
        kept = ("history", "steps", "tokens", "epochs", "best_step", "val_loss", "flops")
        fall = fall_per_epoch(result["history"], result["steps"] / result["epochs"])
        fits[key] = {name: result[name] for name in kept if name in result}
        fits[key] |= {"fall_per_epoch": fall, "lr": fit["lr"], "hash": maker.recipe.hash}
        fits[key]["command"] = maker.command
    static = plan.result(plan.trained["fused_7a"])
    evidence = load_evidence(plan)
    gates = study_gates(plan, evidence, test_reads(plan))
    return {"fits": fits, "static": static, "gates": gates, "evidence": evidence}


def _tries(out: Path) -> list[dict[str, Any]]:
    path = out / TRIES
    if not path.is_file():
        return []
    tries = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(tries, list) or not all(isinstance(one, dict) for one in tries):
        raise UserError(
            f"{path} must be a list of tries, each with what, why, command, val_before, val_after"
        )
    return tries
