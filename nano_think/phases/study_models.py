"""What the report says of each model of a study: what it is and what it costs."""

from __future__ import annotations

from typing import Any

from nano_think.phases.study_plan import EXPERTS, SINGLE, Plan

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
    "equal_training_flops": "The Transformer expert's network, trained for all FLOPs that the mixture took",
    "equal_inference_flops": "One Transformer with as many FLOPs a token as the mixture",
    "seed_pool": "Mean probability of three Transformers of different seeds",
    "oracle_token": "The best of the three experts at every token, which nobody can know",
    "oracle_document": "The best of the three experts for every document, chosen in hindsight",
    "oracle_domain": "The best of the three experts for every domain, chosen on validation text",
    "static_per_domain": "Constant weights for every domain: what a perfect domain router reaches",
}


def model_facts(plan: Plan) -> dict[str, dict[str, Any]]:
    """Of each model key: label, description, parameters, FLOPs of training and of a token."""
    measured = _measured(plan)
    none = {"parameters": None, "training_flops": None, "inference_flops_per_token": None}
    return {
        key: {"label": key.replace("_", " "), "description": text, **measured.get(key, none)}
        for key, text in DESCRIPTIONS.items()
    }


def _measured(plan: Plan) -> dict[str, dict[str, Any]]:
    costs, trained = plan.costs, plan.trained
    alone = {name: costs.lone(name) for name in EXPERTS}
    of = {
        name: _facts(
            costs.parameters(alone[name]),
            costs.training(name, trained[name]),
            costs.inference_flops(alone[name]),
        )
        for name in EXPERTS
    }
    mixture = costs.mixture()
    spent, parameters = sum(of[name]["training_flops"] for name in EXPERTS), costs.parameters(mixture)
    each = costs.inference_flops(mixture)
    of["uniform_prob"] = of["uniform_hidden"] = _facts(parameters, spent, each)
    for stage in plan.stages:
        spent += costs.training(stage, trained[f"fused_{stage}"])
        of["static" if stage == "7a" else f"fused_{stage}"] = _facts(parameters, spent, each)
    tuned = costs.mixture(["transformer"])
    of["finetuned_transformer"] = _facts(
        costs.parameters(tuned),
        of["transformer"]["training_flops"] + costs.training("7c", trained["finetuned_transformer"]),
        costs.inference_flops(tuned),
    )
    for name in SINGLE:
        own = plan.run_of(name)
        network = costs.lone("transformer", num_layers=own.cfg.experts.transformer.num_layers)
        spent_here = costs.training("transformer", trained[name], network)
        of[name] = _facts(costs.parameters(network), spent_here, costs.inference_flops(network))
    one, pool = of["transformer"], plan.settings["pool"]
    of["seed_pool"] = {key: pool * value for key, value in one.items()}
    return of


def _facts(parameters: float, training_flops: float, inference_flops: float) -> dict[str, Any]:
    return {
        "parameters": int(parameters),
        "training_flops": training_flops,
        "inference_flops_per_token": inference_flops,
    }
