"""What the models of a study cost, from their settings alone: parameters, FLOPs of a token and of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from nano_think.artifacts.build import build as build_network
from nano_think.artifacts.outline import outlined
from nano_think.errors import UserError
from nano_think.evals.flops import filling_flops, forward_flops, training_flops
from nano_think.model import ExpertLM, NanoThink
from nano_think.phases.parameters import mixture_spec
from nano_think.phases.run import Maker, Run
from nano_think.tasks.route import TRAINABLE, set_trainable

MAX_LAYERS = 100


class Costs:
    """Networks without numbers and what they compute; the mixture and its experts are those of `run`."""

    def __init__(self, run: Run) -> None:
        self.run, self.seq_len = run, run.cfg.size.seq_len

    def lone(self, expert: str, **changes: Any) -> ExpertLM:
        """An expert with its table; changes: other keywords than the settings'."""
        network = {**self.run.plain(self.run.cfg.experts[expert]), **changes}
        with outlined():
            table = nn.Embedding(self.run.cfg.size.vocab_size, self.run.cfg.size.d_model)
            return ExpertLM(table, build_network(network))

    def mixture(self, experts: list[str] | None = None) -> NanoThink:
        """The fused model of all experts or of some."""
        with outlined():
            return build_network(mixture_spec(self.run, experts or self.run.cfg.expert.names))

    def parameters(self, network: nn.Module) -> float:
        """Unique parameters."""
        return float(sum(parameter.numel() for parameter in network.parameters()))

    def inference_flops(self, network: nn.Module, **reach: Any) -> float:
        """FLOPs a token of a forward pass to all logits, in documents of seq_len tokens.

        reach: fields of `Reach`, what a token sees of a memory.
        """
        return sum(forward_flops(network, self.seq_len, **reach).values())

    def layers_of(self, measure: Callable[[nn.Module], float]) -> int:
        """The number of layers with which one Transformer comes nearest to the mixture in `measure`."""
        wanted, before = measure(self.mixture()), 0.0
        for layers in range(1, MAX_LAYERS):
            now = measure(self.lone("transformer", num_layers=layers))
            if now >= wanted:
                return layers if now - wanted <= wanted - before or layers == 1 else layers - 1
            before = now
        raise UserError(
            f"no Transformer of fewer than {MAX_LAYERS} layers is the mixture's equal: check experts.*"
        )

    def steps_of(self, flops: float) -> int:
        """Optimizer steps of the Transformer expert that take so many FLOPs."""
        training = self.run.plain(self.run.cfg.training.transformer)
        tokens = training["batch_size"] * training["accumulate"] * self.seq_len
        return max(1, round(flops / (training_flops(self.lone("transformer"), self.seq_len) * tokens)))

    def training(self, name: str, maker: Maker, network: ExpertLM | None = None, **reach: Any) -> float:
        """FLOPs of the planned steps of an expert or stage (`7a` to `7d`).

        network: another than the settings'. reach: fields of `Reach`, what a token of 7d sees of the memory.
        """
        if name == "7a":
            return maker.spec["static_tokens"] * self.inference_flops(self.mixture())
        tokens = planned_tokens(maker.spec["fit"])
        if name not in TRAINABLE:
            return tokens * self._expert(name, network or self.lone(name))
        network = self.mixture(maker.spec["experts"])
        set_trainable(network, name, maker.spec.get("unfreeze", "none"))
        if name != "7b":
            return tokens * training_flops(network, self.seq_len, **reach)
        once = maker.spec["fit"]["loader"].get("train_tokens", tokens)
        cached = training_flops(network, self.seq_len, cached=True)
        return tokens * cached + min(once, tokens) * filling_flops(network, self.seq_len)

    def _expert(self, name: str, network: ExpertLM) -> float:
        """FLOPs of a training token of an expert."""
        training = self.run.plain(self.run.cfg.training[name])
        trained = None if training["trains_embedding"] else ("expert.",)
        teacher = None if "mse_weight" not in training else self.lone("transformer")
        return training_flops(network, self.seq_len, trained, teacher=teacher)


def planned_tokens(fit: dict[str, Any]) -> int:
    """Tokens that a fit reads if it is not stopped early, from its spec; its text must be limited.

    Raises UserError for a fit held to a budget of FLOPs.
    """
    if "max_flops" in fit:
        raise UserError(
            "a study plans the FLOPs of every fit itself: leave max_flops of experts and stages null"
        )
    step = fit["batch_size"] * fit["accumulate"] * fit["seq_len"]
    if fit["max_steps"]:
        return fit["max_steps"] * step
    batches = -(-fit["loader"]["train_tokens"] // (fit["batch_size"] * fit["seq_len"]))
    return fit["max_epochs"] * max(1, batches // fit["accumulate"]) * step
