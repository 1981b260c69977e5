"""The gates of one seed of a study, from what was measured on validation text."""

from __future__ import annotations

from dataclasses import asdict
from math import inf, nan
from types import SimpleNamespace
from typing import Any

from nano_think.evals import gates
from nano_think.evals.bootstrap import Difference, paired_difference
from nano_think.evals.report import plain
from nano_think.evals.seeds import difference_over_seeds
from nano_think.evals.study_statistics import FUSED
from nano_think.phases.study_measure import load_losses, losses_maker
from nano_think.phases.study_plan import EXPERTS, Plan

# What a final table has to hold.
REQUIRED = (
    "best_expert",
    "uniform_prob",
    "static",
    "finetuned_transformer",
    "equal_parameters",
    "equal_training_flops",
    "equal_inference_flops",
    "seed_pool",
)


def study_gates(plan: Plan, evidence: dict[str, Any], test_reads: int) -> list[dict[str, Any]]:
    """G1 to G8 as plain values; test text decides none of them but whether the last table is whole."""
    losses = load_losses(plan, losses_maker(plan, "validation"))
    loss = {key: value.loss() for key, value in losses.items()}
    static = plan.result(plan.trained["fused_7a"])
    best = min(EXPERTS, key=lambda name: loss[name])
    curve = {row["steps"]: row["loss"]["estimate"] for row in evidence["denoiser"]["steps_curve"]["curve"]}
    fused_steps = plan.run.cfg.experts.diffuser.fused_steps
    over_best = difference_over_seeds([losses["static"]], [losses[best]])
    routing = evidence["routing"]

    def minus(model: str, baseline: str) -> Difference | None:
        return paired_difference(losses[model], losses[baseline]) if model in losses else None

    found = [
        gates.transformer_gate(loss["transformer"], loss["bigram"]),
        gates.state_space_gate(loss["state_space"], loss["transformer"]),
        gates.diffuser_gate(loss["diffuser"], loss["bigram"], curve, fused_steps),
        gates.usefulness_gate(static["gap"], static["mean_kl"], static["reference"]),
        gates.static_gain_gate(-over_best.estimate, over_best.document_error),
        gates.router_gate(minus("fused_7b", "static"), routing["information"], routing["p_value"]),
        gates.training_gate(minus("fused_7c", "fused_7b"), minus("fused_7c", "finetuned_transformer")),
        gates.memory_gate(_shuffled(evidence), minus("fused_7d", "fused_7c")),
        _final(plan, best, min(FUSED, key=lambda stage: loss.get(stage, inf)), test_reads),
    ]
    return [plain(asdict(gate)) for gate in found]


def _shuffled(evidence: dict[str, Any]) -> Any:
    """Real minus shuffled memory, None without a memory."""
    measured = evidence.get("memory", {}).get("R1", {}).get("differences", {}).get("real - shuffled")
    if not measured:
        return None
    return SimpleNamespace(**{name: nan if value is None else value for name, value in measured.items()})


def _final(plan: Plan, best: str, fused: str, test_reads: int) -> gates.Gate:
    """G8; best, fused: the expert and the stage of the mixture that are best on validation text."""
    losses = load_losses(plan, losses_maker(plan, "test"))
    others = {**losses, "best_expert": losses[best]}
    differences = {name: paired_difference(losses[fused], others[name]) for name in REQUIRED}
    return gates.final_gate(differences, REQUIRED, test_reads)
