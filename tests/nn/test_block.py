from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from nano_think.nn.block import Block, ExpertInput, init_blocks
from nano_think.nn.ffn import SwiGLU
from nano_think.nn.mixers.attention import CausalSelfAttention
from nano_think.ops.layout import Layout

ATTENTION, FFN = partial(CausalSelfAttention, num_heads=2), partial(SwiGLU, ffn_dim=12)


def inputs() -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_both_halves_are_pre_norm_residuals(randomise) -> None:
    block, x, layout = randomise(Block(8, ATTENTION, FFN)), inputs(), Layout.span(0, 5)

    def rms(y: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    middle = x + block.mixer(rms(x, block.mixer_norm.weight), layout)
    expected = middle + block.ffn(rms(middle, block.ffn_norm.weight))
    torch.testing.assert_close(block(x, layout), expected)


@pytest.mark.parametrize("ffn", [FFN, None])
@torch.no_grad()
def test_cached_equals_full(randomise, ffn) -> None:
    block, x = randomise(Block(8, ATTENTION, ffn)), inputs()
    state = block.init_state(2, 5)
    pieces = [block.extend(piece, state) for piece in x.split([2, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), block(x, Layout.span(0, 5)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_without_ffn_only_the_mixer_is_left(randomise) -> None:
    block, x, layout = randomise(Block(8, ATTENTION)), inputs(), Layout.span(0, 5)
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"mixer", "mixer_norm"}
    torch.testing.assert_close(block(x, layout), x + block.mixer(block.mixer_norm(x), layout))


def test_dropout_acts_on_the_branches_in_training_only(randomise) -> None:
    block, x, layout = randomise(Block(8, ATTENTION, FFN, dropout=1.0)), inputs(), Layout.span(0, 5)
    assert torch.equal(block.train()(x, layout), x)
    assert not torch.allclose(block.eval()(x, layout), x)


def test_entry_starts_as_the_gain_free_norm_and_ignores_scale(randomise) -> None:
    entry, x = ExpertInput(8), inputs()
    torch.testing.assert_close(entry(x), x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())
    assert [name for name, _ in entry.named_parameters()] == ["adaptor.weight"]
    randomise(entry)
    torch.testing.assert_close(entry(50 * x), entry(x), atol=1e-4, rtol=0)


def test_an_entry_without_adaptor_is_the_gain_free_norm_whatever_is_trained() -> None:
    entry, x = ExpertInput(8, adaptor=False), inputs()
    assert not list(entry.parameters())
    torch.testing.assert_close(entry(x), x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())
    assert torch.equal(entry.matrix, torch.eye(8))
    assert ExpertInput(8).matrix.requires_grad


def test_init_scales_what_writes_into_the_residual_stream_and_keeps_biases() -> None:
    num_layers = 8
    blocks = nn.ModuleList(Block(128, ATTENTION, FFN) for _ in range(num_layers))
    biased = nn.Linear(128, 128)
    biased.bias.data.fill_(3.0)
    blocks.append(biased)
    torch.manual_seed(0)
    init_blocks(blocks, num_layers)
    for name, module in blocks.named_modules():
        if isinstance(module, nn.Linear):
            std = 0.02 / math.sqrt(2 * num_layers) if name.endswith(("out_proj", "down_proj")) else 0.02
            assert module.weight.std().item() == pytest.approx(std, rel=0.1), name
    assert torch.equal(biased.bias, torch.full((128,), 3.0))
    assert torch.equal(blocks[0].mixer_norm.weight, torch.ones(128))
