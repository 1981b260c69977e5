from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

from nano_think.nn.ffn import SwiGLU


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
