"""Packed rows longer than a block of attention against dense masks, and what is differentiated."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from nano_think.experts.diffuser import DiffuserExpert
from nano_think.mla import MultiHeadLatentAttention
from nano_think.ops import attention as attention_module
from nano_think.ops import attention_cpp
from nano_think.ops.layout import Layout

D, LENGTHS, PADS = 32, (150, 1, 120), 17


def _layout():
    """One packed row of documents and pads, and one of a single document."""
    lengths = torch.tensor([*LENGTHS, PADS])
    positions = torch.cat([torch.arange(n) for n in LENGTHS] + [torch.zeros(PADS, dtype=torch.long)])
    segments = torch.repeat_interleave(torch.tensor([0, 1, 2, -1]), lengths)
    whole = torch.arange(len(positions))
    return Layout(torch.stack((positions, whole)), torch.stack((segments, torch.zeros_like(whole))))


@pytest.fixture
def parts(randomise):
    torch.manual_seed(0)
    expert = DiffuserExpert(D, 2, 2, 48, train_T=20, fused_steps=3, grad="all", dropout=0.0)
    parts = {"diffuser": expert, "mla": MultiHeadLatentAttention(D, 2)}
    for seed, part in enumerate(parts.values()):
        randomise(part, seed)
    expert.fit_statistics(torch.randn(50, D))
    return parts


def _run(part, layout, half, seed=1):
    """Output and gradients of the input and of every parameter, frozen or not."""
    x = torch.randn(2, layout.positions.shape[1], D, generator=torch.Generator().manual_seed(seed))
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = part(x, layout)
    out.float().square().sum().backward()
    return [out.detach().float(), x.grad, *(p.grad for p in part.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", ["diffuser", "mla"])
@pytest.mark.parametrize(("half", "tolerance"), [(False, 2e-5), (True, 4e-2)])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_fast_path_of_packed_rows_is_the_dense_mask(name, half, tolerance, frozen, parts, monkeypatch):
    part, calls = parts[name].requires_grad_(not frozen), []
    for where, name_of in ((attention_module, "blocked_attention"), (attention_cpp, "tiled_attention")):
        fast = getattr(where, name_of)
        monkeypatch.setattr(where, name_of, lambda *a, fast=fast: calls.append(1) or fast(*a))
    found = _run(part, _layout(), half)
    assert calls
    part.zero_grad()
    monkeypatch.setattr(Layout, "sight", property(lambda self: (self.mask, None)))
    calls.clear()
    plain = _run(part, _layout(), half)
    assert not calls
    assert len(found) == len(plain) > (2 if frozen else 10) - 1
    for one, two in zip(found, plain, strict=True):
        assert (one - two).abs().max() <= tolerance * two.abs().max()


def test_a_frozen_part_gives_its_input_the_gradient_of_a_trained_one(parts):
    for part in parts.values():
        trained = _run(part, _layout(), False)[:2]
        part.zero_grad()
        frozen = _run(part.requires_grad_(False), _layout(), False)
        assert len(frozen) == 2
        for one, two in zip(frozen, trained, strict=True):
            assert (one - two).abs().max() <= 1e-6 * two.abs().max()


@pytest.mark.parametrize(("grad", "passes"), [("none", 0), ("last", 1), ("all", 4)])
def test_a_graph_is_built_for_as_many_noisy_passes_as_asked_for(grad, passes, randomise):
    torch.manual_seed(0)
    make = partial(DiffuserExpert, D, 2, 2, 48, train_T=20, fused_steps=4, dropout=0.0)
    expert = randomise(make(grad=grad))
    expert.fit_statistics(torch.randn(50, D))
    expert.requires_grad_(False)
    graphs = []
    expert.denoiser.register_forward_hook(lambda m, args, out: graphs.append(out.requires_grad))
    x = torch.randn(1, 8, D, requires_grad=True)
    out = expert(x)
    assert sum(graphs) == passes
    assert out.requires_grad == (grad != "none")
