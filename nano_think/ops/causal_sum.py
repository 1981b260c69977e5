"""Running sums that restart with every document, for all positions of a packed batch at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_sum(x: Tensor, positions: Tensor, decay: float = 1.0) -> Tensor:
    """sum over i = 0 .. positions[t] of decay^i x[t - i], the positions counting from the document's start.

    x: (B, L, C), positions: (B or 1, L) int64. Doubling (Hillis and Steele 1986): after step k every position
    holds the sum of its last 2^k terms. Subtracting two cumulative sums of the row would be shorter, but
    would give a short document the rounding error of the long one packed before it.
    """
    length, shift, total = x.shape[1], 1, x
    while shift < length:
        earlier = F.pad(total, (0, 0, shift, 0))[:, :length]
        same_document = (positions >= shift).unsqueeze(-1)
        total = total + decay**shift * torch.where(same_document, earlier, 0.0)
        shift *= 2
    return total


def causal_sum_reference(x: Tensor, positions: Tensor, decay: float = 1.0) -> Tensor:
    """The same, one position after the other."""
    state, totals = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        carried = (positions[:, t] > 0).unsqueeze(-1)
        state = torch.where(carried, decay * state, 0.0) + x[:, t]
        totals.append(state)
    return torch.stack(totals, dim=1)
