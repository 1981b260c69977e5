"""How attention reads memory slots: vectors from outside the sequence that some of its tokens may see.

Letters: B batch, L queries, H heads, D head_dim, U slot groups, k slots a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from nano_think.nn.flops import Product, Reach, products_of
from nano_think.nn.norm import RMSNorm

SlotReaderKind = Literal["shared", "own"]


class Slots(Protocol):
    """Vectors from outside the sequence that some of its tokens may attend to."""

    @property
    def values(self) -> Tensor:
        """(B, U, k, d_model)."""

    @property
    def valid(self) -> Tensor:
        """(B, U, k) bool, False at empty slots."""

    @property
    def index(self) -> Tensor:
        """(B, L) int64, the group whose slots a token sees, -1 for none."""

    @property
    def scores(self) -> Tensor | None:
        """(B, U, k) cosines of query and record, None where nothing was asked."""


class SlotReader(nn.Module):
    """The parameters with which attention reads memory slots, and the null slot that lets it look away.

    Every slot score carries a bias of its head that starts far below 0: a fresh memory barely disturbs a trained
    model, while gradients reach every part of it.
    """

    def __init__(self, d_model: int, num_heads: int, bias: float = -8.0) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.null = nn.Parameter(torch.empty(d_model).normal_(std=0.02))
        self.bias = nn.Parameter(torch.full((num_heads,), float(bias)))

    def forward(self, memory: Slots) -> Tensor:
        """Normed slot vectors (B, U k + 1, d_model), the null slot last."""
        # an empty slot may hold anything, and 0 x NaN would still be NaN
        values = memory.values.masked_fill(~memory.valid.unsqueeze(-1), 0.0).flatten(1, 2)
        null = self.null.expand(values.shape[0], 1, -1)
        return self.norm(torch.cat((values.to(null.dtype), null), dim=1))

    def products(self, reach: Reach) -> Iterator[Product]:
        """None: its parameters scale, stand in for a slot and shift scores."""
        yield from products_of(self.norm, reach)
        yield Product(0.0, self.null)
        yield Product(0.0, self.bias)


class OwnSlotReader(nn.Module):
    """Attention to the slots of a token's own group alone, with projections of its own, beside the one to tokens.

    score = q k / sqrt(D) + temperature cos + bias, 0 for the null slot, whose value is 0. A record is trusted by
    how near it is: with 10 and -8 a cosine of 0.8 is worth as much as looking away. The output projection starts
    at zero, so that a fresh reader changes nothing at all. Only the gathered slots are scored: the cost does not
    grow with the number of groups.
    """

    def __init__(self, d_model: int, num_heads: int, bias: float = -8.0, temperature: float = 10.0) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"num_heads {num_heads} must divide d_model {d_model}")
        self.num_heads = num_heads
        self.norm = RMSNorm(d_model)
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.bias = nn.Parameter(torch.full((num_heads,), float(bias)))
        self.temperature = nn.Parameter(torch.full((num_heads,), float(temperature)))

    def reset_parameters(self) -> None:
        """Values as they are and no output: what the block around it sets after its own initialisation."""
        with torch.no_grad():
            nn.init.eye_(self.v_proj.weight)
            nn.init.zeros_(self.out_proj.weight)

    def forward(self, x: Tensor, memory: Slots) -> Tensor:
        """What x (B, L, d_model) reads, of the same shape; zeros at tokens that see nothing."""
        weights, values = self._read(x, memory)
        mixed = torch.einsum("blhk,blkhd->blhd", weights[..., :-1], values)
        return self.out_proj(mixed.flatten(2))

    def mass(self, x: Tensor, memory: Slots) -> tuple[Tensor, Tensor]:
        """Attention (B, H, L) to the slots and to the null slot."""
        weights = self._read(x, memory)[0].transpose(1, 2)
        return weights[..., :-1].sum(dim=-1), weights[..., -1]

    def products(self, reach: Reach) -> Iterator[Product]:
        """See `nano_think.nn.flops`; nothing where no token sees a slot. The null slot is no vector here."""
        reading = float(reach.groups > 0)
        seen = reading * reach.slots
        if reach.causal:
            seen *= reach.readers * (1 - reach.chunk / reach.length)
        # first, as what comes of the slots has a gradient where the input of the queries has none
        yield from products_of(self.q_proj, reach, times=reading)
        yield from products_of(self.norm, reach)
        vectors = reach.readers * reach.groups * reach.slots / reach.length
        for part in (self.k_proj, self.v_proj):
            yield from products_of(part, reach, times=vectors, factor="parameters")
        for _ in ("scores", "mixed values"):
            yield Product(2.0 * self.q_proj.out_features * seen)
        yield from products_of(self.out_proj, reach, times=reading)
        for scale in (self.bias, self.temperature):
            yield Product(0.0, scale)

    def _read(self, x: Tensor, memory: Slots) -> tuple[Tensor, Tensor]:
        """Weights (B, L, H, k + 1), the null slot last, and the values (B, L, k, H, D) they are for."""
        rows = torch.arange(len(x), device=x.device).unsqueeze(1)
        group = memory.index.clamp_min(0)
        # an empty slot may hold anything, and 0 x NaN would still be NaN
        slots = self.norm(memory.values.masked_fill(~memory.valid.unsqueeze(-1), 0.0).to(self.bias.dtype))
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1))
        k, v = (
            proj(slots)[rows, group].unflatten(-1, (self.num_heads, -1))
            for proj in (self.k_proj, self.v_proj)
        )
        scores = torch.einsum("blhd,blkhd->blhk", q, k) / math.sqrt(q.shape[-1]) + self.bias.unsqueeze(-1)
        if memory.scores is not None:
            nearness = memory.scores[rows, group].to(scores.dtype)
            scores = scores + self.temperature.unsqueeze(-1) * nearness.unsqueeze(2)
        visible = memory.valid[rows, group] & (memory.index >= 0).unsqueeze(-1)
        scores = scores.masked_fill(~visible.unsqueeze(2), -math.inf)
        null = scores.new_zeros(*scores.shape[:-1], 1)
        return torch.cat((scores, null), dim=-1).softmax(dim=-1), v


def visible_slots(memory: Slots | None) -> Tensor | None:
    """(B, L, U k + 1) bool: valid slots of a token's own group, and the null slot where there is one.

    None where no token sees any slot: the caller then takes the path without memory, bit for bit.
    """
    if memory is None or memory.valid.numel() == 0:
        return None
    groups = torch.arange(memory.valid.shape[1], device=memory.index.device)
    own = memory.index.unsqueeze(-1) == groups
    visible = (own.unsqueeze(-1) & memory.valid.unsqueeze(1)).flatten(2)
    some = visible.any(dim=-1, keepdim=True)
    return torch.cat((visible, some), dim=-1) if bool(some.any()) else None
