"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) that can also read memory slots.

Letters: B batch, L queries, S keys, H heads, D head_dim, r latent_dim, U slot groups, k slots a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nano_think.cache import AppendState
from nano_think.nn.flops import Product, Reach, attention_products, products_of
from nano_think.nn.mixers.attention import head_width
from nano_think.nn.norm import RMSNorm
from nano_think.nn.slots import OwnSlotReader, SlotReader, SlotReaderKind, Slots, visible_slots
from nano_think.ops.attention import attention, offset_causal_mask
from nano_think.ops.layout import Layout
from nano_think.ops.rope import RopeLayout, apply_rope

KeyValueKind = Literal["latent", "full", "seed_bottleneck"]
Entries = dict[str, Tensor]


class QKV(NamedTuple):
    """Queries (B, H, L, *), keys (B, H or 1, S, *) and values (B, H or 1, S, *)."""

    q: Tensor
    k: Tensor
    v: Tensor


class LatentHeads(nn.Module):
    """Keys and values expanded from one latent of r numbers a token; rotation in a key of its own.

    k_i = [W_uk_i c ; RoPE(W_kr x)] and v_i = W_uv_i c with c = RMSNorm(W_dkv x) (equations 9 to 19 without
    query compression). Only c and the rotated key, which all heads share, are cached: a rotation between
    W_q and W_uk would depend on position, and W_uk could not be moved to the query's side.
    """

    def __init__(
        self, d_model: int, num_heads: int, head_dim: int, latent_dim: int, rope_dim: int, rotation: Rotation
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.rope_dim, self.latent_dim = (
            num_heads,
            head_dim,
            rope_dim,
            latent_dim,
        )
        self.rotation = rotation
        self.q_proj = nn.Linear(d_model, num_heads * (head_dim + rope_dim), bias=False)
        self.latent_proj = nn.Linear(d_model, latent_dim, bias=False)
        self.latent_norm = RMSNorm(latent_dim)
        self.rope_key_proj = nn.Linear(d_model, rope_dim, bias=False)
        self.k_up_proj = nn.Linear(latent_dim, num_heads * head_dim, bias=False)
        self.v_up_proj = nn.Linear(latent_dim, num_heads * head_dim, bias=False)

    def queries(self, x: Tensor) -> Tensor:
        """Queries (B, H, L, D + rope_dim), not rotated yet."""
        return _split(self.q_proj(x), self.num_heads)

    def rotate(self, q: Tensor, layout: Layout) -> Tensor:
        """Rotate the last rope_dim coordinates of the queries."""
        content, rope = q.split((self.head_dim, self.rope_dim), dim=-1)
        return torch.cat((content, self.rotation(rope, layout)), dim=-1)

    def entries(self, x: Tensor, layout: Layout | None) -> Entries:
        """What is cached of x (B, S, d_model). Without a layout, x has no position: its rotary key is 0."""
        latent = self.latent_norm(self.latent_proj(x))
        if layout is None:
            return {"latent": latent, "rope_key": latent.new_zeros(*x.shape[:-1], self.rope_dim)}
        rope_key = self.rope_key_proj(x).unsqueeze(1)
        return {"latent": latent, "rope_key": self.rotation(rope_key, layout).squeeze(1)}

    def cache_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {"latent": (batch, self.latent_dim), "rope_key": (batch, self.rope_dim)}

    def expansion(self, reach: Reach, placed: bool = True) -> Iterator[Product]:
        """What a vector costs that becomes a key and a value of every head. placed: it has a position."""
        position = [self.rope_key_proj] if placed else []
        for part in (self.latent_proj, self.latent_norm, *position, self.k_up_proj, self.v_up_proj):
            yield from products_of(part, reach)

    @property
    def widths(self) -> tuple[int, int]:
        """Of a head's keys and values."""
        return self.head_dim + self.rope_dim, self.head_dim

    def expanded(self, q: Tensor, entries: Entries) -> QKV:
        """Keys and values of every head."""
        content = _split(self.k_up_proj(entries["latent"]), self.num_heads)
        rope_key = entries["rope_key"].unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        values = _split(self.v_up_proj(entries["latent"]), self.num_heads)
        return QKV(q, torch.cat((content, rope_key.to(content.dtype)), dim=-1), values)

    def absorbed(self, q: Tensor, entries: Entries) -> QKV:
        """The same scores with W_uk moved to the queries: the cache itself serves as keys and values."""
        content, rope = q.split((self.head_dim, self.rope_dim), dim=-1)
        k_up = self.k_up_proj.weight.unflatten(0, (self.num_heads, self.head_dim))
        q = torch.cat((content @ k_up, rope), dim=-1)
        # attention() divides by the root of the width it sees, the formula by that of the expanded width
        q = q * math.sqrt(q.shape[-1] / (self.head_dim + self.rope_dim))
        latent = entries["latent"].unsqueeze(1)
        return QKV(q, torch.cat((latent, entries["rope_key"].unsqueeze(1)), dim=-1), latent)

    def values_of(self, mixed: Tensor) -> Tensor:
        """Mixed latents (B, H, L, r) of the absorbed form to mixed values (B, H, L, D)."""
        v_up = self.v_up_proj.weight.unflatten(0, (self.num_heads, self.head_dim))
        return mixed @ v_up.transpose(1, 2)


class DirectHeads(nn.Module):
    """Ordinary keys and values, rotated on the whole head; `bottleneck` factorises W_k and W_v.

    Full-width rotated keys cannot be cached as latents, so the cache holds keys and values themselves.
    """

    def __init__(
        self, d_model: int, num_heads: int, head_dim: int, bottleneck: int | None, rotation: Rotation
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.rotation = num_heads, head_dim, rotation
        self.q_proj = nn.Linear(d_model, num_heads * head_dim, bias=False)
        self.k_proj = _projection(d_model, num_heads * head_dim, bottleneck)
        self.v_proj = _projection(d_model, num_heads * head_dim, bottleneck)

    def queries(self, x: Tensor) -> Tensor:
        """Queries (B, H, L, D), not rotated yet."""
        return _split(self.q_proj(x), self.num_heads)

    def rotate(self, q: Tensor, layout: Layout) -> Tensor:
        """Rotate all coordinates of the queries."""
        return self.rotation(q, layout)

    def entries(self, x: Tensor, layout: Layout | None) -> Entries:
        """Keys and values of x (B, S, d_model). Without a layout, x has no position: keys stay unrotated."""
        keys = _split(self.k_proj(x), self.num_heads)
        keys = keys if layout is None else self.rotation(keys, layout)
        return {"key": keys, "value": _split(self.v_proj(x), self.num_heads)}

    def cache_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        shape = (batch, self.num_heads, self.head_dim)
        return {"key": shape, "value": shape}

    def expansion(self, reach: Reach, placed: bool = True) -> Iterator[Product]:
        """What a vector costs that becomes a key and a value of every head."""
        yield from products_of(self.k_proj, reach)
        yield from products_of(self.v_proj, reach)

    @property
    def widths(self) -> tuple[int, int]:
        """Of a head's keys and values."""
        return self.head_dim, self.head_dim

    def expanded(self, q: Tensor, entries: Entries) -> QKV:
        """The entries as they are."""
        return QKV(q, entries["key"], entries["value"])

    def absorbed(self, q: Tensor, entries: Entries) -> QKV:
        """The entries as they are: there is no expansion to absorb."""
        return self.expanded(q, entries)

    def values_of(self, mixed: Tensor) -> Tensor:
        return mixed


class Rotation(nn.Module):
    """Rotary embedding of a fixed theta and coordinate layout."""

    def __init__(self, theta: float, layout: RopeLayout) -> None:
        super().__init__()
        self.theta, self.layout = theta, layout

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Rotate x (B, H, L, dim) by its positions."""
        return apply_rope(x, *layout.angles(x.shape[-1], self.theta), self.layout)


class LatentAttention(nn.Module):
    """Causal attention over a document and over the slots of an optional memory.

    kv: `latent` caches latent_dim + rope_dim numbers a token, `full` is ordinary rotary attention,
    `seed_bottleneck` squeezes keys and values through latent_dim each (both ignore rope_dim).
    latent_dim: d_model / 3 where not given. head_dim: d_model / num_heads. rope_dim: head_dim / 2, in
    addition to head_dim. memory: adds the parameters that read slots. slot_bias: what every head adds to the score
    of a slot, at the start. slot_reader: `shared` puts slots and tokens into one softmax and through the same
    projections, `own` reads slots apart, see `OwnSlotReader`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        latent_dim: int | None = None,
        head_dim: int | None = None,
        rope_dim: int | None = None,
        rope_theta: float = 10_000.0,
        rope_layout: RopeLayout = "half",
        kv: KeyValueKind = "latent",
        memory: bool = False,
        slot_bias: float = -8.0,
        slot_reader: SlotReaderKind = "shared",
    ) -> None:
        super().__init__()
        if slot_reader not in ("shared", "own"):
            raise ValueError(f"slot_reader must be shared or own, not {slot_reader!r}")
        head_dim = head_width(d_model, num_heads, head_dim)
        latent_dim = latent_dim or d_model // 3
        rope_dim = head_dim // 2 if rope_dim is None else rope_dim
        if kv == "latent" and rope_dim % 2:
            raise ValueError(f"rope_dim {rope_dim} (half of a head where it is not given) must be even")
        rotation = Rotation(rope_theta, rope_layout)
        self.heads: LatentHeads | DirectHeads
        if kv == "latent":
            self.heads = LatentHeads(d_model, num_heads, head_dim, latent_dim, rope_dim, rotation)
        elif kv in ("full", "seed_bottleneck"):
            bottleneck = latent_dim if kv == "seed_bottleneck" else None
            self.heads = DirectHeads(d_model, num_heads, head_dim, bottleneck, rotation)
        else:
            raise ValueError(f"kv must be latent, full or seed_bottleneck, not {kv!r}")
        self.out_proj = nn.Linear(num_heads * head_dim, d_model, bias=False)
        reader = SlotReader if slot_reader == "shared" else OwnSlotReader
        self.slots: Any = reader(d_model, num_heads, slot_bias) if memory else None

    @property
    def reads_apart(self) -> bool:
        """Whether slots are read by parameters of their own: training those alone leaves the rest as it was."""
        return isinstance(self.slots, OwnSlotReader)

    def forward(self, x: Tensor, layout: Layout, memory: Slots | None = None) -> Tensor:
        """(B, L, d_model) to the same shape; token t sees tokens <= t of its document and its own slots."""
        return self._attend(x, layout, self.heads.entries(x, layout), memory)

    def init_state(self, batch: int, max_len: int, max_rollback: int = 0) -> AppendState:
        """Room for what `entries` caches; any rollback is possible, so `max_rollback` asks for nothing."""
        return AppendState.empty(max_len, self.out_proj.weight, **self.heads.cache_shapes(batch))

    def extend(
        self, x: Tensor, state: AppendState, memory: Slots | None = None, absorbed: bool | None = None
    ) -> Tensor:
        """Read n new positions (B, n, d_model) after those in `state`; memory.index is (B, n).

        absorbed: attend to the latents themselves instead of expanding all keys and values of the past. It
        needs less memory and more arithmetic a query, so it is the default for a single position.
        """
        layout = state.layout(x.shape[1], x.device)
        entries = self.heads.entries(x, layout)
        entries = dict(zip(entries, state.append(**entries), strict=True))
        return self._attend(x, layout, entries, memory, x.shape[1] == 1 if absorbed is None else absorbed)

    @torch.no_grad()
    def slot_mass(self, x: Tensor, layout: Layout, memory: Slots) -> tuple[Tensor, Tensor]:
        """Share of every head's attention (B, H, L) that goes to real slots, and to the null slot."""
        visible = visible_slots(memory)
        q = self.heads.queries(x)
        if visible is not None and self.reads_apart:
            return self.slots.mass(x, memory)
        if visible is None:
            nothing = q.new_zeros(q.shape[:3])
            return nothing, nothing
        tokens = self.heads.expanded(self.heads.rotate(q, layout), self.heads.entries(x, layout))
        slots = self.heads.expanded(q, self.heads.entries(self._reader()(memory), None))
        weights = self._weights(tokens, slots, layout.mask, visible)[..., -visible.shape[-1] :]
        return weights[..., :-1].sum(dim=-1), weights[..., -1]

    def products(self, reach: Reach) -> Iterator[Product]:
        """See `nano_think.nn.flops`; of whole sequences, which expand every latent."""
        (width, value_width), num_heads = self.heads.widths, self.heads.num_heads
        yield from products_of(self.heads.q_proj, reach)
        yield from self.heads.expansion(reach)
        yield from attention_products(reach, num_heads, width, value_width)
        if self.reads_apart:
            yield from products_of(self.out_proj, reach)
            yield from products_of(self.slots, reach)
            return
        if self.slots is not None:
            yield from products_of(self.slots, reach)
            for product in self.heads.expansion(reach, placed=False):
                yield replace(product, flops=reach.slot_vectors * product.flops)
            yield Product(2.0 * num_heads * width * reach.slot_keys)
            yield Product(2.0 * num_heads * value_width * reach.slot_keys)
        yield from products_of(self.out_proj, reach)

    def _attend(
        self,
        x: Tensor,
        layout: Layout,
        entries: Entries,
        memory: Slots | None,
        absorbed: bool = False,
    ) -> Tensor:
        form = self.heads.absorbed if absorbed else self.heads.expanded
        q = self.heads.queries(x)
        tokens = form(self.heads.rotate(q, layout), entries)
        visible = None if self.reads_apart else visible_slots(memory)
        if memory is None or visible is None:
            mask, first = layout.sight
            mixed = attention(*tokens, mask, causal=mask is None, first=first)
        else:
            # slots have no position, so they meet the queries before rotation
            slots = form(q, self.heads.entries(self._reader()(memory), None))
            num_keys = tokens.k.shape[2]
            seen = offset_causal_mask(x.shape[1], num_keys, x.device) if layout.plain else layout.mask
            weights = self._weights(tokens, slots, seen, visible)
            mixed = weights @ torch.cat((tokens.v, slots.v.to(tokens.v.dtype)), dim=2)
        if absorbed:
            mixed = self.heads.values_of(mixed)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if (
            self.reads_apart
            and memory is not None
            and memory.valid.numel()
            and bool((memory.index >= 0).any())
        ):
            out = out + self.slots(x, memory)
        return out

    def _weights(self, tokens: QKV, slots: QKV, mask: Tensor, visible: Tensor) -> Tensor:
        """One softmax (B, H, L, S + U k + 1) over tokens and slots."""
        scale = 1 / math.sqrt(tokens.q.shape[-1])
        scores = (tokens.q @ tokens.k.transpose(-2, -1) * scale).masked_fill(~mask, -math.inf)
        slot_scores = slots.q @ slots.k.transpose(-2, -1) * scale + self._reader().bias.view(-1, 1, 1)
        slot_scores = slot_scores.masked_fill(~visible.unsqueeze(1), -math.inf)
        return torch.cat((scores, slot_scores.to(scores.dtype)), dim=-1).softmax(dim=-1)

    def _reader(self) -> SlotReader:
        if self.slots is None:
            raise ValueError("this attention was built without memory; build it with memory=True")
        return self.slots


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, L, H D) to (B, H, L, D)."""
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)


def _projection(d_in: int, d_out: int, bottleneck: int | None) -> nn.Module:
    if bottleneck is None:
        return nn.Linear(d_in, d_out, bias=False)
    return nn.Sequential(nn.Linear(d_in, bottleneck, bias=False), nn.Linear(bottleneck, d_out, bias=False))
