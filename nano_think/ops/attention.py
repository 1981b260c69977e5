"""Scaled dot-product attention: the fastest way known for each case, and the formula it must agree with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_think.ops import attention_cpp
from nano_think.ops.blocked_attention import BLOCK, blocked_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    first: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v for q (B, H, L, D), k (B, G, S, D), v (B, G, S, E) with G dividing H.

    mask: bool, broadcastable to (B, H, L, S), True = visible. `causal` lines the last query up with the last
    key, as cached decoding needs it (torch's own `is_causal` lines up the first ones). With both, a key must
    be visible by both.

    first: (B or 1, L) int64 in place of a mask, for as many queries as keys: query t sees keys first[t] .. t, as
    `Layout.first` says it of packed documents. Causal attention without a mask goes by tiles or blocks on a CPU:
    at 512 positions a compiled kernel takes 0.55 (fp32) and 0.25 (bf16) of the time of torch's.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    if first is not None and (mask is not None or num_queries != num_keys):
        raise ValueError("first stands in place of a mask and needs as many keys as queries")
    # torch knows what to do with other shapes, or that it cannot; our kernels count on these
    usual = k.shape[0] == q.shape[0] and v.shape[:3] == k.shape[:3] and q.shape[1] % k.shape[1] == 0
    usual &= k.shape[3] == q.shape[3]
    if mask is None and usual and num_queries == num_keys and (causal or first is not None):
        if num_queries >= attention_cpp.TILE and attention_cpp.fits(q, k, v):
            return attention_cpp.tiled_attention(q, k, v, first)
        if _blocks_pay(q):
            return blocked_attention(q, k, v, first)
    if first is not None:
        mask, causal = document_mask(first), False
    square = causal and mask is None and num_queries == num_keys
    if causal and num_queries > 1 and not square:
        visible = offset_causal_mask(num_queries, num_keys, q.device)
        mask = visible if mask is None else mask & visible
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=square, enable_gqa=q.shape[1] != k.shape[1]
    )


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """The same from the formula (Vaswani et al., arXiv 1706.03762, eq. 1), with all scores in memory."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(~offset_causal_mask(q.shape[2], k.shape[2], q.device), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v


def document_mask(first: Tensor) -> Tensor:
    """(B, 1, L, L) bool of `first` (B, L): True where the query (third axis) sees the key (fourth axis)."""
    order = torch.arange(first.shape[1], device=first.device)
    return ((order >= first.unsqueeze(2)) & (order <= order.unsqueeze(1))).unsqueeze(1)


def _blocks_pay(q: Tensor) -> bool:
    """Up to one block there is nothing to skip; a compiler would unroll the blocks into one huge graph."""
    return q.device.type == "cpu" and q.shape[2] > BLOCK and not torch.compiler.is_compiling()


def offset_causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """(num_queries, num_keys) bool mask in which the queries are the last positions of the keys."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
    return torch.arange(num_keys, device=device).unsqueeze(0) <= query
