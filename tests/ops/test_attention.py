from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import eager_attention_forward

from nano_think.ops.attention import (
    attention,
    attention_reference,
    document_mask,
    offset_causal_mask,
)


def inputs(queries: int, keys: int, heads: int = 4, groups: int = 4, dtype=torch.float64) -> list[Tensor]:
    """q, k, v with head_dim 8 and value width 6."""
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = [(2, heads, queries, 8), (2, groups, keys, 8), (2, groups, keys, 6)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def random_mask(queries: int, keys: int) -> Tensor:
    """(2, 1, queries, keys) with at least one visible key a query, also under the causal mask."""
    mask = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(9)) < 0.5
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (1, 9), (3, 9), (8, 9)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_fast_path_equals_the_formula_with_gradients(groups, queries, keys, causal, masked) -> None:
    mask = random_mask(queries, keys) if masked else None
    fast, slow = inputs(queries, keys, groups=groups), inputs(queries, keys, groups=groups)
    out = attention(*fast, mask=mask, causal=causal)
    expected = attention_reference(*slow, mask=mask, causal=causal)
    assert out.shape == (2, 4, queries, 6)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for one, two in zip(fast, slow, strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (3, 9)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_hugging_face_with_gradients(groups, queries, keys, masked) -> None:
    """Heads that share keys and values as theirs do, each `4 / groups` neighbours; fp32, to 1e-5."""
    ours, theirs = (inputs(queries, keys, groups=groups, dtype=torch.float32) for _ in range(2))
    mask = random_mask(queries, keys) if masked else None
    out = attention(*ours, mask=mask, causal=True)
    hidden = torch.ones(queries, keys).triu(keys - queries + 1).bool()
    hidden = hidden if mask is None else hidden | ~mask
    bias = torch.zeros(hidden.shape).masked_fill(hidden, -math.inf).expand(2, 1, queries, keys)
    module = SimpleNamespace(num_key_value_groups=4 // groups, training=False)
    expected = eager_attention_forward(module, *theirs, bias, scaling=8**-0.5)[0].transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad(o, x, upstream) for o, x in ((out, ours), (expected, theirs))]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


def test_formula_equals_plain_loops() -> None:
    q, k, v = (x.detach() for x in inputs(3, 5, heads=4, groups=2))
    mask = random_mask(3, 5)
    out = attention_reference(q, k, v, mask=mask, causal=True)
    for b in range(2):
        for h in range(4):
            for i in range(3):
                keys = [j for j in range(5) if j <= i + 2 and mask[b, 0, i, j]]
                scores = [math.exp(float(q[b, h, i] @ k[b, h // 2, j]) / math.sqrt(8)) for j in keys]
                mixed = sum(s * v[b, h // 2, j] for s, j in zip(scores, keys, strict=True)) / sum(scores)
                torch.testing.assert_close(out[b, h, i], mixed)


def test_offset_mask_lines_up_the_ends() -> None:
    assert offset_causal_mask(2, 4, torch.device("cpu")).tolist() == [
        [True, True, True, False],
        [True, True, True, True],
    ]


def test_causal_queries_in_pieces_equal_the_whole() -> None:
    q, k, v = (x.detach() for x in inputs(9, 9))
    whole = attention(q, k, v, causal=True)
    pieces = [
        attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], causal=True) for a, b in [(0, 1), (1, 5), (5, 9)]
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, atol=1e-12, rtol=0)


def test_single_precision_agrees_to_single_precision() -> None:
    q, k, v = inputs(64, 64, dtype=torch.float32)
    torch.testing.assert_close(
        attention(q, k, v, causal=True), attention_reference(q, k, v, causal=True), atol=1e-5, rtol=0
    )


def test_first_equals_its_mask_on_short_rows_and_refuses_another() -> None:
    q, k, v = (x.detach() for x in inputs(9, 9))
    first = torch.tensor([[0, 0, 0, 3, 3, 5, 5, 7, 8], [0, 1, 1, 1, 1, 1, 6, 6, 6]])
    expected = attention_reference(q, k, v, mask=document_mask(first))
    torch.testing.assert_close(attention(q, k, v, first=first), expected)
    with pytest.raises(ValueError, match="in place of a mask"):
        attention(q, k, v, mask=document_mask(first), first=first)
    with pytest.raises(ValueError, match="as many keys as queries"):
        attention(q[:, :, :3], k, v, first=first)


@pytest.mark.parametrize("length", [63, 64, 200])
def test_keys_for_all_rows_are_those_of_each_row(length):
    """At every length, although kernels take over at some and do not know such shapes."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, length, 8, generator=generator)
    k, v = (torch.randn(1, 2, length, 8, generator=generator) for _ in "kv")
    want = attention_reference(q, k.expand_as(q), v.expand_as(q), causal=True)
    torch.testing.assert_close(attention(q, k, v, causal=True), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [32, 64])
def test_heads_that_cannot_be_shared_out_are_an_error(length):
    q, k = torch.zeros(1, 4, length, 8), torch.zeros(1, 3, length, 8)
    with pytest.raises((RuntimeError, ValueError)):
        attention(q, k, k, causal=True)
