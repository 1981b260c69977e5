"""What a study measures of one seed: the loss of every model on every document, of validation or of test."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nano_think.artifacts.checkpoint import Checkpoint, load_checkpoint
from nano_think.artifacts.memory import memory_of
from nano_think.artifacts.recipe import COMPLETE_MARK
from nano_think.data.module import TokenDataModule
from nano_think.data.seen import Stream
from nano_think.evals.losses import Batch, DocumentLosses, NllFunction, evaluate_models
from nano_think.evals.ngram import KneserNey
from nano_think.evals.oracles import (
    best_per_document,
    choose_per_domain,
    expert_per_domain,
    static_per_domain,
)
from nano_think.evals.pools import SharedForward, expert_outputs, lone_expert
from nano_think.ops.pooling import Space
from nano_think.phases.data import data_module
from nano_think.phases.evaluate import as_trained
from nano_think.phases.run import Maker
from nano_think.phases.study_plan import EXPERTS, SINGLE, Plan

BATCH_ROWS = 16
NGRAMS = {"unigram": 1, "bigram": 2, "trigram": 3}


def losses_maker(plan: Plan, split: str) -> Maker:
    """The losses of all models of a seed on a split. To make it is to read the split once.

    What is chosen by losses, the best expert of a domain, is chosen on validation text.
    """
    needs = {"shards": plan.shards, **plan.trained}
    if split != "validation":
        needs["validation"] = losses_maker(plan, "validation")
    spec = {"split": split, "rows": plan.settings["rows"]}

    def build(path: Path) -> dict[str, Any]:
        losses = Measured(plan).losses(split)
        alone = {name: losses[name] for name in EXPERTS}
        judged = alone
        if split != "validation":
            known = load_losses(plan, needs["validation"])
            judged = {name: known[name] for name in EXPERTS}
        losses["oracle_document"] = best_per_document(alone)
        losses["oracle_domain"] = expert_per_domain(alone, choose_per_domain(judged))
        for key, value in losses.items():
            value.save(path / f"{key}.npz")
        return {"split": split, "seed": plan.seed, "models": list(losses)}

    return Maker("study_losses", spec, build, needs, plan.run.command(phase="study"))


def test_reads(plan: Plan) -> int:
    """How often the test split was measured with this seed below this root, whatever the settings."""
    marks = (plan.run.artifacts / "study_losses").glob(f"*/{COMPLETE_MARK}")
    results = [plan.run.result_of(mark.parent) for mark in marks]
    return sum((result["split"], result["seed"]) == ("test", plan.seed) for result in results)


def load_losses(plan: Plan, maker: Maker) -> dict[str, DocumentLosses]:
    """What `losses_maker` made, by model key."""
    folder = maker.recipe.path(plan.run.artifacts)
    names = plan.result(maker)["models"]
    return {name: DocumentLosses.load(folder / f"{name}.npz") for name in names}


class Measured:
    """The trained models of a seed, loaded, and the text to judge them on."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.run = plan, plan.run
        self.checkpoints = {name: self._load(maker) for name, maker in plan.trained.items()}
        self.data: TokenDataModule = data_module(self.run, plan.shards, BATCH_ROWS, "expert_train")
        self.memory = memory_of(self.checkpoints["fused_7d"]) if "7d" in plan.stages else None

    def _load(self, maker: Maker) -> Checkpoint:
        return load_checkpoint(maker.recipe.path(self.run.artifacts), maker.command)

    def batches(self, split: str, rows: int | None = None) -> list[Batch]:
        """The fixed pass over a split as a list, so that all models read the very same tensors."""
        return list(self.data.dataloader(split, rows=rows))

    def long_batches(self, split: str, seq_len: int) -> list[Batch]:
        """The same text in rows of another length."""
        data = copy.copy(self.data)
        data.seq_len = seq_len
        return list(data.dataloader(split, batch_size=1))

    def losses(self, split: str) -> dict[str, DocumentLosses]:
        """Every model of the study by its key, on the same tokens."""
        lengths = self.checkpoints["transformer"].tokenizer.byte_lengths
        batches = self.batches(split, self.plan.settings["rows"])
        return evaluate_models(self.models(), batches, lengths, len(self.data.domains))

    def models(self) -> dict[str, NllFunction]:
        """Per-token losses of every model; the experts alone are those of 7a, which has them as they are."""
        pool = SharedForward(self.checkpoints["fused_7a"].model)
        experts: dict[str, NllFunction] = {name: pool.expert(name) for name in EXPERTS}
        others = [
            lone_expert(checkpoint.model)
            for name, checkpoint in self.checkpoints.items()
            if name.startswith("seed_pool_")
        ]
        models: dict[str, NllFunction] = {**self.ngrams(), **experts}
        models["uniform_prob"] = mean_probability(list(experts.values()))
        if self.plan.in_hidden_space:
            models["uniform_hidden"] = pool.pooled(torch.full((len(EXPERTS),), 1.0 / len(EXPERTS)))
        models["static"] = pool.fused()
        models["static_per_domain"] = pool.pooled_by_domain(self.domain_weights())
        models["oracle_token"] = pool.best_expert()
        for stage in self.plan.stages[1:]:
            slots = self.memory.slots if stage == "7d" and self.memory else None
            models[f"fused_{stage}"] = SharedForward(self._model(f"fused_{stage}"), slots).fused()
        models["finetuned_transformer"] = SharedForward(self._model("finetuned_transformer")).fused()
        models |= {name: lone_expert(self._model(name)) for name in SINGLE}
        models["seed_pool"] = mean_probability([experts["transformer"], *others])
        return models

    def domain_weights(self) -> Tensor:
        """Constant weights (D, N) of each domain, fitted on its part of the text that 7a was fitted on."""
        tokens = self.plan.settings["fusion_tokens"]
        rows = -(-tokens // (self.data.seq_len * len(self.data.domains)))
        batches = self.data.dataloader("fusion_train", rows=rows)
        outputs = expert_outputs(self._model("fused_7a"), batches, tokens)
        space: Space = "hidden" if self.plan.in_hidden_space else "prob"
        return static_per_domain(outputs, len(self.data.domains), space)

    def ngrams(self) -> Mapping[str, NllFunction]:
        """Kneser-Ney models of the text that an expert read."""
        streams = self.read_by_experts()
        return {
            name: KneserNey.fit(streams, order=order, vocab_size=self.data.vocab_size).batch_nll
            for name, order in NGRAMS.items()
        }

    def read_by_experts(self) -> list[Stream]:
        """(tokens, document starts) a domain of the text that the Transformer expert read, each row once."""
        checkpoint = self.checkpoints["transformer"]
        rows = checkpoint.provenance["result"]["tokens"] // self.data.seq_len
        return as_trained(self.data, checkpoint.provenance).seen(rows)

    def _model(self, name: str) -> Any:
        return self.checkpoints[name].model


def mean_probability(models: list[NllFunction]) -> NllFunction:
    """-log of the mean probability of several models: whatever their heads, the losses are enough for it."""

    def nll(batch: Batch) -> Tensor:
        losses = torch.stack([model(batch) for model in models])
        return math.log(len(models)) - (-losses).logsumexp(dim=0)

    return nll
