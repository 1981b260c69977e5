"""Tiny language models of every kind, as their users build them: fresh, with whatever options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
import torch

from nano_think.experts.diffuser import DiffuserExpert
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.mla import MultiHeadLatentAttention
from nano_think.model import ExpertLM, NanoThink
from nano_think.nn.mixers.ssd import SSD

VOCAB, D = 61, 32
EXPERTS = {
    "transformer": partial(TransformerExpert, num_layers=2, num_heads=2, ffn_dim=48),
    "diffuser": partial(DiffuserExpert, num_layers=2, num_heads=2, ffn_dim=48, train_T=20),
    "state_space": partial(StateSpaceExpert, num_layers=2, d_inner=48, d_state=4),
    "ssd": partial(StateSpaceExpert, num_layers=2, mixer=partial(SSD, d_inner=48, d_state=4, head_dim=16)),
}


@pytest.fixture(scope="session")
def lone() -> Callable[..., ExpertLM]:
    """`lone("transformer" | "diffuser" | "state_space" | "ssd", **options)`: one expert and its table."""

    def make(kind: str, vocab_size: int = VOCAB, **options: Any) -> ExpertLM:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return ExpertLM((vocab_size, D), partial(EXPERTS[kind], **options))

    return make


@pytest.fixture(scope="session")
def mixture() -> Callable[..., NanoThink]:
    """`mixture(kinds, memory=False, mla={}, experts={}, **options)`: these experts behind MLA and router."""

    def make(
        kinds: str = "transformer state_space",
        vocab_size: int = VOCAB,
        memory: bool = False,
        mla: Mapping[str, Any] | None = MappingProxyType({}),
        experts: Mapping[str, dict[str, Any]] = MappingProxyType({}),
        **options: Any,
    ) -> NanoThink:
        parts = {
            kind: partial(EXPERTS[kind], **{"num_layers": 1, **experts.get(kind, {})})
            for kind in kinds.split()
        }
        attention = (
            None if mla is None else partial(MultiHeadLatentAttention, num_heads=2, memory=memory, **mla)
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return NanoThink(parts, vocab_size, D, **{"mla": attention, **options})

    return make
