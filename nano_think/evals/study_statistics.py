"""Every number of a study's report, computed from its record alone.

Losses are nats a token on test. What the report compares is fixed here, before any test figure: the fused model
and the best expert are chosen by validation loss, the comparisons are listed in COMPARED.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nano_think.evals.losses import DocumentLosses
from nano_think.evals.seeds import (
    Average,
    SeedDifference,
    SeedInterval,
    difference_over_seeds,
    loss_over_seeds,
)
from nano_think.evals.study_record import MODELS, StudyRecord

EXPERTS = ("transformer", "diffuser", "state_space")
UNIFORM = ("uniform_prob", "uniform_hidden")
FUSED = ("fused_7b", "fused_7c", "fused_7d")
# bounds see the labels or know the domain: no model, nothing is claimed against them
BOUNDS = ("oracle_token", "oracle_document", "oracle_domain", "static_per_domain")
# Transformers that the mixture must beat, and what is equal
RIVALS = {
    "equal_parameters": "one Transformer of equal parameters",
    "equal_training_flops": "one Transformer of equal training FLOPs",
    "equal_inference_flops": "one Transformer of equal inference FLOPs a token",
    "seed_pool": "pooled Transformers of different seeds",
}


@dataclass(frozen=True)
class Stage:
    """One step of the mixture, measured as model minus the step before it; only `cause` changed."""

    name: str
    cause: str
    model: str
    before: str


class StudyStatistics:
    """Means over seeds with intervals over documents and seeds; each is computed once.

    Args:
        record: the study.
        n_resamples: resamples of the documents behind each interval.
    """

    def __init__(self, record: StudyRecord, n_resamples: int = 2000) -> None:
        self.record, self.n_resamples = record, n_resamples
        self._cache: dict[tuple[Any, ...], Any] = {}

    def loss(
        self,
        model: str,
        metric: str = "loss",
        *,
        domain: int | None = None,
        average: Average = "micro",
        split: str = "test",
    ) -> SeedInterval | None:
        """`loss` or `bpb` of a model; None where it was never scored, or the domain has no documents."""
        key = ("loss", model, metric, domain, average, split)
        if key not in self._cache:
            losses = self._losses(model, split, self.record.scored_seeds(model, split))
            present = losses and (domain is None or losses[0].documents(domain))
            self._cache[key] = (
                loss_over_seeds(losses, metric, domain=domain, average=average, n_resamples=self.n_resamples)
                if present
                else None
            )
        return self._cache[key]

    def difference(
        self, model: str, baseline: str, *, domain: int | None = None, metric: str = "loss"
    ) -> SeedDifference | None:
        """model - baseline on test over the seeds that have both; None where no seed has."""
        key = ("difference", model, baseline, domain, metric)
        if key not in self._cache:
            seeds = [s for s in self.record.scored_seeds(model) if s in self.record.scored_seeds(baseline)]
            models, baselines = (self._losses(name, "test", seeds) for name in (model, baseline))
            present = models and (domain is None or models[0].documents(domain))
            self._cache[key] = (
                difference_over_seeds(models, baselines, metric, domain=domain, n_resamples=self.n_resamples)
                if present
                else None
            )
        return self._cache[key]

    def validation(self, model: str) -> float:
        """Mean validation loss over seeds, what choices are made by; NaN where it was never scored."""
        key = ("validation", model)
        if key not in self._cache:
            losses = self._losses(model, "val", self.record.scored_seeds(model, "val"))
            self._cache[key] = sum(value.loss() for value in losses) / len(losses) if losses else math.nan
        return self._cache[key]

    def chosen(self, among: Sequence[str]) -> str | None:
        """The model of lowest validation loss; without validation the last that was scored on test."""
        scored = [key for key in among if self.record.scored_seeds(key)]
        measured = [key for key in scored if not math.isnan(self.validation(key))]
        if measured:
            return min(measured, key=self.validation)
        return scored[-1] if scored else None

    @property
    def fused(self) -> str | None:
        """The mixture that the report is about."""
        return self.chosen(FUSED)

    @property
    def best_expert(self) -> str | None:
        """The best single expert."""
        return self.chosen(EXPERTS)

    @property
    def best_uniform(self) -> str | None:
        """The better of the two uniform pools."""
        return self.chosen(UNIFORM)

    def compared(self) -> list[str]:
        """Baselines of the fused model in the order of MODELS: all models but itself and the bounds."""
        return [
            key
            for key in MODELS
            if key not in (self.fused, *BOUNDS) and self.record.scored_seeds(key) and self.fused
        ]

    def stages(self) -> list[Stage]:
        """The steps 7a to 7d, each with its cause."""
        best = self.best_expert or EXPERTS[0]
        more = "extra trainable parameters: table, latent attention, router"
        return [
            Stage("7a", "ensemble: constant weights over frozen experts", "static", best),
            Stage("7b", "routing: weights that follow the text", "fused_7b", "static"),
            Stage("7c", more, "fused_7c", "fused_7b"),
            Stage("7d", "memory: retrieved records", "fused_7d", "fused_7c"),
        ]

    def steps_to(self, fused: str) -> list[Stage]:
        """The stages that lead to the chosen mixture; their gains add up to fused minus best expert."""
        stages = self.stages()
        last = next((i for i, stage in enumerate(stages) if stage.model == fused), -1)
        return stages[: last + 1]

    def _losses(self, model: str, split: str, seeds: Sequence[int]) -> list[DocumentLosses]:
        return [self.record.of(model, split, seed) for seed in seeds]


def word(difference: SeedDifference | None) -> str:
    """The verdict, also of a comparison that could not be made."""
    return "not measured" if difference is None else difference.verdict
