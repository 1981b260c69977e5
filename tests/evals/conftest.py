"""A small study whose answers are known: every model differs from the Transformer by a chosen amount."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest

from nano_think.evals.losses import DocumentLosses
from nano_think.evals.study_record import MODELS, StudyLosses, StudyRecord

DOMAINS = ["code", "general"]
# nats a token above or below the Transformer
EFFECTS = {
    "unigram": 2.0,
    "bigram": 1.0,
    "trigram": 0.9,
    "transformer": 0.0,
    "diffuser": 0.3,
    "state_space": 0.1,
    "uniform_prob": -0.02,
    "uniform_hidden": 0.01,
    "static": -0.05,
    "fused_7b": -0.10,
    "fused_7c": -0.18,
    "fused_7d": -0.20,
    "finetuned_transformer": -0.08,
    "equal_parameters": -0.12,
    "equal_training_flops": -0.20,
    "equal_inference_flops": -0.30,
    "seed_pool": -0.13,
    "oracle_token": -0.60,
    "oracle_document": -0.09,
    "oracle_domain": -0.01,
    "static_per_domain": -0.07,
}


def documents(split: str, count: int = 60) -> dict[str, Any]:
    rng = np.random.default_rng(["val", "test"].index(split))
    tokens = rng.integers(50, 200, count)
    return {
        "uid": np.arange(count) * 7 + 3,
        "domain": (np.arange(count) % 3 == 0).astype(np.int64),
        "num_tokens": tokens,
        "num_bytes": tokens * 3 + rng.integers(0, 20, count),
    }


def study_losses(split: str, seed: int, effects: dict[str, float], noise: float) -> StudyLosses:
    columns = documents(split)
    base = 4 + 0.4 * np.random.default_rng(5).normal(size=60) - 0.5 * columns["domain"] + 0.01 * seed
    rng = np.random.default_rng(100 * seed + len(split))
    losses = {
        key: DocumentLosses(
            columns["uid"],
            columns["domain"],
            (base + effect + rng.normal(0, noise, 60)) * columns["num_tokens"],
            columns["num_tokens"],
            columns["num_bytes"],
            len(DOMAINS),
        )
        for key, effect in effects.items()
    }
    return StudyLosses.collect(losses)


def model_facts(index: int, key: str) -> dict[str, Any]:
    return {
        "label": key.replace("_", " "),
        "description": f"what {key} is",
        "parameters": 1_000_000 + 1000 * index,
        "trained_parameters": 1000 * index,
        "training_flops": 1e12 * (index + 1),
        "inference_flops_per_token": 1e6 * (index + 1),
    }


def seed_facts(seed: int, keys: list[str]) -> dict[str, Any]:
    history = [[step, 8.0 - step / 1000 + 0.01 * seed] for step in (100, 200, 300)]
    fit = {"steps": 300, "tokens": 600_000, "epochs": 4.0, "best_step": 300, "val_loss": history[-1][1]}
    fit |= {"planned_flops": 1e12, "planned_tokens": 600_000}
    fits = {
        key: fit
        | {"command": f"train {key} seed={seed}"}
        | {"history": history, "fall_per_epoch": 0.004, "lr": 0.002}
        for key in keys
    }
    return {
        "fits": fits,
        "static": {
            "weights": {"transformer": 0.6, "diffuser": 0.1 * seed, "state_space": 0.3},
            "gap": {"transformer": 0.0, "diffuser": 0.4, "state_space": 0.1},
            "mean_kl": {"transformer": 0.0, "diffuser": 0.3, "state_space": 0.2},
        },
        "gates": [
            {
                "name": "G5",
                "question": "Does the router beat static weights?",
                "passed": True,
                "figures": {"gain": 0.05, "by": {"a": 1}},
                "reason": "0.05 nats",
            },
            {
                "name": "G7",
                "question": "Does memory help?",
                "passed": False,
                "figures": {},
                "reason": "no difference",
            },
        ],
        "audit": {
            "passed": True,
            "mark": "leak audit passed: A1, A10",
            "findings": [
                {"check": name, "title": f"what {name} is about", "verdict": "pass"} for name in ("A1", "A10")
            ],
        },
        "evidence": {
            "calibration": {"ece": dict.fromkeys(keys, 0.01 * seed)},
            "other": {"value": 0.25 * seed, "table": {"a": 1, "b": 2}},
        },
    }


def make_study(
    effects: dict[str, float] | None = None,
    seeds: tuple[int, ...] = (1, 2),
    noise: float = 0.02,
    **facts: Any,
) -> StudyRecord:
    """A record in memory; `effects` change EFFECTS, `facts` replace parts of study.json."""
    effects = {key: effect for key, effect in (EFFECTS | (effects or {})).items() if key in MODELS}
    fitted = ["transformer", "diffuser", "state_space", "fused_7b", "equal_parameters", "seed_pool_1"]
    content: dict[str, Any] = {
        "question": "Is a mixture better than one Transformer?",
        "commands": ["make study DATA=corpus"],
        "settings": {"size": "study", "seeds": list(seeds)},
        "versions": {
            "commit": "0123abc",
            "python": "3.11",
            "packages": {"torch": "2.9"},
            "machine": "two cores",
        },
        "data": {
            "corpus_hash": "c0ffee",
            "tokenizer_hash": "7ea",
            "domains": DOMAINS,
            "train_tokens": 1_000_000,
            "test_tokens": int(documents("test")["num_tokens"].sum()),
            "test_documents": 60,
        },
        "models": {key: model_facts(index, key) for index, key in enumerate(MODELS)},
        "tuning": [
            {"family": "transformer", "rate": 0.001, "tokens": 100_000, "val_loss": 5.0012, "chosen": True},
            {"family": "transformer", "rate": 0.003, "tokens": 100_000, "val_loss": 5.003, "chosen": False},
        ],
        "seeds": {str(seed): seed_facts(seed, fitted) for seed in seeds},
        "tries": [],
        "test_reads": 1,
    }  # fmt: skip
    content |= copy.deepcopy(facts)
    splits = ("val", "test")
    losses = {(split, seed): study_losses(split, seed, effects, noise) for split in splits for seed in seeds}
    return StudyRecord(content, losses)


# of ablations: stage, what it is compared with, nats above or below that
TRIED = {
    "prob": ("7c", None, -0.05),
    "unfreeze_all": ("7c", None, 0.1),
    "more_text": ("7c", None, -0.3),
    "own_text": ("7c", "more_text", 0.05),
    "token_memory": ("7d", None, 0.0),
    "width_96": ("7c", None, 0.2),
}
# of their experts alone: nats above or below those of the study
TRIED_ALONE = {"unfreeze_all/transformer": 0.2, "unfreeze_all/state_space": 0.0, "own_text/diffuser": -0.1}


def tried_facts(name: str, stage: str, against: str | None) -> dict[str, Any]:
    fit = seed_facts(1, [f"fused_{stage}"])["fits"]
    return {
        "what": f"what {name} is",
        "overrides": ["training.mla.unfreeze=all"] if name == "unfreeze_all" else [f"model.x={name}"],
        "stage": stage,
        "against": against,
        "hash": f"{name} hash",
        "command": f"train {name}",
        "fits": fit,
        **model_facts(3, name),
        "measured_with": {"commit": "0123abc", "machine": "two cores"},
    }


def with_ablations(record: StudyRecord, noise: float = 0.01, tried: Any = TRIED) -> StudyRecord:
    """The record with ablations of seed 1, whose differences are those of TRIED up to noise."""
    rng, val, facts = np.random.default_rng(9), record.losses["val", 1], copy.deepcopy(record.facts)
    rows: dict[str, DocumentLosses] = {}

    def row(name: str, base: DocumentLosses, effect: float) -> None:
        nll = base.sum_nll + (effect + rng.normal(0, noise, len(base))) * base.num_tokens
        rows[name] = dataclasses.replace(base, sum_nll=nll)

    ablations = facts["seeds"]["1"]["ablations"] = {}
    for name, (stage, against, effect) in tried.items():
        row(name, rows[against] if against else val.of(f"fused_{stage}", 2), effect)
        ablations[name] = tried_facts(name, stage, against)
        if stage == "7d":
            row(f"{name}/without memory", rows[name], 0.02)
            ablations[name] |= {"flops_without_memory": 3e6, "memory": {"R2": {"precision": 0.25}}}
    for name, effect in TRIED_ALONE.items():
        if name.split("/")[0] in tried:
            row(name, val.of(name.split("/")[1], 2), effect)
    facts["planned_ablations"] = list(tried)
    return StudyRecord(facts, {**record.losses, ("ablations", 1): StudyLosses.collect(rows)})


@pytest.fixture(name="with_ablations", scope="session")
def with_ablations_fixture():
    return with_ablations


@pytest.fixture(name="make_study", scope="session")
def make_study_fixture():
    return make_study
