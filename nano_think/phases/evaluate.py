"""`phase=eval`: what the model is worth on text it never saw, who is trusted where, and one report of it.

Nothing here trains or writes into a store. Tables go to the screen, to report.md and to report.json.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch

from nano_think.artifacts.checkpoint import Checkpoint, load_checkpoint, require_same_tokenizer
from nano_think.artifacts.memory import Memory, mark_of, memory_of
from nano_think.artifacts.recipe import COMPLETE_MARK
from nano_think.data.module import TokenDataModule
from nano_think.errors import UserError
from nano_think.evals.losses import DocumentLosses, NllFunction, evaluate_models
from nano_think.evals.ngram import KneserNey
from nano_think.evals.pools import SharedForward, lone_expert
from nano_think.evals.report import Report, render_table
from nano_think.model import ExpertLM
from nano_think.nn.quantized import Kind, quantize
from nano_think.phases import sections
from nano_think.phases.audit import marked_quantized, require_or_mark
from nano_think.phases.data import data_module, load_corpus, shards_maker
from nano_think.phases.generate import model_of
from nano_think.phases.run import Run
from nano_think.phases.sections_diffuser import diffuser
from nano_think.phases.sections_quantized import FULL, quantization

NGRAMS = {"Kneser-Ney bigram": 2, "Kneser-Ney trigram": 3}


class Evaluation:
    """A checkpoint, the data to judge it on, and everything that is judged beside it.

    alone: each expert as it was pre-trained, by name; pool: the fused model of stage 7a, whose experts are
    untouched; both None or empty where the lineage of the checkpoint is not on this machine.
    quantize: None, or how coarsely all of these are kept; `full` has the checkpoint and each expert, by name, as
    they were saved.
    """

    def __init__(self, run: Run, ckpt: str | None = None) -> None:
        self.run, self.settings = run, run.plain(run.cfg.eval)
        self.quantize: Kind | None = None if run.cfg.quantize == "none" else run.cfg.quantize
        self.full: dict[str, Checkpoint] = {}
        saved = model_of(run, ckpt)
        shards = shards_maker(run)
        run.obtain(shards)
        self.data = data_module(run, shards, self.settings["batch_size"], train_split="expert_train")
        require_same_tokenizer(saved, self.data.tokenizer_hash)
        self.audit = require_or_mark(run, saved)
        self.checkpoint = self._as_asked(saved)
        if self.quantize:
            self.audit = marked_quantized(run, self.audit, self.checkpoint)
        self.domains, self.tokenizer = self.data.domains, self.checkpoint.tokenizer
        self.corpus = load_corpus(run, shards.needs["corpus"]).manifest
        kept = f", weights in {self.quantize}" if self.quantize else ""
        self.report = Report(f"Evaluation of {self.checkpoint.name} on {self.settings['split']}{kept}")
        self.figures = run.dir / "figures"
        self.figures.mkdir(parents=True, exist_ok=True)
        self.memory: Memory | None = memory_of(self.checkpoint)
        self.lineage = dict(_walk(self.checkpoint.provenance))
        self.alone = self._load_experts()
        self.pool = self.load("mla_7a") if self.fused else None

    @property
    def fused(self) -> bool:
        """Whether the model mixes experts."""
        return self.checkpoint.kind == "nano_think"

    def batches(self, split: str | None = None, rows: int | None = None) -> list[dict[str, torch.Tensor]]:
        """The fixed pass over a split, as a list: several models read the very same tensors."""
        rows = rows or self.settings["rows"]
        return list(self.data.dataloader(split or self.settings["split"], rows=rows))

    def results(self) -> dict[str, dict[str, Any]]:
        """What each artefact of the lineage recorded when it was made: history, steps, tokens."""
        found = {}
        for kind, digest in self.lineage.items():
            path = self.run.artifacts / kind / digest
            if (path / COMPLETE_MARK).is_file():
                found[kind] = self.run.result_of(path)
        found[self._own_kind()] = self.checkpoint.provenance.get("result", {})
        return found

    def _own_kind(self) -> str:
        return self.checkpoint.provenance.get("kind", self.checkpoint.name)

    def _load_experts(self) -> dict[str, Checkpoint]:
        if not self.fused:
            return {self.checkpoint.name: self.checkpoint}
        names = list(self.checkpoint.model.experts)
        loaded = {name: self.load(name) for name in names}
        return {name: checkpoint for name, checkpoint in loaded.items() if checkpoint is not None}

    def load(self, kind: str) -> Checkpoint | None:
        """The checkpoint of this kind in the lineage, None where it is not on this machine."""
        if kind == self._own_kind():
            return self.checkpoint
        if kind not in self.lineage:
            return None
        path = self.run.artifacts / kind / self.lineage[kind]
        return self._as_asked(load_checkpoint(path)) if path.is_dir() else None

    def _as_asked(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with its weights kept as coarsely as the run asks; the saved one stays in `full`."""
        self.full.setdefault(checkpoint.name, checkpoint)
        if self.quantize is None:
            return checkpoint
        return dataclasses.replace(checkpoint, model=quantize(copy.deepcopy(checkpoint.model), self.quantize))


def run(run: Run, ckpt: str | None = None) -> dict[str, Any]:
    """Losses with intervals, differences, routing, knock-outs, retrieval, samples; one report."""
    evaluation = Evaluation(run, ckpt)
    run.say(f"evaluating {evaluation.checkpoint.path} on {evaluation.settings['split']}")
    if marked := mark_of(evaluation.checkpoint):
        run.say(f"[bold]{marked}[/bold]")
        evaluation.report.text(f"**{marked}**").json({"mark": marked})
    sections.setting(evaluation)
    losses, weights = _losses(evaluation)
    sections.loss_tables(evaluation, losses)
    quantization(evaluation, losses)
    if evaluation.fused:
        sections.routing(evaluation, weights)
        sections.knock_outs(evaluation, losses)
        sections.retrieval(evaluation)
    diffuser(evaluation)
    sections.training(evaluation)
    sections.samples(evaluation)
    sections.parameters(evaluation)
    for table in evaluation.report.tables:
        if table.title:
            render_table(table, run.console)
    path = evaluation.report.write(run.dir)
    save_losses(losses, run.dir / "losses")
    run.say(f"[bold]report[/bold]: {path}\n[bold]dashboard[/bold]: tensorboard --logdir {run.root}")
    return {"report": str(path), "objective": losses[evaluation.checkpoint.name].loss()}


def _losses(evaluation: Evaluation) -> tuple[dict[str, DocumentLosses], list[torch.Tensor]]:
    """Every model on the same tokens, by name; the checkpoint itself under its own name.

    Of a fused one also its routing weights (B, L, N), a tensor a batch.
    """
    models: dict[str, NllFunction] = {}
    weights: list[torch.Tensor] = []
    own = evaluation.checkpoint
    if evaluation.fused:
        shared = SharedForward(own.model, evaluation.memory.slots if evaluation.memory else None)
        models[own.name] = _noting(shared, weights)
        for name in own.model.expert_names:
            models[f"without {name}"] = shared.without([name])
        if evaluation.memory:
            models["fused, memory off"] = SharedForward(own.model).fused()
    for name, checkpoint in evaluation.alone.items():
        models[name] = lone_expert(checkpoint.model)
    if evaluation.pool is not None:
        pool = SharedForward(evaluation.pool.model)
        count = len(evaluation.pool.model.experts)
        models["uniform average"] = pool.pooled(torch.full((count,), 1.0 / count))
        models["static weights (7a)"] = pool.fused()
    if evaluation.quantize:
        models |= {name + FULL: full_nll(evaluation, name) for name in evaluation.full}
    models |= ngram_models(evaluation)
    lengths, domains = evaluation.tokenizer.byte_lengths, len(evaluation.domains)
    return evaluate_models(models, evaluation.batches(), lengths, domains), weights


def full_nll(evaluation: Evaluation, name: str) -> NllFunction:
    """Per-token losses of the checkpoint or an expert as it was saved."""
    model = evaluation.full[name].model
    if isinstance(model, ExpertLM):
        return lone_expert(model)
    return SharedForward(model, evaluation.memory.slots if evaluation.memory else None).fused()


def _noting(shared: SharedForward, weights: list[torch.Tensor]) -> NllFunction:
    """The losses of the fused model; its routing weights, known by the way, are appended to `weights`."""
    fused = shared.fused()

    def nll(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        weights.append(shared.weights(batch))
        return fused(batch)

    return nll


def ngram_models(evaluation: Evaluation) -> dict[str, NllFunction]:
    """Interpolated Kneser-Ney models fitted on the tokens that the experts saw in training.

    Where experts saw different amounts, the n-grams get the largest: a baseline must not be starved.
    """
    results = evaluation.results()
    read = {name: results.get(name, {}).get("tokens", 0) for name in evaluation.alone}
    most = max(read, key=read.__getitem__, default=None)
    if most is None or not read[most]:
        raise UserError(
            f"{evaluation.checkpoint.path} does not say how much text it was trained on: make it again"
        )
    data = as_trained(evaluation.data, evaluation.alone[most].provenance)
    streams = data.seen(read[most] // data.seq_len)
    seen = sum(len(stream) for stream, _ in streams)
    evaluation.report.json({"ngram_tokens": seen})
    vocab_size = evaluation.data.vocab_size
    return {
        f"{name}": KneserNey.fit(streams, order=order, vocab_size=vocab_size).batch_nll
        for name, order in NGRAMS.items()
    }


def as_trained(data: TokenDataModule, provenance: dict[str, Any]) -> TokenDataModule:
    """The data module with the order of rows that an artefact was trained with: its seed may be another."""
    fit = provenance.get("spec", {}).get("fit")
    if fit is None:
        return data
    data = copy.copy(data)
    data.seed = fit["seed"]
    for name in ("mixing", "temperature", "mode"):
        setattr(data, name, fit["loader"][name])
    data.train_tokens = fit["loader"].get("train_tokens")
    data.train_part = fit["loader"].get("train_part", 0)
    return data


def save_losses(losses: dict[str, DocumentLosses], directory: Path) -> None:
    """Per-document losses of every model, from which each table cell can be computed again."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in losses.items():
        value.save(directory / f"{name.replace(' ', '_').replace(',', '')}.npz")


def _walk(node: dict[str, Any]) -> list[tuple[str, str]]:
    """(kind, hash) of everything a provenance file was made from."""
    pairs = []
    for need in node.get("needs", {}).values():
        pairs.append((need["kind"], need["hash"]))
        pairs += _walk(need)
    return pairs
