"""Whole experts against models of transformers with copied weights: outputs and every gradient.

All in fp32, to 1e-5 for outputs and 1e-4 for gradients. The entry of an expert is no part of the other model, so
it is written out here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, Mamba2Config, Mamba2Model, MambaConfig, MambaModel

from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.nn.mixers.attention import CausalSelfAttention
from nano_think.nn.mixers.ssd import SSD

WIDTH, LAYERS, LENGTH = 16, 3, 20
ADAPTOR = "entry.adaptor.weight"
Randomise = Callable[..., nn.Module]
# what the layers of both state-space models have besides the names of their own
SCANS = {"A_log": "A_log", "D": "D", "in_proj.weight": "in_proj.weight", "out_proj.weight": "out_proj.weight"}
SCANS |= {"conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias"}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, str]:
    """Names of the parameters of every layer, ours to theirs."""
    return {
        f"{ours.format(i)}.{own}": f"{theirs.format(i)}.{other}"
        for i in range(LAYERS)
        for own, other in names.items()
    }


def compare(expert: nn.Module, model: nn.Module, names: Mapping[str, str]) -> None:
    """Copy the weights of `expert` into `model` by `names`, then compare what both say and learn."""
    ours, theirs = dict(expert.named_parameters()), dict(model.named_parameters())
    unread = {name for name in theirs if "embed" in name}
    assert (set(names), set(names.values())) == (set(ours) - {ADAPTOR}, set(theirs) - unread)
    with torch.no_grad():
        for own, other in names.items():
            theirs[other].copy_(ours[own].view_as(theirs[other]))
    x, upstream = noise(2, LENGTH, WIDTH).requires_grad_(), noise(2, LENGTH, WIDTH, seed=1)
    out = expert(x)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    hidden = model(inputs_embeds=normed @ ours[ADAPTOR].T, use_cache=False).last_hidden_state
    torch.testing.assert_close(out, hidden, atol=1e-5, rtol=1e-5)
    inputs = {"x": x, ADAPTOR: ours[ADAPTOR]}
    own = {**inputs, **{name: ours[name] for name in names}}
    other = {**inputs, **{name: theirs[names[name]] for name in names}}
    grads = torch.autograd.grad(out, list(own.values()), upstream)
    wanted = torch.autograd.grad(hidden, list(other.values()), upstream)
    for name, got, want in zip(own, grads, wanted, strict=True):
        assert bool(got.any()), name
        torch.testing.assert_close(
            got, want.view_as(got), atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_transformer_equals_llama_with_gradients(randomise: Randomise, num_kv_heads: int) -> None:
    mixer = partial(CausalSelfAttention, num_heads=4, num_kv_heads=num_kv_heads)
    expert = randomise(TransformerExpert(WIDTH, LAYERS, 4, ffn_dim=24, mixer=mixer)).eval()
    config = LlamaConfig(
        vocab_size=3,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        rms_norm_eps=1e-6,
    )
    parts = {
        "mixer_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
    }
    parts |= {f"mixer.{name}.weight": f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")}
    parts |= {"mixer.out_proj.weight": "self_attn.o_proj.weight"}
    parts |= {f"ffn.{name}.weight": f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    names = {"norm.weight": "norm.weight", **layers("blocks.{}", "layers.{}", parts)}
    compare(expert, LlamaModel(config).eval(), names)


def test_state_space_equals_mamba_with_gradients(randomise: Randomise) -> None:
    expert = randomise(StateSpaceExpert(WIDTH, LAYERS, d_inner=32, dropout=0.0)).eval()
    config = MambaConfig(
        vocab_size=3,
        hidden_size=WIDTH,
        state_size=16,
        num_hidden_layers=LAYERS,
        conv_kernel=4,
        expand=2,
        time_step_rank=1,
        layer_norm_epsilon=1e-6,
    )
    scan = SCANS | {"x_proj.weight": "x_proj.weight"}
    scan |= {"dt_weight": "dt_proj.weight", "dt_bias": "dt_proj.bias"}
    parts = {"mixer_norm.weight": "norm.weight", **{f"mixer.{a}": f"mixer.{b}" for a, b in scan.items()}}
    names = {"norm.weight": "norm_f.weight", **layers("blocks.{}", "layers.{}", parts)}
    compare(expert, MambaModel(config).eval(), names)


def test_state_space_with_ssd_equals_mamba2_with_gradients(randomise: Randomise) -> None:
    mixer = partial(SSD, d_state=6, head_dim=8)
    expert = randomise(StateSpaceExpert(WIDTH, LAYERS, dropout=0.0, mixer=mixer)).eval()
    config = Mamba2Config(
        vocab_size=3,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_heads=4,
        head_dim=8,
        state_size=6,
        n_groups=1,
        conv_kernel=4,
        expand=2,
        chunk_size=8,
        layer_norm_epsilon=1e-6,
    )
    scan = SCANS | {"dt_bias": "dt_bias", "norm.weight": "norm.weight"}
    parts = {"mixer_norm.weight": "norm.weight", **{f"mixer.{a}": f"mixer.{b}" for a, b in scan.items()}}
    names = {"norm.weight": "norm_f.weight", **layers("blocks.{}", "layers.{}", parts)}
    compare(expert, Mamba2Model(config).eval(), names)
