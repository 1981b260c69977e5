"""Entropy and mutual information of router weights, in nats; plain torch without torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(probabilities: Tensor) -> Tensor:
    """Shannon entropy in nats over the last axis, with 0 log 0 = 0: (..., N) -> (...)."""
    return torch.special.entr(probabilities).sum(-1)


def mutual_information(sums: Tensor, counts: Tensor) -> Tensor:
    """I(domain; expert) = H(wbar) - sum_d P(d) H(wbar_d) in nats.

    Args:
        sums: (..., D, N) router weights summed over the tokens of each domain.
        counts: (..., D) number of tokens of each domain; a domain may be empty.

    Returns:
        (...) between 0 and ln min(D, N), up to rounding.
    """
    total = counts.sum(-1, keepdim=True)
    overall = entropy(sums.sum(-2) / total)
    within = entropy(sums / counts.clamp(min=1).unsqueeze(-1))
    return overall - (counts / total * within).sum(-1)
