from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Config,
    DeepseekV2RotaryEmbedding,
    apply_rotary_emb,
)
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

from nano_think.ops.rope import apply_rope, apply_rope_reference, rope_angles

LAYOUTS = ["half", "interleaved"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotate_complex(x: Tensor, positions: Tensor, theta: float, layout: str) -> Tensor:
    """Each pair as one complex number, multiplied by exp(i * position * theta^(-2j / dim)), in fp64."""
    dim = x.shape[-1]
    pairs = x.unflatten(-1, (2, dim // 2)).mT if layout == "half" else x.unflatten(-1, (dim // 2, 2))
    frequency = torch.tensor([theta ** (-2 * j / dim) for j in range(dim // 2)], dtype=torch.float64)
    phase = torch.exp(1j * positions.double().unsqueeze(-1) * frequency)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * phase)
    return (turned.mT if layout == "half" else turned).flatten(-2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dim", "theta"), [(2, 10_000.0), (8, 100.0), (64, 10_000.0)])
def test_equals_complex_rotation(layout, dim, theta) -> None:
    positions = torch.tensor([0, 1, 2, 7, 100, 511])
    x = random(2, 3, 6, dim)
    cos, sin = rope_angles(positions, dim, theta)
    expected = rotate_complex(x, positions, theta, layout)
    torch.testing.assert_close(apply_rope(x.float(), cos, sin, layout), expected.float(), atol=2e-4, rtol=0)


Rotate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def compare_with_gradients(layout: str, theirs: Rotate) -> None:
    """fp32, to 1e-6."""
    q, k, *upstream = (random(2, 2, 9, 16, seed=seed).float() for seed in range(4))
    positions = torch.stack((torch.arange(9), torch.arange(20, 29)))
    cos, sin = (angle.unsqueeze(1) for angle in rope_angles(positions, 16, 10_000.0))
    inputs = q.requires_grad_(), k.requires_grad_()
    ours, expected = [apply_rope(x, cos, sin, layout) for x in inputs], theirs(q, k, positions)
    torch.testing.assert_close(ours, list(expected), atol=1e-6, rtol=0)
    grads = [torch.autograd.grad(outputs, inputs, upstream) for outputs in (ours, expected)]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=0)


def test_equals_hugging_face_llama() -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, head_dim=16, max_position_embeddings=64)
    rotary = LlamaRotaryEmbedding(config)
    compare_with_gradients("half", lambda q, k, at: apply_rotary_pos_emb(q, k, *rotary(q, at)))


def test_interleaved_equals_hugging_face_deepseek() -> None:
    rotary = DeepseekV2RotaryEmbedding(DeepseekV2Config(qk_rope_head_dim=16, max_position_embeddings=64))
    compare_with_gradients("interleaved", lambda q, k, at: apply_rotary_emb(q, k, rotary(q, at)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_depend_on_the_distance_alone(layout) -> None:
    q, k = random(1, 16).float(), random(1, 16, seed=1).float()

    def product(i: int, j: int) -> float:
        at = [apply_rope(x, *rope_angles(torch.tensor([p]), 16), layout) for x, p in ((q, i), (k, j))]
        return (at[0] * at[1]).sum().item()

    for shift in (1, 17, 200):
        assert product(9 + shift, 4 + shift) == pytest.approx(product(9, 4), abs=1e-4)
    assert abs(product(9, 4) - product(9, 5)) > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths_stay_and_position_zero_is_untouched(layout) -> None:
    x = random(4, 8).float()
    turned = apply_rope(x, *rope_angles(torch.arange(4), 8), layout)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[0], x[0])


def test_layouts_differ_by_the_permutation_of_coordinates() -> None:
    x, angles = random(5, 8).float(), rope_angles(torch.arange(5), 8)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    half, interleaved = apply_rope(x[:, order], *angles, "half"), apply_rope(x, *angles, "interleaved")
    torch.testing.assert_close(half, interleaved[:, order])
    assert not torch.allclose(apply_rope(x, *angles, "half"), interleaved)


def test_low_precision_is_rotated_in_fp32() -> None:
    x = random(1, 32).bfloat16()
    angles = rope_angles(torch.tensor([4001]), 32)
    assert all(angle.dtype == torch.float32 for angle in angles)
    turned = apply_rope(x, *angles)
    assert turned.dtype == torch.bfloat16
    expected = rotate_complex(x.double(), torch.tensor([4001]), 10_000.0, "half")
    torch.testing.assert_close(turned.double(), expected, atol=2e-2, rtol=0)


def test_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="'half' or 'interleaved', not 'both'"):
        apply_rope(random(1, 4), *rope_angles(torch.zeros(1), 4), "both")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.6e-2)])
def test_equals_the_reference_with_gradients(layout, dtype, tolerance) -> None:
    """Of a transposed view, as heads come; bf16 to one rounding."""
    x = random(2, 9, 3, 8).to(dtype).transpose(1, 2).requires_grad_()
    angles, upstream = rope_angles(torch.arange(9), 8), random(2, 3, 9, 8, seed=1).to(dtype)
    results = []
    for rotate in (apply_rope, apply_rope_reference):
        out = rotate(x, *angles, layout)
        results.append([out, *torch.autograd.grad(out, x, upstream)])
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)
