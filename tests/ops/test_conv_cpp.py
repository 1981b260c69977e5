from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nano_think.ops import conv_cpp
from nano_think.ops.conv import causal_conv, plain_conv

if conv_cpp.load_library() is None:
    pytest.skip("compiled convolution not available", allow_module_level=True)

SHAPES = [(1, 2, 1, 4), (2, 17, 5, 4), (3, 33, 130, 1), (1, 40, 300, 2), (2, 3, 16, 7)]


def tensors(
    batch: int, length: int, d: int, taps: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the gradient of the output."""
    g = torch.Generator().manual_seed(length)
    shapes = [(batch, length, d), (d, taps), (d,), (batch, length, d)]
    x, weight, bias, upstream = (torch.randn(shape, generator=g) for shape in shapes)
    return x.to(dtype), weight, bias, upstream.to(dtype)


def random_segments(batch: int, length: int) -> Tensor:
    """Documents with pads, -1, on either side of some."""
    changes = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) < 0.3
    segments = changes.cumsum(1)
    return segments.masked_fill(segments % 3 == 0, -1)


def values_and_gradients(
    function: object,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    upstream: Tensor,
    segments: Tensor | None,
    silu: bool = False,
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = function(*leaves[:2], leaves[2] if bias is not None else None, segments, silu=silu)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("documents", ["one", "shared", "own"])
def test_fp32_equals_the_plain_convolution(
    shape: tuple[int, int, int, int], with_bias: bool, silu: bool, documents: str
) -> None:
    """Values and gradients to 1e-5."""
    x, weight, bias, upstream = tensors(*shape)
    segments = {
        "one": None,
        "shared": random_segments(1, shape[1]),
        "own": random_segments(*shape[:2]),
    }[documents]
    results = [
        values_and_gradients(function, x, weight, bias if with_bias else None, upstream, segments, silu)
        for function in (causal_conv, plain_conv)
    ]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_costs_one_rounding(shape: tuple[int, int, int, int], silu: bool) -> None:
    """Against fp32 on the same rounded inputs: 2^-8 of an entry of y or dx, 1e-5 for the parameters."""
    x, weight, bias, upstream = tensors(*shape, dtype=torch.bfloat16)
    segments = random_segments(*shape[:2])
    actual = values_and_gradients(causal_conv, x, weight, bias, upstream, segments, silu)
    exact = values_and_gradients(plain_conv, x.float(), weight, bias, upstream.float(), segments, silu)
    assert [t.dtype for t in actual] == [torch.bfloat16] * 2 + [torch.float32] * 2
    for value, expected, rtol in zip(actual, exact, (2**-8, 2**-8, 1e-5, 1e-5), strict=True):
        torch.testing.assert_close(value.float(), expected, rtol=rtol, atol=1e-5)


def test_a_slice_of_a_projection_is_read_in_place() -> None:
    x, weight, bias, upstream = tensors(2, 20, 16, 4)
    half = torch.cat((x, x), dim=-1)[..., :16]
    assert not half.is_contiguous()
    expected = values_and_gradients(causal_conv, x, weight, bias, upstream, None)
    actual = values_and_gradients(causal_conv, half, weight, bias, upstream, None)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("segmented", [False, True])
def test_a_window_in_front_equals_the_plain_convolution(segmented: bool) -> None:
    """Values and gradients, those of the window included, to 1e-5."""
    x, weight, bias, upstream = tensors(2, 17, 20, 4)
    window = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(9))
    segments = random_segments(2, 17) if segmented else None
    results = []
    for function in (causal_conv, plain_conv):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, window)]
        y = function(*leaves[:3], segments, leaves[3])
        results.append([y, *torch.autograd.grad(y, leaves, upstream)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, upstream = tensors(2, 40, 300, 4)
    results = []
    for count in (1, 2, 3):
        monkeypatch.setattr(conv_cpp, "threads", lambda count=count: count)
        results.append(values_and_gradients(causal_conv, x, weight, bias, upstream, random_segments(2, 40)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_is_not_finite_stays_in_its_document() -> None:
    x, weight, bias, _ = tensors(1, 12, 5, 4, dtype=torch.bfloat16)
    segments = torch.tensor([[0] * 6 + [1] * 6])
    healthy = causal_conv(x, weight, bias, segments)
    x[:, 5] = torch.nan
    broken = causal_conv(x, weight, bias, segments)
    assert broken[:, 5].isnan().all()
    assert torch.equal(broken[:, 6:], healthy[:, 6:])


def test_without_a_compiler_it_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(source: object) -> None:
        raise conv_cpp.BuildError("no C++ compiler was found")

    monkeypatch.setattr(conv_cpp, "load", missing)
    conv_cpp.load_library.cache_clear()
    x, weight, bias, upstream = tensors(2, 17, 5, 4)
    try:
        assert conv_cpp.load_library() is None
        assert not conv_cpp.fits(x, weight)
        actual = values_and_gradients(causal_conv, x, weight, bias, upstream, None)
    finally:
        conv_cpp.load_library.cache_clear()
    expected = values_and_gradients(plain_conv, x, weight, bias, upstream, None)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_other_dtypes_are_left_to_the_plain_convolution() -> None:
    x, weight, _, _ = tensors(1, 5, 3, 4)
    assert conv_cpp.fits(x, weight)
    assert not conv_cpp.fits(x.double(), weight.double())
    assert not conv_cpp.fits(x, weight.bfloat16())
