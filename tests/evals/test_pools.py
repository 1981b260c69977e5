"""Every variant of a fused model, from one forward pass a batch, equals a pass of its own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from nano_think.evals.pools import SharedForward
from nano_think.experts.transformer import TransformerExpert
from nano_think.mla import MultiHeadLatentAttention
from nano_think.model import NanoThink
from nano_think.ops.layout import Layout
from nano_think.retrieval import MemorySlots

D, VOCAB, LENGTH = 16, 29, 12
NAMES = ["a", "b", "c"]


@pytest.fixture(params=["hidden", "prob"])
def model(request, randomise) -> NanoThink:
    expert = partial(TransformerExpert, num_layers=1, num_heads=2, ffn_dim=20)
    mla = partial(MultiHeadLatentAttention, num_heads=2, memory=True)
    made = NanoThink(dict.fromkeys(NAMES, expert), VOCAB, D, mla=mla, fusion=request.param)
    return randomise(made).eval()


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Two rows of two documents each, with masked labels and pads."""
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = tokens.roll(-1, dims=1)
    labels[:, [4, 10, 11]] = -100
    positions = torch.tensor([*range(5), *range(6), 0]).expand(2, -1)
    segments = torch.tensor([0] * 5 + [1] * 6 + [-1]).expand(2, -1)
    return {"tokens": tokens, "labels": labels, "positions": positions, "segments": segments}


def slots(some: dict[str, Tensor]) -> MemorySlots:
    values = torch.randn(2, 1, 3, D, generator=torch.Generator().manual_seed(int(some["tokens"].sum())))
    index = torch.where((some["positions"] >= 3) & (some["segments"] >= 0), 0, -1)
    return MemorySlots(values, torch.ones(2, 1, 3, dtype=torch.bool), index)


@pytest.mark.parametrize("memory", [None, slots], ids=["plain", "memory"])
def test_every_variant_equals_a_forward_pass_of_its_own(model, memory):
    shared = SharedForward(model, memory)
    uneven = torch.tensor([0.2, 0.5, 0.3])
    variants = {
        "fused": (shared.fused(), {}),
        "pool": (shared.pooled(uneven), {"weights": uneven}),
        "b": (shared.expert("b"), {"weights": torch.tensor([0.0, 1.0, 0.0])}),
        "without a": (shared.without(["a"]), {"knock_out": ["a"]}),
        "without a, c": (shared.without(["a", "c"]), {"knock_out": ["a", "c"]}),
    }
    results = []
    for seed in (0, 1):
        some = batch(seed)
        layout = Layout(some["positions"], some["segments"])
        for name, (nll, options) in variants.items():
            options = {"memory": memory(some), **options} if memory else options
            with torch.no_grad():
                want = model.token_nll(some["tokens"], some["labels"], layout, **options)
            torch.testing.assert_close(nll(some), want, atol=1e-6, rtol=1e-6, msg=f"{name} of batch {seed}")
            assert (want[some["labels"] == -100] == 0).all()
            results.append(want)
    # the two ways to leave b alone agree, all others differ
    assert len({tuple(want.flatten().tolist()) for want in results}) >= 2 * (len(variants) - 1)


def test_one_forward_pass_a_batch_serves_all(model):
    passes: list[Tensor] = []
    hook = model.mla.register_forward_hook(lambda _, inputs, __: passes.append(inputs[0]))
    shared = SharedForward(model, slots)
    functions = [shared.fused(), shared.expert("a"), shared.without(["b"]), shared.pooled(torch.ones(3) / 3)]
    for count, some in enumerate((batch(0), batch(1), batch(0)), start=1):
        for nll in functions:
            nll(some)
        weights = shared.weights(some)
        assert shared.memory(some).index.shape == some["tokens"].shape
        assert len(passes) == count
    hook.remove()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, LENGTH))
    assert not weights.requires_grad


def test_a_batch_is_told_from_an_equal_one_by_identity(model):
    shared, some = SharedForward(model), batch()
    first = shared.output(some)
    assert shared.output(some) is first
    assert shared.output(dict(some)) is not first
