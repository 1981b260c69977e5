"""What `strategy=plan` says, against closed forms and against what a fit then does."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from nano_think.errors import UserError
from nano_think.optim.groups import adamw
from nano_think.optim.muon import muon
from nano_think.phases.plan import Plan, Planned, Sizes, moments, planned

SIZES = Sizes(parameters=1000, trained=600, moments=1200, outside=100, block=300, fixed=7.0, a_row=5.0)


@pytest.mark.parametrize(
    ("way", "world", "expected"),
    [
        ("ddp", 1, (4000, 2400, 4800)),
        ("ddp", 4, (4000, 2400, 4800)),
        ("zero1", 4, (4000, 2400, 1200)),
        ("zero2", 4, (4000, 600, 1200)),
        ("fsdp2", 4, (1000 + 400 + 1200, 600, 1200)),
        ("fsdp2", 1, (4000, 2400, 4800)),
    ],
)
def test_bytes_of_a_rank_by_hand(way, world, expected):
    held = SIZES.bytes_of(way, world, rows=3)
    assert tuple(held[cause] for cause in ("parameters", "gradients", "optimizer")) == expected
    assert held["activations"] == 7 + 3 * 5


def test_a_batch_is_divided_and_time_is_flops_over_what_is_reached():
    plan = Plan(devices=(1, 2, 3, 4), peak_flops=1e3, mfu=0.5)
    rows = list(plan.rows(Planned("fit", SIZES, rows=8, accumulate=2, steps=10, flops=4e6)))
    assert [(row["devices"], row["way"]) for row in rows] == [
        (1, "none"),
        *((world, way) for world in (2, 4) for way in ("ddp", "zero1", "zero2", "fsdp2")),
    ]  # 8 rows are not divided among 3
    assert [row["seconds_a_step"] for row in rows] == [8e3, *[4e3] * 4, *[2e3] * 4]
    assert [row["activations"] for row in rows] == [47, *[27] * 4, *[17] * 4]
    assert all(
        row["total"] == sum(row[cause] for cause in ("parameters", "gradients", "optimizer", "activations"))
        for row in rows
    )


def test_moments_are_those_that_the_optimizer_then_has():
    network = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 4))
    for make in (adamw, muon):
        optimizer = make(network, lr=1e-3, weight_decay=0.0)
        network(torch.arange(3)).sum().backward()
        optimizer.step()
        state = optimizer.state.values()
        assert moments(optimizer) == sum(v.numel() for entry in state for v in entry.values() if v.ndim)


def test_the_plan_of_a_run_is_what_the_run_then_is(built, project):
    """FLOPs and trained parameters of every fit; nothing is trained or even prepared for it."""
    from nano_think.phases.run import Run

    run = project.new("phase=mla", "expert=all", "trainer.max_steps=6", "++prereq.expert.trainer.max_steps=6")
    fits = {fit.name: fit for fit in planned(run)}
    assert list(fits) == ["transformer", "diffuser", "state_space", "mla_7b", "mla_7c", "mla_7d"]
    assert not run.artifacts.exists()
    for name, fit in fits.items():
        digest = next(digest for digest, kind in built.first.used.items() if kind == name)
        done = Run.result_of(built.root / "artifacts" / name / digest)
        assert fit.steps == done["steps"] == 6
        assert fit.sizes.trained == done["trained_parameters"]
        # documents of the corpus are shorter than a row, and 7d reads a memory beside
        assert fit.flops * 6 == pytest.approx(done["flops"], rel=0.3 if name == "mla_7d" else 0.1), name
    assert fits["transformer"].sizes.parameters == fits["transformer"].sizes.trained
    assert fits["mla_7b"].sizes.a_row < fits["mla_7c"].sizes.a_row


def test_a_single_expert_is_planned_for_finetuning(project):
    fits = [fit.name for fit in planned(project.new("phase=finetune", "expert=transformer"))]
    assert fits == ["transformer", "mla_7c", "mla_7d"]


def test_experts_that_train_too_are_counted(project):
    def trained(*more):
        (fit,) = (f for f in planned(project.new("phase=mla", "expert=all", *more)) if f.name == "mla_7c")
        return fit.sizes.trained

    frozen, adapters, all_ = trained(), *(trained(f"training.mla.unfreeze={u}") for u in ("adapters", "all"))
    assert frozen < adapters < all_


def test_numbers_of_fp64_take_twice_the_room(project):
    def gigabytes(precision):
        (fit,) = planned(project.new("phase=expert", "expert=transformer", f"precision={precision}"))
        return {key: value for key, value in fit.sizes.bytes_of("ddp", 1, 1).items() if key != "activations"}

    single, double = gigabytes("32-true"), gigabytes("64-true")
    assert double == {key: 2 * value for key, value in single.items()}


def test_tables_and_files(project):
    folder = project.phase("phase=expert", "expert=transformer", "strategy=plan", "strategy.devices=[1,2]")
    rows = json.loads((folder / "plan.json").read_text())["transformer"]
    assert [(row["devices"], row["way"]) for row in rows][:2] == [(1, "none"), (2, "ddp")]
    said = (folder / "plan.md").read_text()
    assert "transformer: an unknown number of steps of 8 x 1 rows" in said
    assert "activations, GB" in said
    assert json.loads((folder / "manifest.json").read_text())["status"] == "done"
    assert not (project.root / "artifacts").exists()


@pytest.mark.parametrize(
    "bad", [{"devices": []}, {"devices": [0]}, {"mfu": 1.5}, {"mfu": 0}, {"peak_flops": 0}]
)
def test_values_that_are_none(bad):
    with pytest.raises(UserError, match="strategy"):
        Plan(**bad)


def test_a_phase_that_trains_nothing_has_no_plan(project):
    with pytest.raises(UserError, match="phase=eval trains nothing"):
        project.phase("phase=eval", "strategy=plan")
