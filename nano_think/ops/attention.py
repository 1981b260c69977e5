"""Scaled dot-product attention: torch's kernels, and the formula they must agree with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v for q (B, H, L, D), k (B, G, S, D), v (B, G, S, E) with G dividing H.

    mask: bool, broadcastable to (B, H, L, S), True = visible. `causal` lines the last query up with the last
    key, as cached decoding needs it (torch's own `is_causal` lines up the first ones). With both, a key must
    be visible by both.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
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


def offset_causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """(num_queries, num_keys) bool mask in which the queries are the last positions of the keys."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
    return torch.arange(num_keys, device=device).unsqueeze(0) <= query
