"""The gates of a seed from losses that are known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from nano_think.evals.losses import DocumentLosses
from nano_think.phases import study_gates as module
from nano_think.phases.study_gates import REQUIRED, study_gates

# nats a token above the Transformer on validation; on test another expert and another stage are the best ones
VALIDATION = {
    "bigram": 1.0, "transformer": 0.0, "diffuser": 0.3, "state_space": 0.1, "static": -0.1, "uniform_prob": 0.1,
    "fused_7b": -0.2, "fused_7c": -0.3, "fused_7d": -0.4, "finetuned_transformer": -0.2, "seed_pool": -0.2,
    "equal_parameters": -0.2, "equal_training_flops": -0.2, "equal_inference_flops": -0.35,
}  # fmt: skip
TEST = VALIDATION | {"state_space": -0.25, "fused_7d": -0.1}
CURVE = [{"steps": 1, "loss": {"estimate": 4.3}}, {"steps": 10, "loss": {"estimate": 4.35}}]
SHUFFLED = {"estimate": -0.01, "low": None, "high": None, "documents": 1, "verdict": "not distinguishable"}


def losses(excess, documents=40):
    """Document d of every model has the same surprise, the model's own excess and a little noise."""
    rng = np.random.default_rng(0)
    base, tokens = rng.normal(4, 0.3, documents), np.full(documents, 100)
    uid, domain = np.arange(documents), np.arange(documents) % 2
    return {
        name: DocumentLosses(
            uid, domain, (base + value + rng.normal(0, 0.01, documents)) * tokens, tokens, 3 * tokens, 2
        )
        for name, value in excess.items()
    }


@pytest.fixture
def answers(monkeypatch):
    """`answers(without, memory)`: the gates by name, some models missing."""

    def of(without=(), memory=None):
        found = {
            split: losses({name: value for name, value in part.items() if name not in without})
            for split, part in (("validation", VALIDATION), ("test", TEST))
        }
        monkeypatch.setattr(module, "losses_maker", lambda plan, split: split)
        monkeypatch.setattr(module, "load_losses", lambda plan, split: found[split])
        static = {
            "gap": {"transformer": 0.0, "diffuser": 0.3, "state_space": 0.1},
            "mean_kl": {"transformer": 0.0, "diffuser": 0.4, "state_space": 0.2},
            "reference": "transformer",
        }
        cfg = SimpleNamespace(experts=SimpleNamespace(diffuser=SimpleNamespace(fused_steps=1)))
        plan = SimpleNamespace(
            run=SimpleNamespace(cfg=cfg), trained={"fused_7a": None}, result=lambda maker: static
        )
        evidence = {
            "denoiser": {"steps_curve": {"curve": CURVE}},
            "routing": {"information": 0.1, "p_value": 0.005},
            "memory": memory or {},
        }
        return {gate["name"]: gate for gate in study_gates(plan, evidence, 1)}

    return of


def test_gates_of_a_mixture_that_holds(answers):
    found = answers()
    passed = {name: gate["passed"] for name, gate in found.items()}
    assert passed.pop("G7") is None  # no memory was measured
    assert all(passed.values()), passed
    # over the best expert, by the error that the choice of documents makes
    assert found["G4 static gain"]["figures"]["gain"] == pytest.approx(0.1, abs=0.01)
    assert 0 < found["G4 static gain"]["figures"]["standard_error"] < 0.01


def test_what_the_final_table_compares_is_chosen_on_validation(answers):
    verdicts = answers()["G8"]["figures"]["verdicts"]
    assert set(verdicts) == set(REQUIRED)
    # 7d against the Transformer: on test 7c would be better than most of these, and the state space than 7d
    assert verdicts["best_expert"] == "better"
    assert verdicts["finetuned_transformer"] == "worse"


def test_a_study_without_memory_has_its_gates(answers):
    found = answers(without=("fused_7d",))
    assert found["G7"]["passed"] is None
    assert found["G8"]["figures"]["verdicts"]["finetuned_transformer"] == "better"


def test_memory_of_a_single_document_leaves_its_gate_open(answers):
    found = answers(memory={"R1": {"differences": {"real - shuffled": SHUFFLED}}})
    assert found["G7"]["passed"] is None
