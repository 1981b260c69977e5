"""Which leaky options a model names, from its parts alone."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
from torch import nn

from nano_think.mla import ExpertRouter
from nano_think.nn.leaks import leaks, mark, refusal

POOLS = ["cummean", "token", "ema", "window", "cummean+token", "prefix"]


@pytest.mark.parametrize("pool", POOLS)
def test_causal_models_name_none(fused, pool):
    assert leaks(fused(router=partial(ExpertRouter, pool=pool))) == []


def test_the_router_and_the_denoiser_are_named_once_wherever_they_are(fused, expert_lm):
    network = fused(router=partial(ExpertRouter, pool="sequence"))
    assert leaks(network) == ["router.pool=sequence reads later tokens"]
    lone = expert_lm("diffuser", bidirectional=True)
    assert leaks(lone) == ["experts.diffuser.bidirectional=true reads later tokens"]
    assert leaks(expert_lm("diffuser")) == []
    both = nn.ModuleList([network, lone, expert_lm("diffuser", seed=1, bidirectional=True)])
    assert leaks(both) == leaks(network) + leaks(lone)


def test_what_reads_memory_adds_its_own(fused):
    assert leaks(fused(), SimpleNamespace(leaks=["a", "b"])) == ["a", "b"]
    assert leaks(fused(), SimpleNamespace()) == []


def test_the_option_of_the_same_name_in_a_foreign_module_is_not_meant():
    assert leaks(nn.GRU(4, 4, bidirectional=True)) == []


def test_sentences():
    assert mark([]) == ""
    assert mark(["a reads", "b writes"]) == "NOT CAUSAL: a reads; b writes"
    assert refusal(["a reads"]).startswith("a reads: train without")
