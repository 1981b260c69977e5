"""What a study trains: for each seed every expert, stage and baseline, described before anything is built.

B0 n-grams and B10 oracles need no training; B2 and B3 are pools of the experts. What is left are the fits listed
here. The numbers that make a single Transformer comparable (layers, steps) follow from the settings alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nano_think.errors import UserError
from nano_think.phases.data import shards_maker
from nano_think.phases.expert import expert_maker
from nano_think.phases.mla import mla_maker, model_settings
from nano_think.phases.run import Maker, Run
from nano_think.phases.study_costs import Costs

# Seeds of the pooled Transformers lie far from those of the study.
POOL_SEED = 1000


@dataclass(frozen=True)
class Family:
    """Models that share what tuning chose, and how it is set.

    key: the setting of the learning rate. phase, expert: where that is valid.
    """

    name: str
    key: str
    phase: str
    expert: str | None = None

    def settings(self, chosen: Mapping[str, float]) -> dict[str, float]:
        """Overrides of what was chosen: `rate`, and `dropout` where there is an expert to have one."""
        keys = {"rate": self.key, "dropout": f"experts.{self.expert}.dropout"}
        return {key: chosen[name] for name, key in keys.items() if name in chosen}


FAMILIES = {
    family.name: family
    for family in (
        Family("transformer", "training.transformer.lr", "expert", "transformer"),
        Family("diffuser", "training.diffuser.lr", "expert", "diffuser"),
        Family("state_space", "training.state_space.lr", "expert", "state_space"),
        Family("equal_parameters", "training.transformer.lr", "expert", "transformer"),
        Family("equal_training_flops", "training.transformer.lr", "expert", "transformer"),
        Family("equal_inference_flops", "training.transformer.lr", "expert", "transformer"),
        Family("fused_7c", "training.mla.stage_7c.lr", "mla"),
        Family("finetuned_transformer", "training.mla.stage_7c.lr", "finetune", "transformer"),
    )
}
SINGLE = ("equal_parameters", "equal_training_flops", "equal_inference_flops")
EXPERTS = ("transformer", "diffuser", "state_space")


@dataclass
class Plan:
    """The fits of one seed.

    domains: of the corpus. chosen: `rate`, `dropout` and `horizon` (share of a budget) by family, as tuning found
    them; what is missing is as the settings have it.
    """

    run: Run
    seed: int
    domains: int
    chosen: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if tuple(self.run.cfg.expert.names) != EXPERTS:
            raise UserError("a study compares the three experts: use expert=all")

    @property
    def settings(self) -> dict[str, Any]:
        """The `study` node."""
        return self.run.plain(self.run.cfg.study)

    @property
    def stages(self) -> tuple[str, ...]:
        """7a to 7c, and 7d where there is a memory."""
        return ("7a", "7b", "7c") + (("7d",) if self.run.cfg.model.retrieval.k else ())

    @property
    def in_hidden_space(self) -> bool:
        """Whether the mixture adds hidden states; else it adds probabilities."""
        return model_settings(self.run)["fusion"]["space"] == "hidden"

    @cached_property
    def trained(self) -> dict[str, Maker]:
        """Every artefact of this seed by model key, in an order in which each finds what it needs."""
        makers = {name: self.fit(name) for name in EXPERTS}
        fused = self.run_of("fused_7c")
        makers |= {f"fused_{stage}": mla_maker(fused, stage) for stage in self.stages}
        makers["finetuned_transformer"] = self.fit("finetuned_transformer")
        makers |= {name: self.fit(name) for name in SINGLE}
        for number in range(1, self.settings["pool"]):
            makers[f"seed_pool_{number}"] = self.fit("transformer", seed=POOL_SEED * number + self.seed)
        return makers

    @cached_property
    def shards(self) -> Maker:
        """The text that everything reads."""
        return shards_maker(self.run)

    def fit(self, family: str, *more: str, seed: int | None = None) -> Maker:
        """The artefact of a family; more: overrides beyond the plan's."""
        where = FAMILIES[family]
        run = self.run_of(family, *more, seed=seed)
        return expert_maker(run, str(where.expert)) if where.phase == "expert" else mla_maker(run, "7c")

    def result(self, maker: Maker) -> dict[str, Any]:
        """What the build of an existing artefact recorded about itself."""
        return self.run.result_of(maker.recipe.path(self.run.artifacts))

    def run_of(self, family: str, *more: str, seed: int | None = None) -> Run:
        """The run that `fit` belongs to."""
        where, text = FAMILIES[family], self.settings
        experts, fusion = text["expert_tokens"], text["fusion_tokens"]
        read = {"expert": experts + fusion if family in SINGLE else experts}.get(where.phase, fusion)
        overrides = [
            f"seed={self.seed if seed is None else seed}",
            f"data.train_tokens={read}",
            f"++prereq.expert.data.train_tokens={experts}",
            *(line for name in EXPERTS for line in self._tuned(name)),
            *(f"++{key}={value}" for key, value in self._matching(family).items()),
        ]
        if optimizer := text["optimizer"]:
            overrides += [f"optimizer={optimizer}", f"++prereq.expert.optimizer={optimizer}"]
        if where.phase != "expert":
            # the memory holds what the experts read, and nothing else
            rows = max(1, round(experts / self.domains / self.run.cfg.size.seq_len))
            overrides += [f"model.store.rows={rows}", f"++training.mla.static_tokens={fusion}"]
        return self.run.composed(where.phase, [*overrides, *self._tuned(family), *more], where.expert)

    def _tuned(self, family: str) -> list[str]:
        """The overrides of what tuning chose for a family."""
        chosen = FAMILIES[family].settings(self.chosen.get(family, {}))
        return [f"++{key}={value}" for key, value in chosen.items()]

    @cached_property
    def costs(self) -> Costs:
        """What the models of this study compute."""
        return Costs(self.run)

    @cached_property
    def mixture_flops(self) -> float:
        """FLOPs of everything that training the mixture takes, experts included, over the planned steps."""
        fused = self.run_of("fused_7c")
        stages = {stage: mla_maker(fused, stage) for stage in ("7a", "7b", "7c")}
        makers = {name: stages["7a"].needs[name] for name in EXPERTS} | stages
        return sum(self.costs.training(name, maker) for name, maker in makers.items())

    def _matching(self, family: str) -> dict[str, Any]:
        """The settings that make a single Transformer the mixture's equal in one respect."""
        if family not in SINGLE:
            return {}
        costs = self.costs
        if family == "equal_parameters":
            return {"experts.transformer.num_layers": costs.layers_of(costs.parameters)}
        if family == "equal_inference_flops":
            return {"experts.transformer.num_layers": costs.layers_of(costs.inference_flops)}
        horizon = self.chosen.get(family, {}).get("horizon", 1.0)
        return {"training.transformer.max_steps": costs.steps_of(horizon * self.mixture_flops)}
