"""Causal attention on a CPU as plain matrix products, one block of queries of one row after the other.

A block sees the keys up to its own end and none before the first document it holds, so about half of the
products of dense attention are left and no (L, L) mask is made. All heads of a block go through one batched
product, and everything between two products stays in the cache. Probabilities are not kept: the backward pass
computes a block's again, which costs no more than writing and reading them and holds the memory linear in L.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_think.ops import elementwise_cpp

BLOCK = 128


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None) -> Tensor:
    """Causal softmax(q k^T / sqrt(D)) v, (B, H, L, E), of q (B, H, L, D), k (B, G, L, D), v (B, G, L, E).

    first: (B or 1, L) int64, the earliest key each query sees, never falling along a row; 0 without it.
    Scores and probabilities have the dtype of q; the softmax between them is computed in fp32.
    """
    mixed: Tensor = _BlockedAttention.apply(q, k, v, first)
    return mixed


@dataclass(frozen=True)
class _Block:
    """Queries start .. stop - 1 of one row, which see keys low .. stop - 1.

    bias: (queries, columns), 0 or -inf, to be added to the last columns of the scores.
    """

    row: int
    start: int
    stop: int
    low: int
    bias: Tensor

    def queries(self, x: Tensor, groups: int) -> Tensor:
        """Its part of x (B, H, L, D) as (G, R * queries, D): heads that share keys become more queries."""
        part = x[self.row, :, self.start : self.stop]
        return part if groups == len(part) else part.unflatten(0, (groups, -1)).flatten(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        """Its part of x (B, G, L, D), (G, keys, D)."""
        return x[self.row, :, self.low : self.stop]

    def write(self, x: Tensor, values: Tensor) -> None:
        """Put (G, R * queries, D) where `queries` found it."""
        part = x[self.row, :, self.start : self.stop]
        part.copy_(values.view(part.shape))

    def probabilities(self, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        """Softmax of the visible scores times `scale`, (G, R * queries, keys)."""
        scores = torch.bmm(queries, keys.mT)
        if elementwise_cpp.fits(scores):
            return elementwise_cpp.softmax_of_scores(scores, self.bias.contiguous(), scale)
        per_head = scores.mul_(scale).unflatten(1, (-1, self.stop - self.start))
        per_head[..., -self.bias.shape[1] :] += self.bias
        return scores.softmax(dim=-1)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        (batch, heads, length, _), groups = q.shape, k.shape[1]
        # in memory (B, L, H, E), as the output projection reads it
        out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
        for block in _blocks(q, first):
            p = block.probabilities(block.queries(q, groups), block.keys(k), _scale(q))
            block.write(out, torch.bmm(p, block.keys(v)))
        ctx.save_for_backward(q, k, v, first)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first = ctx.saved_tensors
        groups, scale = k.shape[1], _scale(q)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(x.shape, dtype=_sum_dtype(x), device=x.device) for x in (k, v))
        for block in _blocks(q, first):
            queries, keys = block.queries(q, groups), block.keys(k)
            d_mixed = block.queries(upstream, groups).contiguous()
            p = block.probabilities(queries, keys, scale)
            block.keys(dv).add_(torch.bmm(p.mT, d_mixed))
            dp = torch.bmm(d_mixed, block.keys(v).mT)
            d_scores = _scores_gradient(p, dp, scale)
            block.write(dq, torch.bmm(d_scores, keys))
            block.keys(dk).add_(torch.bmm(d_scores.mT, queries))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _scores_gradient(p: Tensor, dp: Tensor, scale: float) -> Tensor:
    if elementwise_cpp.fits(p, dp):
        return elementwise_cpp.scores_gradient(p, dp, scale)
    return torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)


def _scale(q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1])


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(q: Tensor, first: Tensor | None) -> Iterator[_Block]:
    """The blocks of every row, earliest first."""
    batch, length = q.shape[0], q.shape[2]
    starts = range(0, length, BLOCK)
    order = torch.arange(length, device=q.device)
    later = _bias(order[:BLOCK] > order[:BLOCK].unsqueeze(1), q)
    lows = [[0] * len(starts)] if first is None else first[:, ::BLOCK].tolist()
    for row in range(batch):
        for number, start in enumerate(starts):
            stop, low = min(start + BLOCK, length), lows[row % len(lows)][number]
            bias = later[: stop - start, : stop - start]
            if first is not None:
                bounds, keys = first[row % len(lows), start:stop].unsqueeze(1), order[low:stop]
                bias = _bias((keys < bounds) | (keys > order[start:stop].unsqueeze(1)), q)
            yield _Block(row, start, stop, low, bias)


def _bias(hidden: Tensor, like: Tensor) -> Tensor:
    """-inf where `hidden`, else 0."""
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -math.inf)
