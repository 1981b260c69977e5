"""The plan's leaky variants, reachable by config: each is caught, by the checks that must catch it."""

from __future__ import annotations

import pytest

from nano_think.evals.audit.live import filled_memory
from nano_think.evals.audit.plan import Plan
from nano_think.evals.audit.run import UNTRAINED, audit
from nano_think.mla import ExpertRouter

CHUNK = 16


def with_memory(model, **options):
    memory = filled_memory(model.embedding.weight, CHUNK, **options)
    return audit(model, plan=Plan(model.vocab_size, border=CHUNK), retriever=memory, checks=UNTRAINED)


def failed(found) -> set[str]:
    return {finding.check for finding in found.failures()}


def test_a_sequence_pool_is_the_routers_fault(mixture):
    found = audit(mixture(router=lambda **sizes: ExpertRouter(**sizes, pool="sequence")), checks=UNTRAINED)
    assert {"A1", "A2", "A3", "A4"} <= failed(found)
    assert {found[check].component for check in ("A1", "A2", "A3")} == {"router"}


@pytest.mark.parametrize("steps", [1, 4])
def test_a_bidirectional_denoiser_is_the_diffusers_fault(mixture, steps):
    options = {"diffuser": {"bidirectional": True, "fused_steps": steps}}
    found = audit(mixture("transformer diffuser", experts=options), checks=UNTRAINED)
    assert {"A1", "A2", "A3"} <= failed(found)
    assert all(found[check].component.startswith("experts.diffuser.denoiser") for check in ("A1", "A3"))


def test_a_query_of_the_whole_sequence_is_the_retrievals_fault(mixture):
    found = with_memory(mixture(memory=True), granularity="sequence")
    assert {"A1", "A3", "A4"} <= failed(found)
    assert {finding.component for finding in found.failures()} == {"retrieval"}
    # ids carry no gradient: what A2 cannot see, docs/audit.md says
    assert found["A2"].passed


def test_writing_while_reading_is_the_retrievals_fault(mixture):
    found = with_memory(mixture(memory=True), write_on_read=True)
    assert {"A3", "A5", "A10"} <= failed(found)
    assert found["A10"].component in ("retrieval", "vector_store")


def test_the_default_memory_gives_no_alarm(mixture):
    assert with_memory(mixture(memory=True)).passed
