"""What each stage of `phase=mla` gained, from which cause, and whether its gate lets the next stage begin.

Figures are taken when a stage is built and stay in its provenance, so a run that reuses it shows the same. Of a
mixture of one expert (`phase=finetune`) only the gain is taken: the gates ask about mixing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.markup import escape

from nano_think.artifacts.checkpoint import Checkpoint, load_checkpoint
from nano_think.artifacts.memory import Memory
from nano_think.errors import UserError
from nano_think.evals.bootstrap import Difference, paired_difference, permutation_test
from nano_think.evals.gates import (
    Gate,
    memory_gate,
    router_gate,
    static_gain_gate,
    training_gate,
    usefulness_gate,
)
from nano_think.evals.losses import Batch, DocumentLosses, document_losses
from nano_think.evals.memory_modes import MemoryModes
from nano_think.evals.oracles import static_losses
from nano_think.evals.pools import ExpertOutputs, SharedForward
from nano_think.evals.report import plain
from nano_think.evals.routing import DocumentWeights, document_weights
from nano_think.evals.seeds import difference_over_seeds
from nano_think.model import NanoThink
from nano_think.ops.pooling import StaticFit
from nano_think.phases.run import Run
from nano_think.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nano_think.data.module import TokenDataModule

# what a stage adds to the one before, and therefore the cause of what it gains
CAUSES = {
    "7a": "ensemble effect",
    "7b": "routing effect",
    "7c": "extra trainable parameters",
    "7d": "memory effect",
}
# losses by document of a stage's model on the fixed validation pass, beside its weights
LOSSES = "validation.npz"


@dataclass(frozen=True)
class Judge:
    """The model of a stage, the data it is judged on, and the folder that its losses are kept in."""

    model: NanoThink
    data: TokenDataModule
    tokenizer: Tokenizer
    path: Path

    def static(self, sample: ExpertOutputs, fitted: StaticFit, result: dict[str, Any]) -> dict[str, Any]:
        """7a: `gain` over the best expert on the tokens of the fit, and `gates` on what its experts are worth.

        result: what the stage recorded of gaps and divergences.
        """
        self.measure()[0].save(self.path / LOSSES)
        space = "prob" if self.model.fusion == "prob" else "hidden"
        domains = len(self.data.domains)
        pool, alone = static_losses(sample, fitted, space, self.tokenizer.byte_lengths, domains)
        best = min(alone, key=lambda name: alone[name].loss())
        gain = paired_difference(pool, alone[best])
        error = difference_over_seeds([pool], [alone[best]]).document_error
        found = [
            usefulness_gate(result["gap"], result["mean_kl"], result["reference"]),
            static_gain_gate(-gain.estimate, error),
        ]
        return {"gain": _gain("7a", best, gain), "gates": plain(found if len(alone) > 1 else [])}

    def trained(self, stage: str, before: Checkpoint, memory: Memory | None = None) -> dict[str, Any]:
        """7b, 7c, 7d: `gain` over the stage before on validation, and the stage's `gates`.

        before: the stage that this one started from. memory: that of 7d.
        """
        losses, weights = self.measure(memory.slots if memory else None)
        losses.save(self.path / LOSSES)
        difference = paired_difference(losses, self._losses_before(before, losses))
        name = before.provenance["kind"].removeprefix("mla_")
        found = []
        if len(self.model.experts) > 1:
            shuffled = self._shuffled(losses, memory) if memory else None
            found = [_gate_of(stage, difference, weights, shuffled)]
        return {"gain": _gain(stage, name, difference), "gates": plain(found)}

    def _shuffled(self, losses: DocumentLosses, memory: Memory) -> Difference:
        """What the memory returns against the same records handed to other readers."""
        modes, numbers = MemoryModes(memory), count()
        other, _ = self.measure(lambda batch: modes.slots(batch, next(numbers))["shuffled"])
        return paired_difference(losses, other)

    def measure(self, slots: Callable[[Any], Any] | None = None) -> tuple[DocumentLosses, DocumentWeights]:
        """Losses and router weights by document on the fixed validation pass."""
        self.model.eval()
        shared, weights = SharedForward(self.model, slots), list[torch.Tensor]()
        batches = [batch for batch in self.data.val_dataloader() if bool((batch["labels"] >= 0).any())]
        fused, domains = shared.fused(), len(self.data.domains)

        def noting(batch: Batch) -> torch.Tensor:
            weights.append(shared.weights(batch))
            return fused(batch)

        losses = document_losses(noting, batches, self.tokenizer.byte_lengths, domains)
        in_order = iter(weights)
        return losses, document_weights(lambda _: next(in_order), batches, domains)

    def _losses_before(self, before: Checkpoint, losses: DocumentLosses) -> DocumentLosses:
        """Those of the stage before on the same documents; measured where it kept none or others."""
        kept = before.path / LOSSES
        found = DocumentLosses.load(kept) if kept.is_file() else None
        if found is not None and found.pairs_with(losses):
            return found
        # the one at hand has been trained on in the meantime
        model = load_checkpoint(before.path).model
        return Judge(model, self.data, self.tokenizer, self.path).measure()[0]


def _gate_of(
    stage: str, difference: Difference, weights: DocumentWeights, shuffled: Difference | None
) -> Gate:
    if stage == "7b":
        test = permutation_test(weights.sum_weights, weights.num_tokens, weights.domain, weights.num_domains)
        return router_gate(difference, test.observed, test.p_value)
    if stage == "7c":
        # B5 is a run of its own (phase=finetune)
        return training_gate(difference, None)
    return memory_gate(shuffled, difference)


def _gain(stage: str, over: str, difference: Difference) -> dict[str, Any]:
    return plain(
        {
            "cause": CAUSES[stage],
            "over": over,
            "difference": difference.estimate,
            "low": difference.low,
            "high": difference.high,
            "documents": difference.documents,
            "verdict": difference.verdict,
        }
    )


def gain_in_words(gain: dict[str, Any] | None) -> str:
    """A stage's difference with its interval, as a table shows it; a dash where none was taken."""
    if gain is None:
        return "–"
    low, high = (math.nan if gain[end] is None else gain[end] for end in ("low", "high"))
    value = Difference(gain["difference"], low, high, gain["documents"])
    return f"{value:+.4f} over {gain['over']}: {gain['verdict']}"


def pass_gates(run: Run, stage: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Show the gates that a stage's result holds, put them into the manifest, and stop the line where asked to.

    Raises:
        UserError: a gate has failed and gates=stop.
    """
    gates = result.get("gates")
    if gates is None:
        run.say(f"[dim]{stage} was made without its gates: delete its folder to have them[/dim]")
        return []
    run.record(gates={**run.manifest.get("gates", {}), stage: gates})
    colours = {True: "green", False: "yellow", None: "dim"}
    answers = {True: "passed", False: "failed", None: "open"}
    for gate in gates:
        passed = gate["passed"]
        line = escape(
            f"gate {gate['name']} after {stage}: {answers[passed]}. {gate['question']} {gate['reason']}"
        )
        run.say(f"[{colours[passed]}]{line}[/{colours[passed]}]")
    failed = [gate for gate in gates if gate["passed"] is False]
    if failed and run.cfg.gates == "stop":
        told = "; ".join(f"{g['name']}: {g['reason']} ({_figures(g['figures'])})" for g in failed)
        raise UserError(
            f"gates=stop: the line stops after {stage}, for a gate has failed. {told}. What was made so far "
            f"stays in {run.artifacts}; mend what the gate speaks of, or go on with gates=warn"
        )
    if failed:
        run.say(f"[yellow]going on after {stage} all the same (gates=stop would stop here)[/yellow]")
    return [{"stage": stage, **gate} for gate in gates]


def _figures(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_figure(value)}" for name, value in figures.items())


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + _figures(value) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
