from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

from nano_think.nn.ffn import SwiGLU, gated_silu


def test_equals_the_formula(randomise) -> None:
    ffn = randomise(SwiGLU(6, 10)).double()
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gate, up = x @ ffn.gate_proj.weight.T, x @ ffn.up_proj.weight.T
    expected = (gate / (1 + (-gate).exp()) * up) @ ffn.down_proj.weight.T
    torch.testing.assert_close(ffn(x), expected)


def test_equals_hugging_face_llama_with_gradients(randomise) -> None:
    """fp64, to 1e-12."""
    ours = randomise(SwiGLU(6, 10)).double()
    theirs = LlamaMLP(LlamaConfig(hidden_size=6, intermediate_size=10, num_attention_heads=1)).double()
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(2, 2, 3, 6, generator=generator, dtype=torch.float64)
    grads = []
    for ffn in (ours, theirs):
        own = x.clone().requires_grad_()
        out = ffn(own)
        out.backward(upstream)
        grads.append(
            [out, own.grad, *(getattr(ffn, f"{name}_proj").weight.grad for name in ("gate", "up", "down"))]
        )
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-12)


def test_three_matrices_without_bias() -> None:
    shapes = {name: tuple(p.shape) for name, p in SwiGLU(384, 1536).named_parameters()}
    assert shapes == {
        "gate_proj.weight": (1536, 384),
        "up_proj.weight": (1536, 384),
        "down_proj.weight": (384, 1536),
    }


def test_positions_do_not_mix(randomise) -> None:
    ffn = randomise(SwiGLU(6, 10))
    x = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ffn(x)[:, 2:3], ffn(x[:, 2:3]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_gate_equals_the_formula_with_gradients(dtype, tolerance) -> None:
    """fp32 to 1e-6, bf16 to 1 %, of the norm of each result; the reference computes in fp64."""
    generator = torch.Generator().manual_seed(0)
    gate, up, upstream = (3 * torch.randn(3, 4, 5, 6, generator=generator)).to(dtype)
    leaves = gate.requires_grad_(), up.requires_grad_()
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, expected = gated_silu(*leaves), F.silu(wide[0]) * wide[1]
    found = [out, *torch.autograd.grad(out, leaves, upstream)]
    wanted = [expected, *torch.autograd.grad(expected, wide, upstream.double())]
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= tolerance * other.norm()
