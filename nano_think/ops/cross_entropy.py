"""Cross-entropy of a linear head that never holds the logits of all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
# Up to 128 MiB of fp32 log-probabilities are kept for the backward pass; beyond, they are computed again.
KEPT_ELEMENTS = 2**25
# Without a backward pass, logits come in pieces of 4 MiB: they stay in the cache, and the holes that larger ones
# leave in the heap once took an evaluation from 1 to 6 GB.
SCORED_ELEMENTS = 2**20


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 2048, kept: int = KEPT_ELEMENTS
) -> Tensor:
    """-log softmax(hidden weight^T)[label] in nats, fp32, 0 where the label is -100.

    hidden: (..., d), weight: (V, d), labels: (...) int64; the result has the shape of `labels`.

    Labelled tokens are taken `chunk` at a time. If all their log-probabilities are more than `kept` numbers,
    only hidden states are saved and the backward pass computes each chunk again: peak memory is chunk x V
    instead of tokens x V, for one more head product. Where no gradient is asked for, nothing is saved.
    """
    flat, targets = hidden.flatten(0, -2), labels.flatten()
    labelled = (targets != IGNORED).nonzero().squeeze(1)
    dtype = torch.get_autocast_dtype(hidden.device.type)
    dtype = dtype if torch.is_autocast_enabled(hidden.device.type) else weight.dtype
    differentiated = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = differentiated and len(labelled) * weight.shape[0] <= kept
    chunk = chunk if differentiated else min(chunk, max(1, SCORED_ELEMENTS // weight.shape[0]))
    rows = flat.index_select(0, labelled).to(dtype)
    losses = _LinearCrossEntropy.apply(rows, weight.to(dtype), targets[labelled], chunk, keep)
    nll = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    return nll.index_copy(0, labelled, losses).view(labels.shape)


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same with all logits in memory, differentiated by autograd."""
    logits = F.linear(hidden.flatten(0, -2).to(weight.dtype), weight).float()
    nll = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view(labels.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses (T,) of hidden (T, d), head (V, d) and targets (T,); d loss / d logits = softmax - one-hot."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, keep: bool) -> Tensor:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        saved = []
        for part in _parts(len(hidden), chunk):
            log_p = _log_probabilities(hidden[part], weight)
            losses[part] = -log_p.gather(1, targets[part].unsqueeze(1)).squeeze(1)
            if keep:
                saved.append(log_p)
        ctx.chunk = chunk
        ctx.save_for_backward(hidden, weight, targets, *saved)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets, *saved = ctx.saved_tensors
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if for_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        for number, part in enumerate(_parts(len(hidden), ctx.chunk)):
            log_p = saved[number] if saved else _log_probabilities(hidden[part], weight)
            d_logits = log_p.exp()
            d_logits[torch.arange(len(d_logits), device=hidden.device), targets[part]] -= 1
            d_logits = d_logits.mul_(upstream[part].unsqueeze(1)).to(weight.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[part])
            if d_weight is not None:
                d_weight += d_logits.T @ hidden[part]
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


def _log_probabilities(hidden: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden, weight).float().log_softmax(dim=-1)


def _parts(length: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, length, chunk)]
