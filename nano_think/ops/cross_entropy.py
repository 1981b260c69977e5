"""Cross-entropy of a linear head that never holds the logits of all tokens at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 2048) -> Tensor:
    """-log softmax(hidden weight^T)[label] in nats, fp32, 0 where the label is -100.

    hidden: (..., d), weight: (V, d), labels: (...) int64; the result has the shape of `labels`.

    Labelled tokens are taken `chunk` at a time and their logits are computed again in the backward pass:
    peak memory is chunk x V instead of tokens x V, for one more head product.
    """
    flat, targets = hidden.flatten(0, -2), labels.flatten()
    labelled = (targets != IGNORED).nonzero().squeeze(1)
    nll = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    pieces = [
        checkpoint(
            _nll, flat[rows], weight, targets[rows], use_reentrant=False, preserve_rng_state=False
        )
        for rows in labelled.split(chunk)
    ]  # fmt: skip
    return nll.index_copy(0, labelled, torch.cat(pieces)).view(labels.shape)


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same with all logits in memory."""
    return _nll(hidden.flatten(0, -2), weight, labels.flatten()).view(labels.shape)


def _nll(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden.to(weight.dtype), weight).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
