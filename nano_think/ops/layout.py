"""Where each token of a batch stands: its document and its position inside that document."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from nano_think.ops.rope import rope_angles


@dataclass(frozen=True, eq=False)
class Layout:
    """Document structure of a batch, shared by every operator that must not look across documents.

    positions: (B, L) int64, relative to the start of the document fragment (B may be 1: broadcast).
    segments: (B, L) int64, index of the fragment inside its row, -1 at pads.
    plain: every row is one document without padding; operators may then use their unmasked fast path.
    """

    positions: Tensor
    segments: Tensor
    plain: bool = False
    _angles: dict[tuple[int, float], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def span(cls, start: int, length: int, device: torch.device | str | None = None) -> Layout:
        """Positions start .. start + length - 1 of one document per row, as (1, length)."""
        positions = torch.arange(start, start + length, device=device).unsqueeze(0)
        return cls(positions, torch.zeros_like(positions), plain=True)

    @classmethod
    def of(cls, x: Tensor, layout: Layout | None) -> Layout:
        """`layout`, or the plain layout of `x` (B, L, ...) where none is given."""
        return cls.span(0, x.shape[1], x.device) if layout is None else layout

    @cached_property
    def pads(self) -> Tensor:
        """(B, L) bool, True where there is no token."""
        return self.segments < 0

    @cached_property
    def starts(self) -> Tensor:
        """(B, L) bool, True at the first token of every document fragment (and of every run of pads)."""
        changed = self.segments[:, 1:] != self.segments[:, :-1]
        return (
            torch.cat((torch.ones_like(changed[:, :1]), changed), dim=1)
            if self.segments.shape[1] > 1
            else (torch.ones_like(self.segments, dtype=torch.bool))
        )

    @cached_property
    def first(self) -> Tensor:
        """(B, L) int64, the earliest position each token may attend to; a pad attends to itself alone."""
        order = torch.arange(self.segments.shape[1], device=self.segments.device)
        begun = order.masked_fill(~self.starts, 0).cummax(dim=1).values
        return torch.where(self.pads, order, begun)

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, L, L) bool, True where the query (third axis) may attend to the key (fourth axis).

        Causal and inside one document; a pad attends to itself alone, because a row without any visible key
        would turn into NaN in the softmax.
        """
        length = self.segments.shape[1]
        order = torch.arange(length, device=self.segments.device)
        causal = order.unsqueeze(1) >= order.unsqueeze(0)
        same = self.segments.unsqueeze(2) == self.segments.unsqueeze(1)
        visible = causal & same & ~self.pads.unsqueeze(1)
        return (visible | torch.eye(length, dtype=torch.bool, device=order.device)).unsqueeze(1)

    @property
    def sight(self) -> tuple[Tensor | None, Tensor | None]:
        """`mask` and `first` as `attention` takes them: at most one, none where only the causal order counts.

        A GPU has use for the mask, which is then made once for all layers.
        """
        if self.plain:
            return None, None
        return (self.mask, None) if self.segments.is_cuda else (None, self.first)

    def angles(self, dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines (B, 1, L, dim / 2) of the positions, computed once per layout."""
        key = (dim, theta)
        if key not in self._angles:
            cos, sin = rope_angles(self.positions, dim, theta)
            self._angles[key] = (cos.unsqueeze(1), sin.unsqueeze(1))
        return self._angles[key]
