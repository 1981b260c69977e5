"""What the report says of each model of a study: what it is and what it costs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from nano_think.model import ExpertLM, NanoThink
from nano_think.phases.study_plan import EXPERTS, SINGLE, Plan
from nano_think.tasks.route import set_trainable

DESCRIPTIONS = {
    "unigram": "Frequencies of the tokens that an expert read",
    "bigram": "Interpolated Kneser-Ney model of the text that an expert read",
    "trigram": "The same with two tokens of context",
    "transformer": "The Transformer expert alone",
    "diffuser": "The diffusion expert alone, its denoised hidden state read as a next token",
    "state_space": "The state-space expert alone",
    "uniform_prob": "Mean probability of the three experts",
    "uniform_hidden": "Mean hidden state of the three experts",
    "static": "One constant weight an expert, fitted on text that no expert saw",
    "fused_7b": "Router trained, all else fixed",
    "fused_7c": "Router, table and latent attention trained",
    "fused_7d": "The same with a memory of the experts' text",
    "finetuned_transformer": "The Transformer expert with what 7c trains: table and latent attention",
    "equal_parameters": "One Transformer with as many parameters as the mixture",
    "equal_training_flops": "The Transformer expert's network, trained for the FLOPs of the mixture up to 7c, or "
    "the share of them that is best on validation",
    "equal_inference_flops": "One Transformer with as many FLOPs a token as the mixture without memory",
    "seed_pool": "Mean probability of Transformers of different seeds, which read the experts' text alone",
    "oracle_token": "The best of the three experts at every token, which nobody can know",
    "oracle_document": "The best of the three experts for every document, chosen in hindsight",
    "oracle_domain": "The best of the three experts for every domain, chosen on validation text",
    "static_per_domain": "Constant weights of every domain, fitted on its part of the fusion's text",
}


def model_facts(plan: Plan) -> dict[str, dict[str, Any]]:
    """Of each model key: label, description, parameters, FLOPs of training as planned and of a token.

    Only of models that the plan has; 7d must have been made, for its FLOPs depend on how much its memory holds.
    """
    found = ModelCosts(plan).models()
    none = dict.fromkeys(("parameters", "trained_parameters", "training_flops", "inference_flops_per_token"))
    return {
        key: {"label": key.replace("_", " "), "description": text, **none, **found.get(key, {})}
        for key, text in DESCRIPTIONS.items()
        if key != "fused_7d" or "7d" in plan.stages
    }


class ModelCosts:
    """What the models of a plan cost."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.costs = plan, plan.costs

    def fit_flops(self, key: str) -> float:
        """FLOPs of the planned steps of one artefact (a key of `Plan.trained`), without what it starts from."""
        maker, stage = self.plan.trained[key], key.removeprefix("fused_")
        if key in EXPERTS:
            return self.costs.training(key, maker)
        if stage != key:
            return self.costs.training(stage, maker, **(self._memory(training=True) if stage == "7d" else {}))
        if key == "finetuned_transformer":
            return self.costs.training("7c", maker)
        return self.costs.training("transformer", maker, self._single(key))

    def models(self) -> dict[str, dict[str, Any]]:
        """Parameters, those that its last fit trained, and FLOPs of every model that is trained or pooled."""
        alone = {name: self.costs.lone(name) for name in EXPERTS}
        found = {name: self._facts(alone[name], self.fit_flops(name)) for name in EXPERTS}
        for name in EXPERTS[1:]:
            if not self.plan.trained[name].spec["own_table"]:
                found[name]["trained_parameters"] = int(self.costs.parameters(alone[name].expert))
        found |= {name: self._facts(self._single(name), self.fit_flops(name)) for name in SINGLE}
        found |= self._pools(alone, found) | self.stages()
        tuned = self.costs.mixture(["transformer"])
        spent = found["transformer"]["training_flops"] + self.fit_flops("finetuned_transformer")
        found["finetuned_transformer"] = self._facts(
            tuned, spent, self._trained("finetuned_transformer", tuned)
        )
        return found

    def _pools(
        self, alone: dict[str, ExpertLM], found: dict[str, dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """The pools that nothing is trained for but their members: no router and no latent attention."""
        table = self.costs.parameters(alone["transformer"].embedding)
        shared = 0 if self.plan.run.cfg.expert.embed == "own" else len(EXPERTS) - 1
        probabilities = {
            "parameters": int(sum(found[name]["parameters"] for name in EXPERTS) - shared * table),
            "training_flops": sum(found[name]["training_flops"] for name in EXPERTS),
            "inference_flops_per_token": sum(found[name]["inference_flops_per_token"] for name in EXPERTS),
        }
        # one mean state is read by the head, not each expert's
        heads = 2 * table * (len(EXPERTS) - 1)
        hidden = {"inference_flops_per_token": probabilities["inference_flops_per_token"] - heads}
        hidden = probabilities | hidden
        mixed = hidden if self.plan.in_hidden_space else probabilities
        fitted = {"training_flops": mixed["training_flops"] + self.fit_flops("fused_7a")}
        seeds = {name: self.plan.settings["pool"] * found["transformer"][name] for name in probabilities}
        return {
            "uniform_prob": probabilities,
            "uniform_hidden": hidden,
            "static": mixed | fitted,
            "seed_pool": seeds,
        }

    def stages(self) -> dict[str, dict[str, Any]]:
        """The mixture after 7b to 7d, as far as the plan goes; its FLOPs of training hold those of the experts."""
        spent, found = sum(self.fit_flops(name) for name in (*EXPERTS, "fused_7a")), {}
        for stage in self.plan.stages[1:]:
            mixture, key, seen = self.costs.mixture(), f"fused_{stage}", {}
            spent += self.fit_flops(key)
            if stage == "7d":
                # 7c has read all that the memory holds, to write it
                held = self.plan.result(self.plan.trained[key])["memory"]["tokens"]
                spent, seen = spent + held * self.costs.inference_flops(mixture), self._memory()
            found[key] = self._facts(mixture, spent, self._trained(key, mixture), **seen)
        return found

    def _trained(self, key: str, network: NanoThink) -> list[str]:
        """Names of the parameters that the last stage of a mixture trains."""
        maker = self.plan.trained[key]
        return set_trainable(network, maker.kind.removeprefix("mla_"), maker.spec.get("unfreeze", "none"))

    def _single(self, key: str) -> ExpertLM:
        """The network of a lone Transformer."""
        network = self.plan.trained[key].spec["network"]
        return self.costs.lone("transformer", num_layers=network["num_layers"])

    def _memory(self, training: bool = False) -> dict[str, Any]:
        """What a token of 7d sees of the memory, as fields of `Reach`."""
        maker = self.plan.trained["fused_7d"]
        retrieval = maker.spec["retrieval"]
        return {
            "slots": retrieval["k"],
            "chunk": 1 if retrieval["granularity"] == "token" else retrieval["chunk"],
            "records": self.plan.result(maker)["memory"]["records"],
            "readers": 1 - maker.spec["memory_dropout"] if training else 1.0,
        }

    def _facts(
        self, network: nn.Module, training: float, trained: Collection[str] | None = None, **reach: Any
    ) -> dict[str, Any]:
        """training: FLOPs. trained: names of the trained parameters, None for all."""
        names = dict(network.named_parameters())
        return {
            "parameters": int(self.costs.parameters(network)),
            "trained_parameters": sum(
                names[name].numel() for name in (names if trained is None else trained)
            ),
            "training_flops": training,
            "inference_flops_per_token": self.costs.inference_flops(network, **reach),
        }
