"""What else a study tries on its first seed: the mixture with one thing changed, and the mixture at other widths.

    study.ablations.name:
      {what: one line, overrides: [model.fusion.space=prob], stage: 7c, against: null, evidence: [spaces]}

The overrides are what one would type. They reach the experts too, so an ablation shares with the study whatever
they leave as it is, by hash. A width changes `size.d_model` and with it heads, feed-forward and inner dimensions;
the experts' steps are those with which training takes as many FLOPs as at the study's own width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from nano_think.config import checked_additions
from nano_think.data.shards import Shards
from nano_think.errors import UserError
from nano_think.phases.mla import STAGES, mla_maker
from nano_think.phases.run import Maker, Run
from nano_think.phases.study_costs import Costs, planned_tokens
from nano_think.phases.study_fits import ENTRY
from nano_think.phases.study_plan import EXPERTS, Plan
from nano_think.phases.study_settings import check_reading

# Dimensions that grow with the width, and what feed-forward and inner ones are a multiple of.
HEADS = ("experts.transformer.num_heads", "experts.diffuser.num_heads", "model.mla.num_heads")
WIDE = ("experts.transformer.ffn_dim", "experts.diffuser.ffn_dim", "experts.state_space.d_inner")
MULTIPLE = 8
# The study's own mixture once more: what comes of training it on another day or machine.
AGAIN = "again"


@dataclass(frozen=True)
class Ablation:
    """A mixture that differs from the study's own.

    what: one line for the report. overrides: checked. stage: the one that is measured, `7c` or `7d`. against: the
    ablation that it is compared with; None for the study's own model of that stage. evidence: some of
    `study_settings.EVIDENCE`, what it is asked beside its losses.
    """

    name: str
    what: str
    overrides: tuple[str, ...]
    stage: str = "7c"
    against: str | None = None
    evidence: tuple[str, ...] = ()


class Ablated(Plan):
    """The fits of an ablation: experts and stages up to the one that is measured.

    own: the plan of the study. more: overrides beyond its own.
    """

    def __init__(self, own: Plan, more: tuple[str, ...], stage: str = "7c") -> None:
        super().__init__(own.run, own.seed, own.domains, own.chosen)
        self.more, self.last = more, stage

    @property
    def stages(self) -> tuple[str, ...]:
        """7a to the last one."""
        return STAGES[: STAGES.index(self.last) + 1]

    def run_of(self, family: str, *more: str, seed: int | None = None) -> Run:
        """As the study's, with what the ablation changes."""
        return super().run_of(family, *self.more, *more, seed=seed)

    @cached_property
    def trained(self) -> dict[str, Maker]:
        """The experts and stages of the mixture by model key."""
        fused = self.run_of("fused_7c")
        stages = {f"fused_{stage}": mla_maker(fused, stage) for stage in self.stages}
        return {name: stages["fused_7a"].needs[name] for name in EXPERTS} | stages

    @property
    def model(self) -> Maker:
        """The mixture that is measured."""
        return self.trained[f"fused_{self.last}"]

    @cached_property
    def costs(self) -> Costs:
        """What its models compute."""
        return Costs(self.run_of("fused_7c"))


def planned_names(settings: Mapping[str, Any]) -> list[str]:
    """The names of all ablations that the `study` node asks for."""
    return [*(settings["ablations"] or {}), *(_width_name(width) for width in settings["widths"])]


def ablations(plan: Plan, shards: Shards) -> list[Ablation]:
    """All that the settings ask for: ablations, then widths. What tuning chooses changes nothing in them.

    Raises UserError naming the ablation for a setting that does not exist, for one that no model can have, for one
    that changes nothing, for other text or tokens than the study's, on which nothing could be compared, and for
    experts that would read more text than there is.
    """
    settings = plan.settings
    found = [_ablation(plan, name, asked) for name, asked in (settings["ablations"] or {}).items()]
    found += [_width(plan, width) for width in settings["widths"]]
    for ablation in found:
        with _named(ablation.name):
            _check(plan, shards, ablation)
    return found


def changed_experts(plan: Plan, ablated: Ablated) -> list[str]:
    """The experts that are not the study's own: trained otherwise, or not frozen in 7c."""
    if "unfreeze" in ablated.trained["fused_7c"].spec:
        return list(EXPERTS)
    own = Ablated(plan, (), "7a").trained
    return [name for name in EXPERTS if ablated.trained[name].recipe.hash != own[name].recipe.hash]


def _ablation(plan: Plan, name: str, asked: Mapping[str, Any]) -> Ablation:
    with _named(name):
        overrides = checked_additions(asked["overrides"], plan.run.cfg, ENTRY.parent)
    stage, evidence = asked.get("stage") or "7c", tuple(asked.get("evidence", ()))
    return Ablation(name, asked["what"], tuple(overrides), stage, asked.get("against"), evidence)


def _check(plan: Plan, shards: Shards, ablation: Ablation) -> None:
    """Raise UserError or ValueError for an ablation that cannot be what it says."""
    if ablation.stage not in plan.stages:
        raise UserError("this study has no memory, so there is no 7d to compare it with")
    ablated = Ablated(plan, ablation.overrides, ablation.stage)
    own, model = mla_maker(plan.run_of("fused_7c"), ablation.stage), ablated.model
    if model.needs["shards"].recipe.hash != own.needs["shards"].recipe.hash:
        raise UserError("it reads another corpus or other tokens than the study, so nothing can be compared")
    if model.recipe.hash == own.recipe.hash:
        raise UserError(f"its overrides change nothing that leads to {ablation.stage}")
    ablated.costs.mixture()
    for maker in ablated.trained.values():
        if "fit" in maker.spec:
            check_reading(shards, maker.spec["fit"])
            planned_tokens(maker.spec["fit"])


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors name the ablation that they come of."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"study.ablations.{name}: {str(error).splitlines()[0]}") from error
    except (UserError, ValueError) as error:
        raise UserError(f"study.ablations.{name}: {error}") from error


def _width_name(width: int) -> str:
    return f"width_{width}"


def _width(plan: Plan, width: int) -> Ablation:
    """The mixture with another d_model, trained with the FLOPs of the study's own, where that can be."""
    own = plan.run.cfg.size.d_model
    if width == own:
        raise UserError(f"study.widths: {width} is the width of the study itself")
    shape = [f"size.d_model={width}"]
    for key in HEADS:
        heads = _number(plan, key)
        if width * heads % own:
            raise UserError(
                f"study.widths: heads of {own // heads} dimensions, as the study has them ({key}), do not divide "
                f"{width}; give multiples of {own // heads}"
            )
        shape.append(f"{key}={width * heads // own}")
    shape += [
        f"{key}={max(1, round(_number(plan, key) * width / own / MULTIPLE)) * MULTIPLE}" for key in WIDE
    ]
    steps = _steps(plan, Ablated(plan, tuple(shape)))
    counts = ", ".join(f"{name} {count}" for name, count in steps.items())
    what = f"d_model {width} instead of {own}, as many FLOPs of training: steps of the experts {counts}"
    more = (f"++training.{name}.max_steps={count}" for name, count in steps.items())
    return Ablation(_width_name(width), what, (*shape, *more))


def _steps(plan: Plan, scaled: Ablated) -> dict[str, int]:
    """Steps of each expert with which the mixture up to 7c takes the FLOPs of the study's, to half a step.

    All are scaled by one factor; the last one makes up for what the others are rounded by.
    """
    costs, trained = scaled.costs, scaled.trained
    stages = sum(costs.training(stage, trained[f"fused_{stage}"]) for stage in scaled.stages)
    left, planned, per_step = plan.mixture_flops - stages, {}, {}
    for name in EXPERTS:
        fit = trained[name].spec["fit"]
        planned[name] = planned_tokens(fit) // (fit["batch_size"] * fit["accumulate"] * fit["seq_len"])
        per_step[name] = costs.training(name, trained[name]) / planned[name]
    factor = left / sum(planned[name] * per_step[name] for name in EXPERTS)
    found: dict[str, int] = {}
    for name in EXPERTS[:-1]:
        found[name] = round(factor * planned[name])
        left -= found[name] * per_step[name]
    found[EXPERTS[-1]] = round(left / per_step[EXPERTS[-1]])
    if min(found.values()) < 1:
        width = scaled.costs.run.cfg.size.d_model
        raise UserError(
            f"study.widths: at {width} the stages of the mixture alone take the FLOPs of the study's own: give "
            "smaller widths"
        )
    return found


def _number(plan: Plan, key: str) -> int:
    node: Any = plan.run.cfg
    for part in key.split("."):
        node = node[part]
    return int(node)
