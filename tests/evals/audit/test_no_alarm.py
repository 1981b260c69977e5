"""Healthy models of many kinds: none of them may alarm the audit, none may be called a test of nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from nano_think.evals.audit.live import filled_memory
from nano_think.evals.audit.plan import Plan
from nano_think.evals.audit.run import audit
from nano_think.mla import ExpertRouter
from nano_think.model import ExpertLM, NanoThink
from nano_think.nn.mixers.attention import CausalSelfAttention
from nano_think.nn.mixers.s6 import S6
from nano_think.nn.mixers.ssd import SSD
from nano_think.ops.blocked_attention import BLOCK

PLAN = Plan(vocab_size=61, length=29, border=8)
CHECKS = ("A1", "A2", "A3", "A4", "A5", "A6", "A9", "A10")


def heads(**options: Any) -> dict[str, Any]:
    return {"mixer": partial(CausalSelfAttention, num_heads=4, **options)}


LONE: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": ("transformer", {}),
    "grouped keys and values": ("transformer", heads(num_kv_heads=2)),
    "one key for all heads, interleaved rotation": (
        "transformer",
        heads(num_kv_heads=1, rope_layout="interleaved"),
    ),
    "transformer with state-space mixers": ("transformer", {"mixer": partial(S6, d_inner=48, d_state=4)}),
    "diffuser": ("diffuser", {}),
    "diffuser, four steps": ("diffuser", {"fused_steps": 4}),
    "diffuser, x0, self-conditioned": ("diffuser", {"param": "x0", "fused_steps": 3, "self_cond": True}),
    "diffuser, v, linear schedule": (
        "diffuser",
        {"param": "v", "fused_steps": 2, "schedule": "linear", "train_T": 40},
    ),
    "diffuser, eps, no noise": ("diffuser", {"param": "eps", "x_T": "zeros", "schedule": "sqrt"}),
    "diffuser, next embedding": ("diffuser", {"target": "next_embed", "grad": "all"}),
    "state space": ("state_space", {}),
    "state space, one state, no gate, recurrence": (
        "state_space",
        {"mixer": partial(S6, d_inner=48, d_state=1, d_conv=2, gate=False, backend="ref")},
    ),
    "state space, torch backend": (
        "state_space",
        {"mixer": partial(S6, d_inner=48, d_state=4, backend="torch")},
    ),
    "state-space duality": ("ssd", {}),
    "state-space duality, one head": (
        "ssd",
        {"mixer": partial(SSD, d_inner=48, d_state=8, head_dim=48, d_conv=2)},
    ),
}


def routed(pool: str, **options: Any) -> dict[str, Any]:
    return {"router": partial(ExpertRouter, pool=pool, **options)}


ALL = "transformer diffuser state_space"
PRIVATE = torch.randn(61, 32, generator=torch.Generator().manual_seed(0))
MIXED: dict[str, dict[str, Any]] = {
    "all experts": {"kinds": ALL},
    "all experts and memory, four steps": {
        "kinds": ALL,
        "memory": True,
        "experts": {"diffuser": {"fused_steps": 4}},
    },
    "no expert with an adaptor": {
        "kinds": ALL,
        "experts": {kind: {"adaptor": False} for kind in ALL.split()},
    },
    "a single expert behind a router": {"kinds": "transformer"},
    "no shared context": {"mla": None},
    "router: token": routed("token", tau=2.0),
    "router: ema": routed("ema", decay=0.7),
    "router: window": routed("window", span=5),
    "router: prefix": routed("prefix", span=6),
    "router: mean and token, floored": routed("cummean+token", floor=0.1),
    "router: pools memory": {"memory": True, **routed("cummean", pool_includes_memory=True)},
    "full keys and values, memory, normed": {"mla": {"kv": "full", "post_norm": "rms"}, "memory": True},
    "bottleneck, interleaved, memory": {
        "mla": {"kv": "seed_bottleneck", "rope_layout": "interleaved", "post_norm": "layer"},
        "memory": True,
    },
    "linear pool": {"fusion": "prob", "memory": True},
    "logit fusion, raw input": {"fusion": "logit", "expert_input": "raw"},
    "private tables": {
        "fusion": "prob",
        "expert_input": "raw",
        "tables": {"transformer": nn.Embedding.from_pretrained(PRIVATE)},
    },
}


@pytest.mark.parametrize("name", LONE)
def test_an_expert_alone(name, lone):
    kind, options = LONE[name]
    found = audit(lone(kind, **options), plan=PLAN, checks=CHECKS)
    assert found.passed, str(found)


@pytest.mark.parametrize("name", ["transformer", "grouped keys and values"])
def test_an_expert_whose_attention_goes_by_blocks(name, lone):
    kind, options = LONE[name]
    plan = Plan(vocab_size=61, length=BLOCK + 23, border=BLOCK // 3)
    found = audit(lone(kind, **options), plan=plan, checks=CHECKS)
    assert found.passed, str(found)


@pytest.mark.parametrize("name", MIXED)
def test_a_mixture(name, mixture):
    found = audit(mixture(**MIXED[name]), plan=PLAN, checks=CHECKS)
    assert found.passed, str(found)


@pytest.mark.parametrize("granularity", ["token", "chunk"])
def test_a_memory_that_is_asked_at_every_token_or_chunk(granularity, mixture):
    model = mixture("transformer", memory=True)
    memory = filled_memory(model.embedding.weight, chunk=8, granularity=granularity, documents=20)
    found = audit(model, plan=PLAN, retriever=memory, checks=CHECKS)
    assert found.passed, str(found)


def test_a_trained_recurrence_that_makes_much_of_a_last_digit(lone):
    model = lone("state_space", num_layers=6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "A_log" not in name:
                parameter.mul_(5)  # more than any training does
    found = audit(model, plan=PLAN, checks=CHECKS)
    assert found.setting["tolerance"] > PLAN.tolerance
    assert found.passed, str(found)


def test_two_models_learn_nothing_from_noise_or_from_their_own_text(lone, mixture):
    def small(vocab_size: int) -> ExpertLM:
        return lone("transformer", vocab_size, num_layers=1)

    def reader(vocab_size: int) -> NanoThink:
        return mixture("transformer", vocab_size, memory=True)

    found = audit(small(61), twin=small, checks=("A7", "A8"))
    assert found.passed, str(found)
    found = audit(reader(61), twin=reader, checks=("A7", "A8"))
    assert {finding.verdict for finding in found.findings} == {"pass"}
    assert "without" in found["A8"].note
