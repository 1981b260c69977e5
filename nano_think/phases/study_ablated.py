"""The ablations of a study made, measured on validation text and put into its record; test text is not read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nano_think.artifacts.checkpoint import Checkpoint, load_checkpoint
from nano_think.artifacts.memory import load_memory
from nano_think.data.module import TokenDataModule
from nano_think.errors import UserError
from nano_think.evals.forgetting import stand_alone
from nano_think.evals.losses import Batch, DocumentLosses, NllFunction, evaluate_models
from nano_think.evals.pools import SharedForward, lone_expert
from nano_think.evals.study_record import ABLATIONS, StudyLosses, StudyRecord
from nano_think.files import write_json
from nano_think.phases.data import data_module
from nano_think.phases.mla import stages_of
from nano_think.phases.run import Maker
from nano_think.phases.study_ablations import AGAIN, Ablated, Ablation, changed_experts
from nano_think.phases.study_evidence import memory_evidence, spaces_evidence, steps_evidence
from nano_think.phases.study_fits import make_all
from nano_think.phases.study_measure import BATCH_ROWS, losses_maker
from nano_think.phases.study_models import ModelCosts
from nano_think.phases.study_plan import Plan
from nano_think.phases.study_record import fit_facts, made_with, planned, portable

# Rows of one ablation beside that of its model: without its memory, and an expert alone.
OFF = "without memory"
MEMORY_FILE = "memory.json"


def ablation_maker(plan: Plan, ablation: Ablation) -> Maker:
    """The losses of an ablation on the study's validation text, and what its memory is worth where that changed.

    An expert is measured alone where it is not the study's own, or was trained on by 7c.
    """
    ablated = Ablated(plan, ablation.overrides, ablation.stage)
    spec = {"rows": plan.settings["rows"], "stage": ablation.stage, "alone": changed_experts(plan, ablated)}
    if ablation.evidence:
        spec |= {"evidence": list(ablation.evidence), "tokens": plan.settings["evidence_tokens"]}
    needs = {"shards": plan.shards, **ablated.trained}

    def build(path: Path) -> dict[str, Any]:
        losses = _measure(plan, ablated, spec["alone"], path)
        _find_out(plan, ablated, ablation.evidence, path)
        for key, value in losses.items():
            value.save(path / f"{key}.npz")
        return {"rows": list(losses)}

    return Maker("study_ablation", spec, build, needs, plan.run.command(phase="study"))


def _load(plan: Plan, maker: Maker) -> Checkpoint:
    return load_checkpoint(maker.recipe.path(plan.run.artifacts), maker.command)


def _validation(plan: Plan) -> tuple[TokenDataModule, list[Batch]]:
    data = data_module(plan.run, plan.shards, BATCH_ROWS, "expert_train")
    return data, list(data.dataloader("validation", rows=plan.settings["rows"]))


def _find_out(plan: Plan, ablated: Ablated, topics: Sequence[str], path: Path) -> None:
    """Write what the ablation is asked beside its losses, a file a topic, on the tokens that the study's own read.

    The diffuser whose steps are counted is the expert as it was pre-trained.
    """
    if not topics:
        return
    (data, batches), tokens = _validation(plan), plan.settings["evidence_tokens"]

    def steps() -> dict[str, Any]:
        network, teacher = (_load(plan, ablated.trained[name]).model for name in ("diffuser", "transformer"))
        return steps_evidence(network, teacher, batches, tokens)

    known: dict[str, Callable[[], dict[str, Any]]] = {
        "spaces": lambda: spaces_evidence(_load(plan, ablated.model), batches, data.domains, tokens),
        "steps_curve": steps,
    }
    for topic in topics:
        write_json(path / f"{topic}.json", known[topic]())


def _measure(plan: Plan, ablated: Ablated, alone: Sequence[str], path: Path) -> dict[str, DocumentLosses]:
    """Losses of the model, `OFF` and experts alone; writes what its memory is worth beside them."""
    checkpoint = _load(plan, ablated.model)
    before = _load(plan, dict(stages_of(ablated.model))["7b"]).model
    data, batches = _validation(plan)
    memory = load_memory(checkpoint.path / "memory") if ablated.last == "7d" else None
    slots = None if memory is None else memory.slots
    models: dict[str, NllFunction] = {"model": SharedForward(checkpoint.model, slots).fused()}
    if memory is not None:
        models[OFF] = SharedForward(checkpoint.model).fused()
    experts = stand_alone(before.eval(), checkpoint.model)
    models |= {name: lone_expert(experts[name].eval()) for name in alone}
    found = evaluate_models(models, batches, checkpoint.tokenizer.byte_lengths, len(data.domains))
    if memory is not None:
        flops = ablated.costs.inference_flops(ablated.costs.mixture())
        write_json(path / MEMORY_FILE, memory_evidence(checkpoint, memory, batches, data.domains, flops))
    return found


def run_ablations(plan: Plan, found: Sequence[Ablation], out: Path, workers: int) -> str | None:
    """Make and measure what the record in `out` lacks, and put it there; its digest, None where nothing was asked.

    plan: of the first seed, tuned; a record that has ablations of another seed gets the others of that one too.
    Where the seed was measured elsewhere, the study's own mixture is made again beside them: how far that lies
    from the record is what another machine does.
    """
    if not found:
        return None
    run, record = plan.run, StudyRecord.load(out)
    tried = [seed for seed, facts in record.seeds.items() if ABLATIONS in facts]
    if tried and plan.seed not in tried:
        plan = Plan(run, tried[0], plan.domains, plan.chosen)
    held = record.seeds[plan.seed].get(ABLATIONS, {})
    missing = _missing(plan, found, held)
    elsewhere = not losses_maker(plan, "test").recipe.exists(run.artifacts)
    if elsewhere and missing:
        what = "What the study has, made again where its ablations were"
        stages = sorted({one.stage for one in missing})
        missing += _missing(plan, [Ablation(f"{AGAIN}_{stage}", what, (), stage) for stage in stages], held)
    made = {one.name: ablation_maker(plan, one) for one in missing}
    fits = [maker for one in missing for maker in made[one.name].needs.values()]
    own = {maker.recipe.hash for maker in plan.trained.values()}
    if elsewhere and any(m.recipe.hash in own and not m.recipe.exists(run.artifacts) for m in fits):
        run.say(
            f"[bold]ablations[/bold]: the experts of seed {plan.seed} are not here, so they are made again from "
            "their settings, with the same hashes"
        )
    make_all(run, fits, workers)
    for one in missing:
        run.obtain(made[one.name], named=True)
    return _record(plan, missing, made, out)


def _missing(plan: Plan, found: Sequence[Ablation], held: Mapping[str, Any]) -> list[Ablation]:
    """What the record does not have as it is asked for, and what is here anyway."""
    makers = [(one, ablation_maker(plan, one)) for one in found]
    return [
        one
        for one, maker in makers
        if held.get(one.name, {}).get("hash") != maker.recipe.hash or maker.recipe.exists(plan.run.artifacts)
    ]


def _record(plan: Plan, found: Sequence[Ablation], made: dict[str, Maker], out: Path) -> str:
    """Put ablations into the record, each in the place of what it has of that name; the digest."""
    record = StudyRecord.load(out)
    key, seed = (ABLATIONS, plan.seed), record.facts["seeds"][str(plan.seed)]
    rows: dict[str, DocumentLosses] = {}
    if key in record.losses:
        old = record.losses[key]
        rows = {name: old.of(name, len(record.domains)) for name in old.models}
    facts = dict(seed.get(ABLATIONS, {}))
    for one in found:
        folder = made[one.name].recipe.path(plan.run.artifacts)
        rows = {name: value for name, value in rows.items() if name.split("/")[0] != one.name}
        for name in plan.result(made[one.name])["rows"]:
            own = one.name if name == "model" else f"{one.name}/{name}"
            rows[own] = DocumentLosses.load(folder / f"{name}.npz")
        facts[one.name] = _facts(plan, one, made[one.name], folder)
    val = record.losses["val", plan.seed]
    if any(not np.array_equal(val.uid, value.uid) for value in rows.values()):
        raise UserError(
            f"{out}: the ablations were measured on other documents than the record: give another study.out"
        )
    seed[ABLATIONS] = facts
    record.facts["planned_ablations"] = planned(plan, record)
    return StudyRecord(record.facts, {**record.losses, key: StudyLosses.collect(rows)}).save(out)


def _facts(plan: Plan, ablation: Ablation, maker: Maker, folder: Path) -> dict[str, Any]:
    """What the record says of an ablation beside its losses."""
    ablated = Ablated(plan, ablation.overrides, ablation.stage)
    costs, key = ModelCosts(ablated), f"fused_{ablation.stage}"
    own = {one.recipe.hash for one in plan.trained.values()}
    fits = {
        name: fit_facts(plan, one, costs.fit_flops(name))
        for name, one in ablated.trained.items()
        if "fit" in one.spec and one.recipe.hash not in own
    }
    for fit in fits.values():
        del fit["history"]
    found = {
        "what": ablation.what,
        "overrides": list(ablation.overrides),
        "stage": ablation.stage,
        "against": ablation.against,
        "hash": maker.recipe.hash,
        "command": portable(ablated.model.command),
        "fits": fits,
        **costs.stages()[key],
        "measured_with": made_with(plan, maker),
    }
    if ablation.stage == "7d":
        found["flops_without_memory"] = ablated.costs.inference_flops(ablated.costs.mixture())
        found["memory"] = json.loads((folder / MEMORY_FILE).read_text(encoding="utf-8"))
    for topic in ablation.evidence:
        text = (folder / f"{topic}.json").read_text(encoding="utf-8")
        found["evidence"] = {**found.get("evidence", {}), topic: json.loads(text)}
    return found
