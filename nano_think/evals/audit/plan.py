"""With which tokens and tolerances the checks work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from nano_think.ops.layout import Layout
from nano_think.ops.seeding import mixed_seed


@dataclass(frozen=True)
class Plan:
    """Sizes of the audit.

    rows, length: of the tokens. A length that is no dimension of the model keeps traces unambiguous.
    border: where something begins anew (memory chunks, scan chunks); positions around it are visited.
    tolerance: largest distance, relative to the root mean square, that rounding may cause between two
    computations of one value, or more where the model makes more of it (`compare.rounding`); what is computed
    twice in the same way must agree bit for bit.
    """

    vocab_size: int
    rows: int = 2
    length: int = 53
    border: int = 16
    tolerance: float = 1e-4
    seed: int = 0

    def generator(self, *salt: int) -> torch.Generator:
        """A generator of its own for every purpose."""
        return torch.Generator().manual_seed(mixed_seed(self.seed, *salt))

    def tokens(self, salt: int = 0, rows: int | None = None, length: int | None = None) -> Tensor:
        """Random tokens (B, L)."""
        shape = (self.rows if rows is None else rows, self.length if length is None else length)
        return torch.randint(self.vocab_size, shape, generator=self.generator(1, salt))

    def other(self, tokens: Tensor, t: int) -> Tensor:
        """`tokens` with another one at t, a new choice in each row."""
        changed = tokens.clone()
        step = torch.arange(1, len(tokens) + 1) % (self.vocab_size - 1) + 1
        changed[:, t] = (changed[:, t] + step) % self.vocab_size
        return changed

    def positions(self) -> list[int]:
        """Where a token is changed or a prefix ends: the ends, the middle, and around two borders."""
        wanted = {1, self.length // 2, self.length - 1}
        for border in (self.border, 2 * self.border):
            wanted |= {border - 1, border, border + 1}
        return sorted(t for t in wanted if 0 < t < self.length)

    def documents(self) -> list[list[int]]:
        """Lengths of the documents packed into each row; what is left of a row is padding."""
        third = self.length // 3
        return [[third + 1, 1, third - 3], [2, self.length - 2 - third, third]][: self.rows] + [
            [self.length - 2]
        ] * max(0, self.rows - 2)

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """Row, begin and end of each of the `documents`."""
        for row, lengths in enumerate(self.documents()):
            ends = list(accumulate(lengths))
            yield from ((row, end - length, end) for length, end in zip(lengths, ends, strict=True))

    def packed(self) -> Layout:
        """The layout of `documents`."""
        positions = torch.zeros(self.rows, self.length, dtype=torch.int64)
        segments = torch.full_like(positions, -1)
        for row, begin, end in self.spans():
            positions[row, begin:end] = torch.arange(end - begin)
            segments[row, begin:end] = segments[row].max() + 1
        return Layout(positions, segments)
