"""What the router averages: causal means over a document, all computed from running sums.

A pool turns inputs u (B, L, C) into a sum and a count per position, whose quotient is the mean. It offers
`sums` for whole sequences, and `init_values` with `extend` for decoding: the values are named tensors that a
`RingState` keeps.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_think.ops.causal_sum import causal_sum
from nano_think.ops.layout import Layout

Sums = tuple[Tensor, Tensor]


class Pool(Protocol):
    """Sums (B, L, C) and counts (B or 1, L, 1), their quotient being the mean."""

    def sums(self, u: Tensor, layout: Layout) -> Sums:
        """Of every position of whole documents."""

    def init_values(self, batch: int, channels: int, device: torch.device) -> dict[str, Tensor]:
        """What decoding remembers before the first position."""

    def extend(self, u: Tensor, values: dict[str, Tensor], start: int) -> tuple[Sums, dict[str, Tensor]]:
        """Of n new positions from `start` on, and the values after them."""


class RunningMean:
    """Mean of all tokens so far, the i-th last with weight decay^i (1: plain mean, 0: the token alone).

    span: only the first `span` positions of a document count, so that the mean stands still after them.
    """

    def __init__(self, decay: float = 1.0, span: int | None = None) -> None:
        self.decay, self.span = decay, span

    def sums(self, u: Tensor, layout: Layout) -> Sums:
        return self._sums(u, layout.positions, layout.positions)

    def init_values(self, batch: int, channels: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "sum": torch.zeros(batch, 1, channels, device=device),
            "count": torch.zeros(batch, 1, 1, device=device),
        }

    def extend(self, u: Tensor, values: dict[str, Tensor], start: int) -> tuple[Sums, dict[str, Tensor]]:
        new = torch.arange(u.shape[1], device=u.device).unsqueeze(0)
        total, count = self._sums(u, new, start + new)
        carried = self.decay ** (new + 1.0).unsqueeze(-1)
        total, count = total + carried * values["sum"], count + carried * values["count"]
        return (total, count), {"sum": total[:, -1:], "count": count[:, -1:]}

    def _sums(self, u: Tensor, reach: Tensor, positions: Tensor) -> Sums:
        """Sums over the last reach + 1 terms; `positions` decide which terms count."""
        counts = (positions < self.span) if self.span else torch.ones_like(positions, dtype=torch.bool)
        counts = counts.unsqueeze(-1).to(u.dtype)
        return causal_sum(u * counts, reach, self.decay), causal_sum(counts, reach, self.decay)


class WindowMean:
    """Mean of the last `span` tokens of the document."""

    def __init__(self, span: int) -> None:
        self.span = span

    def sums(self, u: Tensor, layout: Layout) -> Sums:
        total = causal_sum(u, layout.positions)
        older = F.pad(total, (0, 0, self.span, 0))[:, : u.shape[1]]
        left_behind = (layout.positions >= self.span).unsqueeze(-1)
        return total - torch.where(left_behind, older, 0.0), self._counts(layout.positions, u)

    def init_values(self, batch: int, channels: int, device: torch.device) -> dict[str, Tensor]:
        return {"tail": torch.zeros(batch, self.span, channels, device=device)}

    def extend(self, u: Tensor, values: dict[str, Tensor], start: int) -> tuple[Sums, dict[str, Tensor]]:
        everything = torch.cat((values["tail"], u), dim=1)
        total = everything.unfold(1, self.span, 1)[:, 1:].sum(dim=-1)
        positions = torch.arange(start, start + u.shape[1], device=u.device).unsqueeze(0)
        return (total, self._counts(positions, u)), {"tail": everything[:, -self.span :]}

    def _counts(self, positions: Tensor, u: Tensor) -> Tensor:
        return (positions + 1).clamp(max=self.span).unsqueeze(-1).to(u.dtype)


class WholeDocument:
    """Mean of the whole document, later tokens included: the seeds' pool, good for analysis only."""

    def sums(self, u: Tensor, layout: Layout) -> Sums:
        same = (layout.segments.unsqueeze(2) == layout.segments.unsqueeze(1)).to(u.dtype)
        return same @ u, same.sum(dim=-1, keepdim=True)

    def init_values(self, batch: int, channels: int, device: torch.device) -> dict[str, Tensor]:
        return {}

    def extend(self, u: Tensor, values: dict[str, Tensor], start: int) -> tuple[Sums, dict[str, Tensor]]:
        raise ValueError("router.pool=sequence reads later tokens and cannot decode; choose cummean")
