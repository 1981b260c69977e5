from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nano_think.ops.selective_scan import selective_scan
from nano_think.ops.ssd import ssd_scan

CHUNK = 8


def ssd_inputs(batch: int, length: int, heads: int, width: int, n: int) -> tuple[Tensor, ...]:
    """x, dt, A, B, C and the initial state."""
    g = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tensors = (
        normal(batch, length, heads, width),
        normal(batch, length, heads).abs(),
        -0.05 - normal(heads).abs(),
        normal(batch, length, n),
        normal(batch, length, n),
        normal(batch, heads, width, n),
    )
    return tuple(tensor.requires_grad_() for tensor in tensors)


def as_selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The general recurrence with every channel and state of a head given the head's step and decay."""
    width, n = x.shape[-1], B.shape[-1]
    y, last = selective_scan(
        x.flatten(2),
        dt.repeat_interleave(width, dim=2),
        A.repeat_interleave(width).unsqueeze(1).expand(-1, n),
        B,
        C,
        x.new_zeros(x.shape[2] * width),
        starts=starts,
        state=state.flatten(1, 2),
        backend="ref",
    )
    return y.view_as(x), last.view_as(state)


@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 5])
@pytest.mark.parametrize(("heads", "width", "n"), [(1, 1, 1), (3, 4, 5)])
def test_chunks_equal_the_recurrence(length: int, with_starts: bool, heads: int, width: int, n: int) -> None:
    x, dt, A, B, C, state = inputs = ssd_inputs(2, length, heads, width, n)
    generator = torch.Generator().manual_seed(1)
    starts = torch.rand(2, length, generator=generator) < 0.2 if with_starts else None
    actual = ssd_scan(x, dt, A, B, C, starts, state, chunk=CHUNK)
    expected = as_selective_scan(*inputs, starts)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    grads, exact = (
        torch.autograd.grad((y.sin().sum() + last.sin().sum()), inputs) for y, last in (actual, expected)
    )
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cut", [1, 5, CHUNK, CHUNK + 3])
def test_handing_the_state_on_equals_one_run(cut: int) -> None:
    x, dt, A, B, C, state = ssd_inputs(2, 20, 2, 3, 4)
    whole, last = ssd_scan(x, dt, A, B, C, None, state, chunk=CHUNK)
    outputs = []
    for piece in (slice(0, cut), slice(cut, 20)):
        y, state = ssd_scan(x[:, piece], dt[:, piece], A, B[:, piece], C[:, piece], None, state, chunk=CHUNK)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("step", [1e-6, 20.0, 1e4])
def test_extreme_steps_stay_finite(step: float) -> None:
    x, _, _, B, C, state = ssd_inputs(1, 20, 2, 3, 4)
    dt, A = torch.full((1, 20, 2), step, dtype=torch.float64), torch.tensor([-1.0, -16.0]).double()
    leaves = [t.detach().float().requires_grad_() for t in (x, dt, A, B, C)]
    y, last = ssd_scan(*leaves, None, state.float(), chunk=CHUNK)
    grads = torch.autograd.grad(y.sum() + last.sum(), leaves)
    assert all(tensor.isfinite().all() for tensor in (y, last, *grads))


def test_small_steps_after_a_large_one_keep_their_precision() -> None:
    x, dt, _, B, C, state = (t.detach() for t in ssd_inputs(1, 8, 1, 2, 2))
    dt = dt * 1e-2
    dt[:, 2] = 1e4
    A = -torch.ones(1, dtype=torch.float64)
    exact, _ = ssd_scan(x, dt, A, B, C, None, state)
    single, _ = ssd_scan(x.float(), dt.float(), A.float(), B.float(), C.float(), None, state.float())
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-8 * dt.max().item())


def test_steps_of_zero_leave_the_state_as_it_is() -> None:
    x, dt, A, B, C, state = (t.detach().float() for t in ssd_inputs(2, 20, 2, 3, 4))
    _, last = ssd_scan(x, torch.zeros_like(dt), A, B, C, None, state, chunk=CHUNK)
    assert torch.equal(last, state)
