"""What fits record of their FLOPs, and fits that end where their budget does."""

from __future__ import annotations

import json

import pytest
import torch

from nano_think.artifacts.checkpoint import load_checkpoint
from nano_think.artifacts.memory import load_memory
from nano_think.errors import UserError
from nano_think.evals.flops import filling_flops, training_flops
from nano_think.phases import cost as cost_module
from nano_think.phases.cost import Cost, document_length, gemm_peak
from nano_think.phases.expert import expert_maker
from nano_think.phases.fit import Fit
from nano_think.phases.mla import mla_maker
from nano_think.tasks.route import TRAINABLE, set_trainable

STEPS, TOKENS = 6, 8 * 64
EXPERT = ("phase=expert", "expert=transformer")


def made(project, kind):
    """Result, network and folder of the artefact of a kind that the first run of `project` used."""
    [name] = [name for name, used in project.first.used.items() if used == kind]
    folder = project.root / "artifacts" / kind / name
    return (
        json.loads((folder / "provenance.json").read_text())["result"],
        load_checkpoint(folder).model,
        folder,
    )


@pytest.fixture
def length(built):
    """`length(split)`: of the documents of the rows that fits read."""

    def of(split):
        run = built.new(*EXPERT)
        maker = expert_maker(run, "transformer")
        training = run.plain(run.cfg.training.transformer)
        return document_length(
            Fit(run, maker.needs["shards"], training, "x", split, "training.transformer").data(), split
        )

    return of


def test_document_length_is_that_of_equal_documents_with_as_many_keys():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 0]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, -1, -1]])

    class Rows:
        def dataloader(self, split, rows):
            return [{"positions": positions, "segments": segments}]

    assert document_length(Rows(), "expert_train") == pytest.approx((3 * 3 + 5 * 5) / 8)


@pytest.mark.parametrize("kind", ["transformer", "state_space", "diffuser"])
def test_an_expert_records_its_flops(kind, built, length):
    """Counted again on what was saved; the optimizer takes 13 FLOPs a trained parameter and step."""
    result, network, _ = made(built, kind)
    network.embedding.requires_grad_(kind == "transformer")
    teacher = made(built, "transformer")[1] if kind == "diffuser" else None
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    expected = training_flops(network, length("expert_train"), tokens=TOKENS, teacher=teacher)
    assert result["trained_parameters"] == trained
    assert result["flops_per_token"] == pytest.approx(expected)
    assert result["flops"] == pytest.approx(STEPS * (TOKENS * expected + 13 * trained))


@pytest.mark.parametrize("stage", ["7b", "7c", "7d"])
def test_a_stage_records_its_flops(stage, built, length):
    """7b reads what the experts said once, 7d memory in half of its rows."""
    result, network, folder = made(built, f"mla_{stage}")
    options = {"tokens": TOKENS, "cached": stage == "7b"}
    if stage == "7d":
        records = len(load_memory(folder / "memory").store)
        options |= {"slots": 4, "chunk": 16, "records": records, "readers": 0.5}
    size, network = length("fusion_train"), network.requires_grad_(True)
    network.freeze_experts()
    trained = sum(dict(network.named_parameters())[name].numel() for name in set_trainable(network, stage))
    expected = training_flops(network, size, **options)
    once = filling_flops(network, size, tokens=64) if stage == "7b" else 0.0
    assert result["trained_parameters"] == trained
    assert result["flops_per_token"] == pytest.approx(expected)
    filled = result["flops"] - STEPS * (TOKENS * expected + 13 * trained)
    if stage == "7b":
        assert 0 < filled <= STEPS * TOKENS * once * (1 + 1e-9)
    else:
        assert filled == pytest.approx(0, abs=1e-6 * result["flops"])
        assert TRAINABLE[stage]


def test_the_static_weights_record_theirs(built):
    """The experts once, and head products: three for their losses, and those of Newton's steps."""
    result, network, _ = made(built, "mla_7a")
    experts = filling_flops(network, 1) * result["tokens"]
    losses = 3 * 2 * network.embedding.weight.numel() * result["tokens"]
    assert result["flops"] > experts + losses


def test_a_budget_is_spent_to_the_last_whole_step():
    cost = Cost(10.0, 9.0, 50.0, tokens=4, filling=100.0, unique=10, trained=3)
    assert [cost.total(steps) for steps in (1, 2, 3, 4)] == [490, 980, 1270, 1360]
    for budget, steps in ((489, 0), (490, 1), (979.9, 1), (1270, 3), (1360, 4), (1e6, (1e6 - 1000) // 90)):
        assert cost.steps_within(budget) == steps


def test_a_fit_ends_where_its_budget_does(project, printed):
    plain = project.new(*EXPERT, "trainer.max_steps=2")
    result = plain.result_of(plain.obtain(expert_maker(plain, "transformer"), named=True))
    a_step = result["flops"] / 2
    run = project.new(*EXPERT, f"training.transformer.max_flops={5.5 * a_step}")
    maker = expert_maker(run, "transformer")
    result = run.result_of(run.obtain(maker, named=True))
    assert (result["steps"], result["history"][-1][0]) == (5, 5)
    assert result["flops"] == pytest.approx(5 * a_step)
    assert "FLOPs pay for 5 steps" in printed(run)
    poor = project.new(*EXPERT, f"training.transformer.max_flops={0.9 * a_step}")
    with pytest.raises(UserError, match=r"does not pay for one step, which costs .*lower the batch size"):
        poor.obtain(expert_maker(poor, "transformer"), named=True)


def test_the_cosine_ends_at_the_budget(project, monkeypatch):
    """The schedule is told the number of steps that the budget pays for."""
    seen = []
    monkeypatch.setattr(
        cost_module.FitTask,
        "configure_optimizers",
        _noting(cost_module.FitTask.configure_optimizers, seen),
    )
    run = project.new(*EXPERT, "training.transformer.max_flops=1.0e9")
    result = run.result_of(run.obtain(expert_maker(run, "transformer"), named=True))
    assert seen == [result["steps"]]
    assert result["flops"] <= 1e9 < result["flops"] * (1 + 1 / result["steps"])


def _noting(configure, seen):
    def configure_optimizers(self):
        seen.append(self.trainer.max_steps)
        return configure(self)

    return configure_optimizers


def test_without_a_budget_a_recipe_does_not_speak_of_one(project):
    spec = expert_maker(project.new(*EXPERT), "transformer").spec["fit"]
    assert "max_flops" not in spec
    with_budget = project.new(*EXPERT, "training.transformer.max_flops=1e12")
    assert expert_maker(with_budget, "transformer").spec["fit"] == {**spec, "max_flops": 1e12}
    stage = project.new("phase=mla", "expert=all", "training.mla.stage_7c.max_flops=1e12")
    assert mla_maker(stage, "7c").spec["fit"]["max_flops"] == 1e12
    assert "max_flops" not in mla_maker(stage, "7d").spec["fit"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.transformer.max_flops=0"], "is no budget"),
        (["training.transformer.max_flops=much"], "is no budget"),
        (["training.transformer.max_flops=1e12", "trainer.max_steps=3"], "both say how long"),
    ],
)
def test_a_budget_that_is_none_is_refused(overrides, message, project):
    with pytest.raises(UserError, match=message):
        expert_maker(project.new(*EXPERT, *overrides), "transformer")


def test_the_peak_is_measured_once_and_no_product_is_faster(tmp_path, monkeypatch):
    peak = gemm_peak(torch.device("cpu"), "32-true", "highest", tmp_path)
    assert 1e8 < peak < 1e14
    monkeypatch.setattr(cost_module, "_measured_peak", lambda *_: pytest.fail("measured again"))
    assert gemm_peak(torch.device("cpu"), "32-true", "highest", tmp_path) == peak
    monkeypatch.setattr(cost_module, "_measured_peak", lambda *_: 7.0)
    assert gemm_peak(torch.device("cpu"), "bf16-mixed", "highest", tmp_path) == 7.0
    assert len(list(tmp_path.iterdir())) == 2


def test_a_fit_logs_its_share_of_the_peak(built):
    """In the event files; the manifest keeps what it was measured against."""
    fits = json.loads((built.first.dir / "manifest.json").read_text())["fits"]
    for name in ("transformer", "diffuser", "mla_7c"):
        assert fits[name]["peak_flops"] > 0
        assert fits[name]["flops_per_token"] > 0
