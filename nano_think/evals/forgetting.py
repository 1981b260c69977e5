"""What an expert has forgotten: its loss on its own before and after the mixture trained it."""

from __future__ import annotations

from collections.abc import Sequence

from nano_think.evals.losses import Batch
from nano_think.evals.pools import lone_expert
from nano_think.model import ExpertLM, NanoThink


def forgetting(before: NanoThink, after: NanoThink, batches: Sequence[Batch]) -> dict[str, dict[str, float]]:
    """Nats a token of each expert alone, {name: {before, after}}, both with the table it was pre-trained with.

    An expert that stayed frozen has the same bits, and therefore the same loss.
    """
    alone = {"before": stand_alone(before, before), "after": stand_alone(before, after)}
    return {
        name: {when: _loss(experts[name], batches) for when, experts in alone.items()}
        for name in before.experts
    }


def stand_alone(before: NanoThink, after: NanoThink) -> dict[str, ExpertLM]:
    """The experts of `after`, each alone with the table that it was pre-trained with, which `before` still has."""
    return {
        name: ExpertLM(before.tables[name] if name in before.tables else before.embedding, expert)
        for name, expert in after.experts.items()
    }


def _loss(network: ExpertLM, batches: Sequence[Batch]) -> float:
    total, tokens, losses = 0.0, 0, lone_expert(network.eval())
    for batch in batches:
        nll, scored = losses(batch), batch["labels"] >= 0
        total, tokens = total + float(nll[scored].double().sum()), tokens + int(scored.sum())
    return total / tokens
