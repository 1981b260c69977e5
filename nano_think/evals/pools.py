"""Many models from one forward pass: the experts, every pool of them, and every knock-out share their outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nano_think.evals.losses import NllFunction
from nano_think.model import ExpertLM, LMOutput, NanoThink
from nano_think.ops.cross_entropy import IGNORED
from nano_think.ops.layout import Layout

Batch = dict[str, Tensor]


class SharedForward:
    """A fused model whose last batch's output is kept, so that all variants of it cost one pass.

    slots: the memory of a batch, None for a model that runs without.
    """

    def __init__(self, model: NanoThink, slots: Callable[[Mapping[str, Tensor]], Any] | None = None) -> None:
        self.model, self.slots = model, slots
        self._batch: Batch | None = None
        self._output: LMOutput | None = None
        self._memory: Any = None
        self._expert_nll: Tensor | None = None

    @torch.no_grad()
    def output(self, batch: Batch) -> LMOutput:
        """The forward pass of `batch`, computed once while it is the current one."""
        if batch is not self._batch or self._output is None:
            layout = Layout(batch["positions"], batch["segments"])
            self._memory = self.slots(batch) if self.slots else None
            self._output = self.model(batch["tokens"], layout, self._memory, with_logits=False)
            self._batch, self._expert_nll = batch, None
        return self._output

    def memory(self, batch: Batch) -> Any:
        """The slots that the pass over `batch` used."""
        self.output(batch)
        return self._memory

    def weights(self, batch: Batch) -> Tensor:
        """The router's weights (B, L, N)."""
        return self.output(batch).weights

    @torch.no_grad()
    def expert_nll(self, batch: Batch) -> Tensor:
        """Nats a token by every expert alone (B, L, N), 0 where the label is masked; computed once a batch."""
        output = self.output(batch)
        if self._expert_nll is None:
            self._expert_nll = self.model.expert_nll(output.expert_hidden, batch["labels"])
        return self._expert_nll

    def fused(self) -> NllFunction:
        """The model as it is."""
        return lambda batch: self._nll(batch, self.output(batch).weights)

    def pooled(self, weights: Tensor) -> NllFunction:
        """The same experts under constant weights (N,)."""
        return lambda batch: self._nll(
            batch, weights.to(self.output(batch).weights).expand_as(self.weights(batch))
        )

    def pooled_by_domain(self, weights: Tensor) -> NllFunction:
        """The same experts under the constant weights (D, N) of each row's domain."""
        return lambda batch: self._nll(
            batch,
            weights.to(self.weights(batch))[batch["domain"]].unsqueeze(1).expand_as(self.weights(batch)),
        )

    def expert(self, name: str) -> NllFunction:
        """One expert alone."""
        index = self.model.expert_names.index(name)
        return lambda batch: self.expert_nll(batch)[..., index]

    def best_expert(self) -> NllFunction:
        """Whichever expert is best at each token: a bound that needs the label and that nothing reaches."""
        return lambda batch: self.expert_nll(batch).amin(-1)

    def without(self, names: Collection[str]) -> NllFunction:
        """The router's weights with some experts left out and the others scaled up to sum to 1."""
        kept = torch.tensor([float(name not in names) for name in self.model.expert_names])

        def nll(batch: Batch) -> Tensor:
            routed = self.weights(batch)
            weights = routed * kept.to(routed)
            return self._nll(batch, weights / weights.sum(-1, keepdim=True).clamp_min(1e-12))

        return nll

    @torch.no_grad()
    def _nll(self, batch: Batch, weights: Tensor) -> Tensor:
        output = self.output(batch)
        if self.model.fusion == "prob":
            return self.model.pooled_nll(weights, self.expert_nll(batch), batch["labels"])
        hidden = self.model.mix(output.expert_hidden, weights)
        return self.model.nll(replace(output, weights=weights, hidden=hidden), batch["labels"])


def lone_expert(model: ExpertLM) -> NllFunction:
    """Per-token losses of a stand-alone expert."""

    @torch.no_grad()
    def nll(batch: Batch) -> Tensor:
        layout = Layout(batch["positions"], batch["segments"])
        return model.token_nll(batch["tokens"], batch["labels"], layout)

    return nll


@dataclass(frozen=True)
class ExpertOutputs:
    """What each expert hands to the head for a sample of T scored tokens, to fit pools on.

    hidden: (T, d) by expert, scaled by its gain. heads: the tables (V, d) that read them, one for all or one an
    expert. labels, domain, doc_uid: (T,).
    """

    hidden: dict[str, Tensor]
    heads: Tensor | list[Tensor]
    labels: Tensor
    domain: Tensor
    doc_uid: Tensor

    def only(self, chosen: Tensor) -> ExpertOutputs:
        """The tokens that `chosen` (T,) picks, by index or bool."""
        hidden = {name: values[chosen] for name, values in self.hidden.items()}
        return ExpertOutputs(
            hidden, self.heads, self.labels[chosen], self.domain[chosen], self.doc_uid[chosen]
        )


@torch.no_grad()
def expert_outputs(
    model: NanoThink, batches: Iterable[Batch], num_tokens: int | None = None
) -> ExpertOutputs:
    """The experts' outputs for the scored tokens of the batches, or the first `num_tokens` of them."""
    hidden: dict[str, list[Tensor]] = {name: [] for name in model.experts}
    ids: dict[str, list[Tensor]] = {"labels": [], "domain": [], "doc_uid": []}
    for batch in batches:
        valid = batch["labels"] != IGNORED
        _, outputs = model.expert_outputs(batch["tokens"], Layout(batch["positions"], batch["segments"]))
        for name, gain in zip(model.experts, model.expert_gain, strict=True):
            hidden[name].append(gain * outputs[name][valid])
        ids["labels"].append(batch["labels"][valid])
        ids["doc_uid"].append(batch["doc_uid"][valid])
        ids["domain"].append(batch["domain"].unsqueeze(1).expand_as(valid)[valid])
    table = model.embedding.weight
    heads = [model.tables[name].weight if name in model.tables else table for name in hidden]
    return ExpertOutputs(
        {name: torch.cat(parts)[:num_tokens] for name, parts in hidden.items()},
        heads if len(model.tables) else table,
        **{name: torch.cat(parts)[:num_tokens] for name, parts in ids.items()},
    )
