"""A small study whose answers are known: every model differs from the Transformer by a chosen amount."""

from __future__ import annotations

import copy
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
        "audit": "leak audit passed",
    }  # fmt: skip
    content |= copy.deepcopy(facts)
    splits = ("val", "test")
    losses = {(split, seed): study_losses(split, seed, effects, noise) for split in splits for seed in seeds}
    return StudyRecord(content, losses)


@pytest.fixture(name="make_study", scope="session")
def make_study_fixture():
    return make_study
