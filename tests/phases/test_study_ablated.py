"""Ablations made and measured beside the mixture of a study whose record holds nothing but that mixture."""

from __future__ import annotations

import shutil

import pytest

from nano_think.evals.losses import evaluate_models
from nano_think.evals.pools import SharedForward
from nano_think.evals.study_record import StudyLosses, StudyRecord
from nano_think.evals.study_report import write_study_report
from nano_think.phases import study_ablated
from nano_think.phases.data import data_module, load_shards, shards_maker
from nano_think.phases.study_ablated import run_ablations
from nano_think.phases.study_ablations import Ablated, ablations
from nano_think.phases.study_plan import EXPERTS, Plan

LIMITS = (
    "study.expert_tokens=6400",
    "study.fusion_tokens=1600",
    "study.rows=4",
    "study.evidence_tokens=1000",
)
SHORT = tuple(f"++training.{name}.max_steps=4" for name in EXPERTS)
SHORT += tuple(f"++training.mla.stage_{stage}.max_steps=3" for stage in ("7b", "7c", "7d"))
UNFROZEN = "unfrozen: {what: experts learn too, overrides: ['training.mla.unfreeze=all']}"
BY_TOKEN = (
    "by_token: {what: memory by token, stage: 7d, overrides: ['model.mla.slot_reader=own', "
    "'model.retrieval.granularity=token', 'model.retrieval.chunk=4', 'model.retrieval.k=2', "
    "'training.mla.memory_dropout=0']}"
)
BARE = "bare: {what: no adaptors, evidence: [spaces, steps_curve], overrides: ["
BARE += ", ".join(f"'experts.{name}.adaptor=false'" for name in EXPERTS) + "]}"

pytestmark = pytest.mark.slow


def planned(project, *more):
    """(plan of seed 1, its ablations) of a study with these settings."""
    run = project.new("phase=study", *LIMITS, *SHORT, *more)
    run.obtain(shards_maker(run), named=True)
    text = load_shards(run, shards_maker(run))
    plan = Plan(run, seed=1, domains=len(text.domains))
    return plan, ablations(plan, text)


def record_of(plan, out, last):
    """A record with the validation losses of the study's own experts, 7c, and 7d where that is the last stage."""
    own = Ablated(plan, (), last)
    for maker in own.trained.values():
        plan.run.obtain(maker, named=True)
    loaded = {
        name: study_ablated.load_checkpoint(maker.recipe.path(plan.run.artifacts))
        for name, maker in own.trained.items()
    }
    data = data_module(plan.run, plan.shards, 16, "expert_train")
    pool = SharedForward(loaded["fused_7a"].model)
    models = {name: pool.expert(name) for name in EXPERTS}
    models["fused_7c"] = SharedForward(loaded["fused_7c"].model).fused()
    if last == "7d":
        memory = study_ablated.load_memory(loaded["fused_7d"].path / "memory")
        models["fused_7d"] = SharedForward(loaded["fused_7d"].model, memory.slots).fused()
    lengths = loaded["transformer"].tokenizer.byte_lengths
    losses = evaluate_models(models, data.dataloader("validation", rows=4), lengths, 2)
    facts = {"data": {"domains": data.domains}, "models": {name: {"label": name} for name in models}}
    facts |= {"seeds": {"1": {"fits": {}}}, "settings": {"seeds": [1]}}
    StudyRecord(facts, {("val", 1): StudyLosses.collect(losses)}).save(out)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, shared_project):
    """(project, digest): a study's mixture and its ablations in one folder."""
    with shared_project(tmp_path_factory.mktemp("ablated")) as project:
        plan, found = planned(
            project, f"study.ablations={{{UNFROZEN}, {BY_TOKEN}, {BARE}}}", "study.widths=[48]"
        )
        out = project.root / "study"
        record_of(plan, out, "7d")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                study_ablated, "losses_maker", lambda plan, _: plan.shards
            )  # "seed 1 was measured here"
            digest = run_ablations(plan, found, out, workers=1)
    return project, digest


def test_the_record_has_every_ablation_with_its_losses(measured):
    project, digest = measured
    record = StudyRecord.load(project.root / "study")
    assert record.digest() == digest
    tried = record.facts["seeds"]["1"]["ablations"]
    assert list(tried) == record.facts["planned_ablations"] == ["unfrozen", "by_token", "bare", "width_48"]
    alone = [f"{name}/{expert}" for name in ("unfrozen", "bare", "width_48") for expert in EXPERTS]
    rows = record.losses["ablations", 1].models
    assert sorted(rows) == sorted([*tried, "by_token/without memory", *alone])
    for name in tried:
        own, other = record.of("fused_7c", "val", 1), record.of(name, "ablations", 1)
        assert own.pairs_with(other)
        assert own.loss() != other.loss()


def test_unfrozen_experts_are_measured_alone(measured):
    record = StudyRecord.load(measured[0].root / "study")
    tried = record.facts["seeds"]["1"]["ablations"]["unfrozen"]
    for expert in EXPERTS:
        was, now = record.of(expert, "val", 1), record.of(f"unfrozen/{expert}", "ablations", 1)
        assert 0 < abs(was.loss() - now.loss()) < 0.5
    # experts, 7a and 7b are the study's
    assert tried["fits"].keys() == {"fused_7c"}
    assert tried["trained_parameters"] > 0.9 * tried["parameters"]


def test_memory_is_measured_off_and_on(measured):
    tried = StudyRecord.load(measured[0].root / "study").facts["seeds"]["1"]["ablations"]["by_token"]
    assert tried["memory"].keys() >= {"R1", "cost", "planted"}
    assert tried["inference_flops_per_token"] > tried["flops_without_memory"]


def test_a_mixture_without_adaptors_is_smaller_and_asked_what_it_is_asked(measured):
    project, _ = measured
    plan, _ = planned(project)
    seed = StudyRecord.load(project.root / "study").facts["seeds"]["1"]
    bare, width = seed["ablations"]["bare"], plan.run.cfg.size.d_model
    own = plan.costs.parameters(plan.costs.mixture())
    assert own - bare["parameters"] == len(EXPERTS) * width**2
    assert bare["evidence"].keys() == {"spaces", "steps_curve"}
    spaces, steps = bare["evidence"]["spaces"], bare["evidence"]["steps_curve"]
    assert spaces["adaptor_distance"] == {}
    assert spaces["without_adaptors"]["cka"].keys() == {"input", *EXPERTS}
    assert "with_adaptors" not in spaces
    assert [entry["steps"] for entry in steps["curve"]] == [1, 2, 5, 10, 25, 50, 100]
    assert "evidence" not in seed["ablations"]["unfrozen"]


def test_a_width_takes_the_flops_of_the_study(measured):
    project, _ = measured
    plan, _ = planned(project)
    width = StudyRecord.load(project.root / "study").facts["seeds"]["1"]["ablations"]["width_48"]
    step = width["fits"]["state_space"]["planned_flops"] / width["fits"]["state_space"]["steps"]
    assert abs(width["training_flops"] - plan.mixture_flops) <= step


def test_the_report_is_drawn_from_it(measured):
    out = measured[0].root / "study"
    write_study_report(out, 200)
    text = (out / "report.md").read_text()
    assert "## What else was tried" in text
    assert "Memory of by token: loss by compute" in text
    assert (out / "figures" / "by_token" / "planted.png").is_file()
    assert (out / "figures" / "bare" / "cka_without_adaptors.png").is_file()
    assert (out / "figures" / "bare" / "denoising_loss.png").is_file()


def forget(plan, *more):
    """Delete the experts and mixtures that were made, as on another machine."""
    for kind in (*EXPERTS, "mla_7a", "mla_7b", "mla_7c", *more):
        shutil.rmtree(plan.run.artifacts / kind)


def test_a_record_gets_ablations_later_and_what_is_gone_is_made_again(project):
    plan, found = planned(project, f"study.ablations={{{UNFROZEN}}}")
    out = project.root / "study"
    record_of(plan, out, "7c")
    before = StudyRecord.load(out)
    forget(plan)
    digest = run_ablations(plan, found, out, workers=1)
    after = StudyRecord.load(out)
    assert after.digest() == digest != before.digest()
    assert "are not here, so they are made again" in plan.run.console.file.getvalue()
    assert list(after.facts["seeds"]["1"]["ablations"]) == ["unfrozen", "again_7c"]
    # made again on this very machine it is the very same
    again, own = after.of("again_7c", "ablations", 1), after.of("fused_7c", "val", 1)
    assert again.loss() == pytest.approx(own.loss(), abs=1e-5)
    assert own.loss() == before.of("fused_7c", "val", 1).loss()
    assert abs(after.of("unfrozen", "ablations", 1).loss() - own.loss()) > 1e-5
    assert not (plan.run.artifacts / "mla_7d").exists()
    # once more changes nothing, nor does a machine that has nothing: nothing is missing in the record
    assert run_ablations(plan, found, out, workers=1) == digest
    forget(plan, "study_ablation")
    assert run_ablations(plan, found, out, workers=1) == digest
    assert not (plan.run.artifacts / "transformer").exists()
