"""Attention by blocks against the formula with all scores, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nano_think.ops import blocked_attention as module
from nano_think.ops.attention import attention, attention_reference, document_mask
from nano_think.ops.blocked_attention import blocked_attention

DOCUMENTS = ([7, 1, 9, 3], [20], [2, 15, 3])  # lengths; some cross a border of blocks, one fills its row


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 8)


def inputs(dtype: torch.dtype, length: int = 20, groups: int = 4) -> list[Tensor]:
    """q, k, v and the gradient of the output: 4 heads, head_dim 8, values of width 6 laid out as heads come."""
    generator = torch.Generator().manual_seed(length + groups)
    shapes = [(3, 4, length, 8), (3, groups, length, 8), (3, length, groups, 6), (3, length, 4, 6)]
    q, k, v, upstream = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return [q, k, v.transpose(1, 2), upstream.transpose(1, 2)]


def first_of(documents: tuple[list[int], ...], rows: int = 3) -> Tensor:
    starts = [[sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)] for lengths in documents]
    return torch.tensor(starts[:rows])


def with_gradients(function, tensors: list[Tensor], **options) -> list[Tensor]:
    *leaves, upstream = tensors
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves, **options)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("packed", [0, 1, 3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1.5e-2)]
)
def test_equals_the_formula_with_gradients(groups, packed, dtype, tolerance) -> None:
    """Error relative to the norm of each result; the formula computes in fp64. packed: rows of `first`."""
    tensors, first = inputs(dtype, groups=groups), first_of(DOCUMENTS, packed) if packed else None
    mask = document_mask(first_of(DOCUMENTS, packed)) if packed else None
    found = with_gradients(blocked_attention, tensors, first=first)
    wanted = with_gradients(attention_reference, [x.double() for x in tensors], mask=mask, causal=True)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        assert one.shape == other.shape
        assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 23])
def test_any_length(length) -> None:
    found = with_gradients(blocked_attention, inputs(torch.float64, length))
    wanted = with_gradients(attention_reference, inputs(torch.float64, length), causal=True)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_later_tokens_and_other_documents_change_no_bit(dtype, packed) -> None:
    first = first_of(DOCUMENTS) if packed else None
    q, k, v, _ = inputs(dtype)
    before = blocked_attention(q, k, v, first)
    for t in (0, 5, 7, 8, 19):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t] += 1
        after = blocked_attention(*changed, first)
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        if first is not None:
            for row, bounds in enumerate(first):
                assert torch.equal(after[row, :, bounds > t], before[row, :, bounds > t])


def test_long_causal_attention_on_a_cpu_goes_by_blocks(monkeypatch) -> None:
    """Where the compiled kernel does not do it."""
    calls = []
    monkeypatch.setattr("nano_think.ops.attention_cpp.load_library", lambda: None)
    monkeypatch.setattr(
        "nano_think.ops.attention.blocked_attention", lambda *a: calls.append(a) or blocked_attention(*a)
    )
    length = 2 * 128 + 1
    q, k, v, _ = inputs(torch.float32, length)
    expected = attention_reference(q, k, v, causal=True)
    torch.testing.assert_close(attention(q, k, v, causal=True), expected, atol=1e-5, rtol=0)
    assert len(calls) == 1
    attention(q[:, :, -3:], k, v, causal=True)
    attention(q, k, v)
    assert len(calls) == 1
