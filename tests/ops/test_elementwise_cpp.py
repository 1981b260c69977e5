"""The compiled elementwise kernels against the formulas, values and gradients, and without a compiler.

Tolerances: fp32 2e-6 of the largest value (1e-5 for sums over rows), bf16 one rounding, 2^-8, of it.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nano_think.nn.ffn import gated_silu, gated_silu_reference
from nano_think.nn.norm import RMSNorm, rms_norm_reference
from nano_think.ops import elementwise_cpp
from nano_think.ops.blocked_attention import blocked_attention
from nano_think.ops.cross_entropy import linear_cross_entropy
from nano_think.ops.rope import apply_rope, apply_rope_reference, rope_angles

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
DTYPES = list(TOLERANCE)
# around the widths of vectors
WIDTHS = (1, 3, 15, 16, 17, 129, 4099)

pytestmark = pytest.mark.skipif(elementwise_cpp.load_library() is None, reason="no C++ compiler")


def draw(*shape, dtype=torch.float32, scale=1.0, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_near(got, want, dtype, factor=1.0):
    want = want.double()
    bound = TOLERANCE[dtype] * factor * max(1e-30, float(want.abs().max()))
    assert got.isfinite().all()
    assert float((got.double() - want).abs().max()) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_losses_and_logit_gradients(width, dtype):
    z = draw(5, width, dtype=dtype, scale=4.0)
    labels = torch.tensor([0, width - 1, width // 2, 0, width // 3])
    wide = z.double()
    p = wide.softmax(-1) - F.one_hot(labels, width)
    losses = elementwise_cpp.softmax_minus_one_hot(z, labels)
    assert_near(losses, F.cross_entropy(wide, labels, reduction="none"), torch.float32, 2)
    assert_near(z, p, dtype, 2)


def test_logits_of_any_size():
    """Far apart, far from zero, and with tokens ruled out."""
    z = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -3e4, -3e4], [5.0, -math.inf, 4.0]])
    labels = torch.tensor([1, 2, 0])
    want = F.cross_entropy(z, labels, reduction="none")
    torch.testing.assert_close(elementwise_cpp.softmax_minus_one_hot(z, labels), want)
    torch.testing.assert_close(z[0], torch.tensor([1.0, -1.0, 0.0]))
    nan = torch.tensor([[1.0, math.nan]])
    assert elementwise_cpp.softmax_minus_one_hot(nan, torch.tensor([0])).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "keys", "columns"), [(3, 3, 3), (4, 21, 4), (5, 40, 33), (128, 512, 128)]
)
def test_softmax_of_scores_and_its_gradient(queries, keys, columns, dtype):
    scores = draw(2, 3 * queries, keys, dtype=dtype, scale=8.0)
    hidden = torch.ones(queries, columns).triu(1 + columns - queries).bool()
    bias = torch.zeros(queries, columns, dtype=dtype).masked_fill(hidden, -math.inf)
    wide = scores.double().requires_grad_()
    shown = wide * 0.125
    per_head = F.pad(bias.double(), (keys - columns, 0)).repeat(3, 1)
    want = (shown + per_head).softmax(-1)
    p = elementwise_cpp.softmax_of_scores(scores.clone(), bias, 0.125)
    assert_near(p, want.detach(), dtype)
    assert (p[..., keys - columns :].unflatten(1, (3, queries))[..., hidden] == 0).all()
    upstream = draw(*p.shape, dtype=dtype, seed=1)
    (d_want,) = torch.autograd.grad(want, wide, upstream.double())
    assert_near(elementwise_cpp.scores_gradient(p, upstream.clone(), 0.125), d_want, dtype, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_gated_silu(width, dtype):
    gate, up, upstream = (draw(width, dtype=dtype, scale=3.0, seed=seed) for seed in range(3))
    gate[0] = -200.0
    wide = [t.double().requires_grad_() for t in (gate, up)]
    want = gated_silu_reference(*wide)
    assert_near(elementwise_cpp.gated_silu(gate, up), want.detach(), dtype)
    grads = torch.autograd.grad(want, wide, upstream.double())
    for got, expected in zip(elementwise_cpp.gated_silu_gradients(gate, up, upstream), grads, strict=True):
        assert_near(got, expected, dtype)


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize(("dtype", "out"), [(a, b) for a in DTYPES for b in DTYPES])
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width, dtype, out, gain):
    x, weight = draw(37, width, dtype=dtype, scale=5.0), draw(width, seed=1) if gain else None
    wide = [t.double().requires_grad_() for t in (x, weight) if t is not None]
    want = rms_norm_reference(wide[0], wide[1] if gain else None, 1e-6)
    got, inverse = elementwise_cpp.rms_norm(x, weight, 1e-6, out)
    assert got.dtype == out
    assert_near(got, want.detach(), out, 2)
    upstream = draw(37, width, dtype=out, seed=2)
    grads = torch.autograd.grad(want, wide, upstream.double())
    dx, d_weight = elementwise_cpp.rms_norm_gradients(x, weight, inverse, upstream)
    scale = upstream.double().abs().max() * inverse.max() / max(1e-30, float(grads[0].abs().max()))
    assert_near(dx, grads[0], dtype, max(4.0, 4 * float(scale)))
    if d_weight is not None:
        assert_near(d_weight, grads[1], torch.float32, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("half", [1, 7, 8, 16, 24, 33])
def test_rotations(half, layout, sign, dtype):
    """Of a projection's view, by angles of each row or of all."""
    projected = draw(2, 5, 3 * 2 * half + 4, dtype=dtype, scale=3.0)
    x = projected[..., 4:].unflatten(-1, (3, 2 * half)).transpose(1, 2)
    for rows in (1, 2):
        cos, sin = rope_angles(torch.arange(rows * 5).view(rows, 1, 5), 2 * half)
        want = apply_rope_reference(x.double(), cos, sign * sin, layout)
        got = elementwise_cpp.rotate(x, cos, sin, layout == "interleaved", sign)
        assert got.is_contiguous()
        assert got.dtype == dtype
        assert_near(got, want, dtype, 2)


def _everything():
    """A gradient through every kernel, by the public functions."""
    parts = [draw(2, 2, 300, 16, seed=seed).requires_grad_() for seed in range(3)]
    table, gain = draw(50, 32, seed=4).requires_grad_(), RMSNorm(32)
    angles = rope_angles(torch.arange(300).view(1, 1, 300), 16)
    mixed = blocked_attention(*(apply_rope(part, *angles) for part in parts)).transpose(1, 2).flatten(2)
    hidden = gain(gated_silu(mixed, mixed.flip(-1).contiguous()))
    labels = torch.randint(50, hidden.shape[:2], generator=torch.Generator().manual_seed(5))
    loss = linear_cross_entropy(hidden, table, labels)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), [*parts, table, gain.weight])]


def test_without_a_compiler_the_same_values(monkeypatch):
    fast = _everything()
    monkeypatch.setattr(elementwise_cpp, "load_library", lambda: None)
    for got, want in zip(fast, _everything(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    one = _everything()
    monkeypatch.setattr(elementwise_cpp, "threads", lambda: 3)
    assert all(torch.equal(a, b) for a, b in zip(one, _everything(), strict=True))


def test_only_what_the_kernels_take_reaches_them():
    assert elementwise_cpp.fits(torch.ones(3), torch.ones(3, dtype=torch.bfloat16))
    for other in (
        torch.ones(3).double(),
        torch.ones(3, device="meta"),
        torch.ones(4, 4).T,
        torch.ones(3).half(),
    ):
        assert not elementwise_cpp.fits(other)
