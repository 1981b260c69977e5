"""The compiled attention kernel against the formula in fp64, values and gradients.

Tolerances are relative to the norm of each result or of the upstream gradient: fp32 1e-6; bf16 4e-3, one rounding
of each number, 2^-8, as everything between inputs and results is fp32.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from nano_think.ops import attention as module
from nano_think.ops import attention_cpp
from nano_think.ops.attention import attention, attention_reference, document_mask
from nano_think.ops.attention_cpp import TILE, tiled_attention
from nano_think.ops.blocked_attention import blocked_attention

pytestmark = pytest.mark.skipif(attention_cpp.load_library() is None, reason="no C++ compiler")

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
DTYPES = list(TOLERANCE)
LENGTH = 2 * TILE + 37
# lengths: they end at, before and behind a border of tiles, cross several, and one fills its row
DOCUMENTS = ([TILE, 1, TILE + 20, 16], [LENGTH], [3, 60, 2, 99, 1])


def inputs(dtype, length=LENGTH, groups=4, width=24, value_width=24) -> list[Tensor]:
    """q, k, v and the gradient of the output of 3 rows and 4 heads; q and v lie as projections leave them."""
    generator = torch.Generator().manual_seed(length + groups)
    shapes = [
        (length, 4, width),
        (length, groups, width),
        (length, groups, value_width),
        (length, 4, value_width),
    ]
    q, k, v, upstream = (torch.randn((3, *s), generator=generator).to(dtype).transpose(1, 2) for s in shapes)
    return [q * 2, k.contiguous(), v, upstream]


def first_of(rows: int = 3) -> Tensor:
    starts = [[sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)] for lengths in DOCUMENTS]
    return torch.tensor(starts[:rows])


def with_gradients(function, tensors: list[Tensor], **options) -> list[Tensor]:
    *leaves, upstream = tensors
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def assert_is_the_formula(tensors: list[Tensor], packed: int = 0) -> None:
    first = first_of(packed) if packed else None
    mask = document_mask(first) if packed else None
    found = with_gradients(tiled_attention, tensors, first=first)
    wanted = with_gradients(attention_reference, [x.double() for x in tensors], mask=mask, causal=True)
    size = tensors[-1].double().norm()
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == tensors[0].dtype
        assert one.shape == other.shape
        # where queries see few keys, gradients of scores are small differences of products with the upstream one
        assert (one.double() - other).norm() <= TOLERANCE[one.dtype] * max(other.norm(), size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [0, 1, 3])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_equals_the_formula_with_gradients(groups, packed, dtype) -> None:
    assert_is_the_formula(inputs(dtype, groups=groups), packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 5, 15, 16, 17, 63, 64, 65, 127, 128, 193])
def test_any_length(length, dtype) -> None:
    assert_is_the_formula(inputs(dtype, length))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "value_width"), [(1, 1), (8, 6), (64, 64), (96, 64), (33, 130)])
def test_any_width(width, value_width, dtype) -> None:
    assert_is_the_formula(inputs(dtype, width=width, value_width=value_width))


def test_scores_of_any_size() -> None:
    """Far from zero and far apart; the largest comes in a late tile for some, in an early one for others."""
    q, k, v, upstream = inputs(torch.float32)
    tensors = [q * 20, k * torch.linspace(0.1, 20, LENGTH).unsqueeze(1), v, upstream]
    found = with_gradients(tiled_attention, tensors)
    wanted = with_gradients(attention_reference, [x.double() for x in tensors], causal=True)
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() <= 1e-3 * other.norm()  # scores of 1e4 carry an error of 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_later_tokens_and_other_documents_change_no_bit(dtype, packed) -> None:
    first = first_of() if packed else None
    q, k, v, _ = inputs(dtype)
    before = tiled_attention(q, k, v, first)
    for t in (0, 15, 16, 62, 63, 64, 65, 100, TILE * 2, LENGTH - 1):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t] += 1
        after = tiled_attention(*changed, first)
        assert not torch.equal(after[:, :, t], before[:, :, t])
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        if first is not None:
            for row, bounds in enumerate(first):
                assert torch.equal(after[row, :, bounds > t], before[row, :, bounds > t])


@pytest.mark.parametrize("packed", [False, True])
def test_earlier_losses_and_other_documents_give_no_gradient(packed) -> None:
    """The gradient of a query reaches the keys and values it sees, and no others by a single bit."""
    first = first_of() if packed else None
    q, k, v, upstream = inputs(torch.float32)
    for t in (0, 16, 63, 64, 80, LENGTH - 1):
        lone = torch.zeros_like(upstream)
        lone[:, :, t] = upstream[:, :, t]
        _, dq, *to_keys = with_gradients(tiled_attention, [q, k, v, lone], first=first)
        assert dq.count_nonzero(dim=(1, 3)).gt(0).nonzero()[:, 1].eq(t).all()
        for row in range(3):
            seen = slice(int(first[row, t]) if packed else 0, t + 1)
            for gradient in to_keys:
                reached = gradient[row].count_nonzero(dim=(0, 2)).gt(0)
                # a lone key has probability 1: its score has no gradient
                assert reached[seen].all() or seen.stop - seen.start == 1
                assert reached.sum() <= seen.stop - seen.start


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype, monkeypatch) -> None:
    one = with_gradients(tiled_attention, inputs(dtype, groups=2), first=first_of())
    monkeypatch.setattr(attention_cpp, "threads", lambda: 3)
    other = with_gradients(tiled_attention, inputs(dtype, groups=2), first=first_of())
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_strides_change_no_bit() -> None:
    """Heads side by side, one behind the other, and a gradient without any memory of its own."""
    tensors = inputs(torch.float32)
    want = with_gradients(tiled_attention, tensors)
    for lay_out in (torch.Tensor.contiguous, lambda x: x.mT.contiguous().mT):
        got = with_gradients(tiled_attention, [lay_out(x) for x in tensors])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    ones = torch.ones(()).expand_as(tensors[3])
    plain, spread = (with_gradients(tiled_attention, [*tensors[:3], x]) for x in (ones.contiguous(), ones))
    assert all(torch.equal(a, b) for a, b in zip(plain, spread, strict=True))


def test_nan_stays_nan() -> None:
    q, k, v, _ = inputs(torch.float32)
    q[0, 0, 70] = torch.nan
    out = tiled_attention(q, k, v)
    assert out[0, 0, 70].isnan().all()
    assert out.isnan().sum() == out.shape[-1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_compiler_the_same_values(dtype, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    tensors, first = inputs(dtype), first_of()
    fast = with_gradients(attention, tensors, first=first)
    monkeypatch.setattr(attention_cpp, "load_library", lambda: None)
    slow = with_gradients(attention, tensors, first=first)
    assert not torch.equal(fast[1], slow[1])  # another way
    for one, other in zip(fast, slow, strict=True):
        assert (one.double() - other.double()).norm() <= 4 * TOLERANCE[dtype] * other.double().norm()


def test_only_what_the_kernel_takes_reaches_it(monkeypatch) -> None:
    calls = []
    ways = {"blocks": (module, blocked_attention), "tiles": (attention_cpp, tiled_attention)}
    for way, (where, function) in ways.items():
        watched = partial(lambda way, function, *a: calls.append(way) or function(*a), way, function)
        monkeypatch.setattr(where, function.__name__, watched)
    q, k, v, _ = inputs(torch.float32)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for dtype, way in ((torch.float32, "tiles"), (torch.bfloat16, "tiles"), (torch.float64, "blocks")):
        attention(q.to(dtype), k.to(dtype), v.to(dtype), causal=True)
        assert calls.pop() == way
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for dtype, way in ((torch.float32, "tiles"), (torch.bfloat16, "blocks")):
        attention(q.to(dtype), k.to(dtype), v.to(dtype), causal=True)
        assert calls.pop() == way
    attention(q, k, v)
    attention(q[:, :, -70:], k, v, causal=True)
    attention(*(x[:, :, : TILE - 1] for x in (q, k, v)), causal=True)
    assert not calls
