"""What a study finds out beyond losses, on validation text: who knows what, and what memory is worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nano_think.artifacts.checkpoint import Checkpoint
from nano_think.artifacts.memory import Memory
from nano_think.artifacts.recipe import COMPLETE_MARK
from nano_think.evals.calibration import calibration, model_log_probs
from nano_think.evals.correlation import token_correlation
from nano_think.evals.denoiser import restoration, steps_curve
from nano_think.evals.drafting import block_drafts, excerpts, infilling
from nano_think.evals.lengths import length_curve
from nano_think.evals.losses import Batch
from nano_think.evals.planted import planted_facts
from nano_think.evals.pools import SharedForward, lone_expert
from nano_think.evals.report import plain
from nano_think.evals.retrieval_evidence import equal_compute, retrieval_cost, retrieval_evidence
from nano_think.evals.routing import analyse_routing, document_weights
from nano_think.evals.spaces import shared_spaces
from nano_think.evals.specialisation import specialisation
from nano_think.evals.tokens import collect_tokens, sample_documents, token_classes
from nano_think.files import write_json
from nano_think.model import ExpertLM
from nano_think.phases.run import Maker
from nano_think.phases.study_measure import Measured
from nano_think.phases.study_plan import EXPERTS, SINGLE, Plan
from nano_think.tasks.denoise import denoising_targets
from nano_think.tokenizer import Tokenizer

# Longest context that is tried, in lengths of training; tokens of a prompt, a draft and a gap.
LENGTHS = (1, 2, 4, 8)
PROMPT, BLOCK, SPAN, RIGHT = 48, 8, 8, 16
EXCERPTS = 60
# A sample of long documents alone would hold few of them.
MAX_PER_DOCUMENT = 500
# The questions to a memory, by the numbers they have in the report.
RETRIEVAL = {"R1": "losses", "R2": "precision", "R3": "known_item", "R4": "mass", "R5": "overlap"}


class Evidence:
    """The evidence of one seed; tokens: how many validation tokens the costlier topics read."""

    def __init__(self, measured: Measured, tokens: int) -> None:
        self.measured, self.tokens = measured, tokens
        self.fused = measured.checkpoints["fused_7c"].model
        self.domains = measured.data.domains
        self.tokenizer = measured.checkpoints["transformer"].tokenizer
        self.classes = classes_of(self.tokenizer)
        self.batches = measured.batches("validation", measured.plan.settings["rows"])
        self.sample = sample_of(self.batches, tokens)

    def topics(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """What is looked into, by name, in the order of the report."""
        memory = {"memory": self.memory} if self.measured.memory is not None else {}
        return {
            "specialisation": self.specialisation,
            "routing": self.routing,
            "spaces": self.spaces,
            "denoiser": self.denoiser,
            "lengths": self.lengths,
            "calibration": self.calibration,
            **memory,
        }

    def specialisation(self) -> dict[str, Any]:
        """Who is trusted and who is good, by domain, position and kind of token."""
        table = collect_tokens(SharedForward(self.fused), self.batches, self.classes)
        return plain(specialisation(table, self.domains))

    def routing(self) -> dict[str, Any]:
        """Whether the trust of 7b, where only the router has learned, depends on the domain."""
        shared = SharedForward(self.measured.checkpoints["fused_7b"].model)
        analysis = analyse_routing(document_weights(shared.weights, self.batches, len(self.domains)))
        return plain({
            "information": analysis.information.estimate,
            "interval": analysis.information,
            "p_value": analysis.test.p_value,
        })  # fmt: skip

    def spaces(self) -> dict[str, Any]:
        """Whether the experts speak one language: CKA and linear probes, entry adaptors on and off."""
        fused = self.measured.checkpoints["fused_7c"]
        return spaces_evidence(fused, self.batches, self.domains, self.tokens)

    def denoiser(self) -> dict[str, Any]:
        """Denoising steps, restoration, drafts and gaps."""
        network, teacher = self._alone("diffuser"), self._alone("transformer")
        read = [torch.from_numpy(tokens.astype("int64")) for tokens, _ in self.measured.read_by_experts()]
        counts = torch.bincount(torch.cat(read), minlength=self.tokenizer.vocab_size)

        def drafts() -> dict[str, Any]:
            texts, _ = excerpts(self.batches, PROMPT + BLOCK, EXCERPTS)
            return block_drafts(network, teacher, texts, counts, block=BLOCK)

        def gaps() -> dict[str, Any]:
            texts, _ = excerpts(self.batches, PROMPT + SPAN + RIGHT, EXCERPTS)
            return infilling(network, teacher, texts, counts, span=SPAN, right=RIGHT)

        return plain({
            "steps_curve": steps_evidence(network, teacher, self.batches, self.tokens),
            "restoration": restoration(network, partial(denoising_targets, network, teacher), self.sample),
            "block_drafts": _or_reason(drafts),
            "infilling": _or_reason(gaps),
        })  # fmt: skip

    def lengths(self) -> dict[str, Any]:
        """Loss and cost of each expert behind contexts of up to eight times the training length."""
        data = self.measured.data
        longest = LENGTHS[-1] * data.seq_len
        rows = self.measured.long_batches("validation", longest)
        lengths = [factor * data.seq_len for factor in LENGTHS]
        models = {name: self._alone(name) for name in EXPERTS} | {"fused_7c": self.fused}
        return plain(_or_reason(lambda: length_curve(models, rows, lengths, max_tokens=self.tokens // 4)))

    def calibration(self) -> dict[str, Any]:
        """Expected calibration error of every trained model, and how the experts' errors go together."""
        names = [*EXPERTS, *SINGLE, "fused_7c"]
        models = {name: self.measured.checkpoints[name].model for name in names}
        alone = {name: lone_expert(self._alone(name)) for name in EXPERTS}
        errors = token_correlation(alone, self.sample)
        reliable = {name: calibration(model_log_probs(model), self.sample) for name, model in models.items()}
        return plain({
            "ece": {name: found.error for name, found in reliable.items()},
            "ece_by_chance": {name: found.chance for name, found in reliable.items()},
            "error_correlation": errors,
        })  # fmt: skip

    def memory(self) -> dict[str, Any]:
        """R1 to R5, what retrieval costs, and whether a planted fact is remembered."""
        memory, costs = self.measured.memory, self.measured.plan.costs
        assert memory is not None  # see `topics`
        flops = costs.inference_flops(costs.mixture())
        return memory_evidence(
            self.measured.checkpoints["fused_7d"], memory, self.batches, self.domains, flops
        )

    def _alone(self, name: str) -> Any:
        return self.measured.checkpoints[name].model


def classes_of(tokenizer: Tokenizer) -> Any:
    """The class of every token of a vocabulary, (V,)."""
    return token_classes([tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)])


def sample_of(batches: list[Batch], tokens: int) -> list[Batch]:
    """About so many tokens, of many documents; the same of the same batches."""
    return sample_documents(batches, tokens, max_per_document=MAX_PER_DOCUMENT)


def spaces_evidence(
    checkpoint: Checkpoint, batches: list[Batch], domains: list[str], tokens: int
) -> dict[str, Any]:
    """Whether the experts of a mixture share a space, with adaptors at their entry and without."""
    classes, sample = classes_of(checkpoint.tokenizer), sample_of(batches, tokens)
    return plain(_or_reason(lambda: shared_spaces(checkpoint.model, sample, classes, domains)))


def steps_evidence(network: ExpertLM, teacher: ExpertLM, batches: list[Batch], tokens: int) -> dict[str, Any]:
    """What denoising steps are worth to a diffuser alone, on a tenth of the tokens: a hundred passes take long."""
    return plain(steps_curve(network, teacher, sample_of(batches, tokens // 10)))


def memory_evidence(
    checkpoint: Checkpoint, memory: Memory, batches: list[Batch], domains: list[str], flops: float
) -> dict[str, Any]:
    """R1 to R5, what retrieval costs, and whether a planted fact is remembered; flops: a token without memory."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    found = retrieval_evidence(model, memory, batches, domains, tokenizer.byte_lengths)
    cost = retrieval_cost(model, memory, batches[0], flops)
    planted = planted_facts(model, memory, tokenizer)
    named = {name: found[topic] for name, topic in RETRIEVAL.items()}
    compute = equal_compute(found["losses"], cost)
    return plain({**named, "cost": {**cost, "equal_compute": compute}, "planted": planted})


def _or_reason(find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was found, or why it cannot be asked of this text: its documents may be too short or too few."""
    try:
        return find()
    except ValueError as error:
        return {"reason": str(error)}


def evidence_maker(plan: Plan) -> Maker:
    """What is found out about the mixture of a seed on validation text, a file a topic."""

    def build(path: Path) -> dict[str, Any]:
        evidence = Evidence(Measured(plan), plan.settings["evidence_tokens"])
        for name, find in evidence.topics().items():
            plan.run.say(f"[dim]evidence: {name}[/dim]")
            write_json(path / f"{name}.json", find())
        return {}

    spec = {"tokens": plan.settings["evidence_tokens"], "rows": plan.settings["rows"]}
    needs = {"shards": plan.shards, **plan.trained}
    return Maker("study_evidence", spec, build, needs, plan.run.command(phase="study"))


def load_evidence(plan: Plan) -> dict[str, Any]:
    """What `evidence_maker` made, by topic."""
    folder = evidence_maker(plan).recipe.path(plan.run.artifacts)
    paths = [path for path in sorted(folder.glob("*.json")) if path.name != COMPLETE_MARK]
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
