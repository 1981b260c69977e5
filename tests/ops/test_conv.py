from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nano_think.ops.conv import causal_conv, extend_window

D = 5


def tensors(length: int, taps: int = 4, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, D), (D, taps), (D,)]
    return tuple(torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes)


def by_definition(x: Tensor, weight: Tensor, bias: Tensor, segments: Tensor) -> Tensor:
    out = bias.expand(x.shape).clone()
    taps = weight.shape[1]
    for row in range(len(x)):
        for t in range(x.shape[1]):
            for j in range(min(taps, t + 1)):
                if segments[row, t - j] == segments[row, t]:
                    out[row, t] = out[row, t] + weight[:, taps - 1 - j] * x[row, t - j]
    return out


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_one_document_equals_torch(length: int, taps: int) -> None:
    x, weight, bias = tensors(length, taps)
    expected = F.conv1d(F.pad(x.transpose(1, 2), (taps - 1, 0)), weight.unsqueeze(1), bias, groups=D)
    actual = causal_conv(x, weight, bias)
    torch.testing.assert_close(actual, expected.transpose(1, 2))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    for a, b in zip(
        torch.autograd.grad(actual, (x, weight, bias), upstream),
        torch.autograd.grad(expected.transpose(1, 2), (x, weight, bias), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "rows",
    [
        [[0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3]],
        [[-1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1, -1, -1, -1]],
        [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]],
        [[0], [0]],
        [[0, 1], [0, 0]],
    ],
)
def test_taps_in_other_documents_are_zero(rows: list[list[int]]) -> None:
    segments = torch.tensor(rows)
    x, weight, bias = tensors(segments.shape[1], batch=len(rows))
    actual = causal_conv(x, weight, bias, segments)
    expected = by_definition(x, weight, bias, segments)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(
        torch.autograd.grad(actual.square().sum(), (x, weight, bias)),
        torch.autograd.grad(expected.square().sum(), (x, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_segments_of_one_row_serve_all() -> None:
    x, weight, bias = tensors(6)
    one = torch.tensor([[0, 0, 1, 1, 1, 2]])
    torch.testing.assert_close(
        causal_conv(x, weight, bias, one), causal_conv(x, weight, bias, one.expand(2, -1))
    )


@pytest.mark.parametrize("cut", range(1, 9))
def test_handing_the_window_on_equals_one_run(cut: int) -> None:
    x, weight, bias = tensors(9)
    first = causal_conv(x[:, :cut], weight, bias)
    window = extend_window(x[:, :cut], None, 4)[:, -3:].transpose(1, 2)
    second = causal_conv(x[:, cut:], weight, bias, window=window)
    torch.testing.assert_close(torch.cat((first, second), dim=1), causal_conv(x, weight, bias))


def test_the_window_belongs_to_the_first_document() -> None:
    x, weight, bias = tensors(9)
    window = x[:, 2:5].transpose(1, 2)
    segments = torch.tensor([[0, 0, 1, 1]])
    actual = causal_conv(x[:, 5:], weight, bias, segments, window)
    whole = causal_conv(x, weight, bias, torch.tensor([[0] * 7 + [1] * 2]))
    torch.testing.assert_close(actual, whole[:, 5:])


def test_gradcheck() -> None:
    x, weight, bias = tensors(7, batch=1)
    segments = torch.tensor([[0, 0, 1, 1, 1, 1, -1]])
    assert torch.autograd.gradcheck(lambda *t: causal_conv(*t, segments), (x, weight, bias))


def test_shift() -> None:
    x, weight, bias = tensors(12)
    moved = F.pad(x, (0, 0, 3, 0))[:, :12]
    torch.testing.assert_close(causal_conv(moved, weight, bias)[:, 3:], causal_conv(x, weight, bias)[:, :9])


def test_half_precision_input_keeps_its_dtype() -> None:
    x, weight, bias = (t.detach().float() for t in tensors(9))
    out = causal_conv(x.bfloat16(), weight, bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, causal_conv(x.bfloat16().float(), weight, bias).bfloat16())
