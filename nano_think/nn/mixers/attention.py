"""Causal multi-head self-attention with rotary positions and optional grouped keys and values."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from nano_think.cache import AppendState
from nano_think.nn.flops import Product, Reach, attention_products, products_of
from nano_think.ops.attention import attention
from nano_think.ops.layout import Layout
from nano_think.ops.rope import RopeLayout, apply_rope


def head_width(d_model: int, num_heads: int, head_dim: int | None = None) -> int:
    """Coordinates a head: `head_dim`, or the equal share of d_model.

    Raises ValueError where there is none, or it is odd: rotary embedding turns pairs.
    """
    if head_dim is None and d_model % num_heads:
        raise ValueError(f"num_heads {num_heads} must divide d_model {d_model}")
    head_dim = head_dim or d_model // num_heads
    if head_dim % 2:
        raise ValueError(
            f"{num_heads} heads of {head_dim} coordinates: a head must have an even number of them"
        )
    return head_dim


class CausalSelfAttention(nn.Module):
    """Attention over the earlier tokens of the same document.

    num_kv_heads < num_heads shares keys and values among groups of heads (arXiv 2305.13245).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        rope_theta: float = 10_000.0,
        rope_layout: RopeLayout = "half",
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim = head_width(d_model, num_heads, head_dim)
        self.rope_theta, self.rope_layout = rope_theta, rope_layout
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {num_kv_heads} must divide num_heads {num_heads}")
        self.q_proj = nn.Linear(d_model, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, self.num_kv_heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, d_model, bias=False)

    def queries(self, x: Tensor, layout: Layout) -> Tensor:
        """Rotated queries (B, H, L, head_dim) of x (B, L, d_model)."""
        return self._rotate(self._split(self.q_proj(x), self.num_heads), layout)

    def keys_values(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Rotated keys and plain values, (B, num_kv_heads, L, head_dim) each."""
        keys = self._rotate(self._split(self.k_proj(x), self.num_kv_heads), layout)
        return keys, self._split(self.v_proj(x), self.num_kv_heads)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, first: Tensor | None = None
    ) -> Tensor:
        """Mix values and project back to (B, L, d_model); without mask, causal with aligned ends."""
        mixed = attention(q, k, v, mask, causal=mask is None, first=first)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(B, L, d_model) to the same shape; token t sees tokens <= t of its own document."""
        k, v = self.keys_values(x, layout)
        return self.attend(self.queries(x, layout), k, v, *layout.sight)

    def init_state(self, batch: int, max_len: int, max_rollback: int = 0) -> AppendState:
        """Room for keys and values; any rollback is possible, so `max_rollback` asks for nothing."""
        shape = (batch, self.num_kv_heads, self.head_dim)
        return AppendState.empty(max_len, self.q_proj.weight, key=shape, value=shape)

    def extend(self, x: Tensor, state: AppendState) -> Tensor:
        """Read n new positions (B, n, d_model) after those in `state`."""
        layout = state.layout(x.shape[1], x.device)
        k, v = self.keys_values(x, layout)
        k, v = state.append(key=k, value=v)
        return self.attend(self.queries(x, layout), k, v, *layout.sight)

    def products(self, reach: Reach) -> Iterator[Product]:
        """See `nano_think.nn.flops`."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            yield from products_of(projection, reach)
        yield from attention_products(reach, self.num_heads, self.head_dim, self.head_dim)
        yield from products_of(self.out_proj, reach)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

    def _rotate(self, x: Tensor, layout: Layout) -> Tensor:
        return apply_rope(x, *layout.angles(self.head_dim, self.rope_theta), self.rope_layout)
