"""Routing: the fused model over frozen experts (phase 7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nano_think.metrics.routing import RoutingStats, entropy
from nano_think.model import LMOutput, NanoThink
from nano_think.nn.leaks import leaks, refusal
from nano_think.ops.seeding import mixed_seed
from nano_think.optim.anchor import AnchoredDecay
from nano_think.tasks.base import Batch, FitTask, OptimizerFactory, ScheduleFactory
from nano_think.tasks.expert_cache import ExpertCache

# What each stage trains, as prefixes of parameter names. Experts are in none of them.
TRAINABLE = {
    "7b": ("router.", "expert_gain"),
    "7c": ("router.", "expert_gain", "embedding.", "mla."),
    "7d": ("router.", "expert_gain", "embedding.", "mla."),
}
MEMORY_PART = ".slots."
# What 7c trains of the experts beside that, as parts of parameter names; `all` is the ablation of freezing.
UNFROZEN = {"none": (), "adapters": (".entry.",), "all": ("",)}

SlotSource = Callable[[Batch], Any]


class RouteTask(FitTask):
    """Cross-entropy of the fused output, plus optional entropy terms of the routing weights.

    network: a `NanoThink`. stage: 7b (router), 7c (and table, MLA), 7d (and memory).
    anchor: pull of the table back to its value at the start (L2-SP), the only decay it has.
    entropy_token: weight of mean_t H(w_t); positive sharpens every token's choice.
    entropy_mean: weight of -H(mean_t w_t); positive spreads the average use of experts.
    slots: memory of a batch (7d); memory_dropout: share of training rows that go without it.
    cache: of what this network's experts say of a row (7b), for batches that name their rows.
    unfreeze: what 7c also trains of the experts, `none`, their entry `adapters` or `all`; without dropout.
    Raises ValueError for a network or a memory that reads later tokens, and for a cache in another stage than 7b.
    """

    def __init__(
        self,
        network: NanoThink,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory,
        domains: Sequence[str],
        byte_lengths: Tensor,
        stage: str = "7c",
        anchor: float = 1e-3,
        entropy_token: float = 0.0,
        entropy_mean: float = 0.0,
        slots: SlotSource | None = None,
        memory_dropout: float = 0.5,
        seed: int = 0,
        cache: ExpertCache | None = None,
        unfreeze: str = "none",
    ) -> None:
        super().__init__(network, optimizer, schedule, domains, byte_lengths)
        if cache is not None and stage != "7b":
            raise ValueError(f"stage {stage} trains what the experts read: their outputs cannot be kept")
        # of slots that are a method of a memory, the memory knows what they are made with
        if found := leaks(network, getattr(slots, "__self__", None)):
            raise ValueError(refusal(found))
        self.stage, self.anchor, self.slots = stage, anchor, slots
        self.entropy_token, self.entropy_mean = entropy_token, entropy_mean
        self.memory_dropout, self.seed, self.cache = memory_dropout, seed, cache
        # (N,) of the last training batch, for those who watch
        self.mean_weights: Tensor | None = None
        self.val_routing = RoutingStats(list(network.experts), self.domains)
        network.freeze_experts()
        set_trainable(network, stage, unfreeze)
        # Taken now: a resumed run loads later weights afterwards, and must still pull to this start. In a
        # tuple, so that it is no part of the module's state.
        self._reference = (network.embedding.weight.detach().clone(),)

    def batch_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over valid labels: cross-entropy, the entropies that were asked for, and the loss."""
        nll, weights = self._forward("train", batch, self._slots(batch, self.memory_dropout))
        valid = batch["labels"] != -100
        sums = {"cross_entropy": nll.sum(), "loss": nll.sum() + self._reader()}
        # picking out the valid ones would wait for their number, and on a GPU for the step so far
        count, pads = valid.sum().clamp_min(1), ~valid.unsqueeze(-1)
        mean = weights.masked_fill(pads, 0.0).sum((0, 1)) / count
        self.mean_weights = mean.detach()
        if self.entropy_token:
            sums["entropy_token"] = entropy(weights.masked_fill(pads, 1.0)).sum()  # that of a weight 1 is 0
            sums["loss"] = sums["loss"] + self.entropy_token * sums["entropy_token"]
        if self.entropy_mean:
            sums["entropy_mean"] = entropy(mean) * count
            sums["loss"] = sums["loss"] - self.entropy_mean * sums["entropy_mean"]
        return sums

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect losses and routing statistics; memory is always on where there is one."""
        nll, weights = self._forward("validation", batch, self._slots(batch, 0.0))
        self.validate_tokens(nll, batch)
        self.val_routing.update(weights, batch["domain"], batch["positions"], batch["labels"] != -100)

    def on_validation_epoch_end(self) -> None:
        """Log the language-model metrics and the routing statistics, weight against position among them."""
        super().on_validation_epoch_end()
        self.log_dict({name: value.float() for name, value in self.val_routing.compute().items()})
        curve = self.val_routing.position_curve()
        for (first, _), means in zip(self.val_routing.position_bins(), curve, strict=True):
            if not means.isnan().any():
                named = zip(self.val_routing.experts, means.float(), strict=True)
                self.log_dict({f"routing/position/{first}/{name}": mean for name, mean in named})
        self.val_routing.reset()

    @property
    def kept_bytes(self) -> int:
        """Of expert outputs in memory."""
        return self.cache.bytes if self.cache and self.cache.folder is None else 0

    @property
    def flops_options(self) -> dict[str, Any]:
        """What is kept, and the memory that a part of the rows reads."""
        memory = getattr(getattr(self.slots, "__self__", None), "flops_options", {})
        return {"cached": self.cache is not None, "readers": 1 - self.memory_dropout, **memory}

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Without expert outputs of before, and none for later."""
        kept, self.cache = self.cache, None
        try:
            yield
        finally:
            self.cache = kept

    def configure_optimizers(self) -> object:
        """The base class's, with the table anchored to where it starts."""
        configured = super().configure_optimizers()
        table = self.network.embedding.weight
        if table.requires_grad and self.anchor:
            AnchoredDecay(table, self._reference[0], self.anchor).attach(configured["optimizer"])
        return configured

    def _forward(self, split: str, batch: Batch, memory: Any) -> tuple[Tensor, Tensor]:
        network, layout, labels = self.network, self.layout(batch), batch["labels"]
        if self.cache is None:
            output = network(batch["tokens"], layout, memory, with_logits=False)
            return network.nll(output, labels), output.weights
        kept = self.cache(split, batch)
        weights = network.router(kept.context, layout)
        if kept.nll is not None:
            return network.pooled_nll(weights, kept.nll, labels), weights
        hidden = network.mix(kept.expert_hidden, weights)
        return network.nll(LMOutput(None, weights, hidden, kept.context, kept.expert_hidden), labels), weights

    def _reader(self) -> Tensor | float:
        """0, as a function of all that reads memory.

        The rows of a batch may all go without memory, those of one process more often. A parameter would then have
        no gradient there, and processes that divide gradients would wait for different ones.
        """
        reader = None if self.slots is None else self.network.mla.attention.slots
        return 0.0 if reader is None else sum(0.0 * parameter.sum() for parameter in reader.parameters())

    def _slots(self, batch: Batch, dropout: float) -> Any:
        if self.slots is None:
            return None
        memory = self.slots(batch)
        if memory is None or not dropout:
            return memory
        seed = mixed_seed(self.seed, self.place[1])
        generator = torch.Generator().manual_seed(seed)
        keep = self.drawn(lambda rows: torch.rand(rows, generator=generator), batch) >= dropout
        return memory.dropped(keep.to(batch["tokens"].device))


def set_trainable(model: NanoThink, stage: str, unfreeze: str = "none") -> list[str]:
    """Let exactly the declared set of `stage` receive gradients; returns the names.

    unfreeze: what 7c also trains of the experts, a key of `UNFROZEN`.

    Where memory is read apart (mla.slot_reader=own), 7d trains what reads it and nothing else: without memory the
    model stays that of 7c. Where probabilities are mixed, 7b leaves the experts' gains as they are: what an expert
    says of a label is then fixed, and the router learns from one number an expert and token.
    Raises ValueError for a stage without training (7a is a convex fit), for an unknown `unfreeze` and for adapters
    that no expert has.
    """
    if stage not in TRAINABLE:
        raise ValueError(f"stage {stage} trains nothing; choose from {', '.join(TRAINABLE)}")
    if unfreeze not in UNFROZEN:
        raise ValueError(f"unfreeze={unfreeze} is unknown; choose from {', '.join(UNFROZEN)}")
    parts = UNFROZEN[unfreeze] if stage == "7c" else ()
    names, prefixes = [], TRAINABLE[stage]
    if stage == "7d" and getattr(getattr(model.mla, "attention", None), "reads_apart", False):
        prefixes = ("mla.attention.slots.",)
    if stage == "7b" and model.fusion == "prob":
        prefixes = ("router.",)
    for name, parameter in model.named_parameters():
        trained = name.startswith(prefixes) and (stage == "7d" or MEMORY_PART not in name)
        trained |= name.startswith("experts.") and any(part in name for part in parts)
        parameter.requires_grad_(trained)
        if trained:
            names.append(name)
    if parts and not any(name.startswith("experts.") for name in names):
        raise ValueError(f"unfreeze={unfreeze} trains nothing here: no expert has an entry adaptor")
    return names
