"""SSD, the mixer of Mamba-2 (Dao and Gu, arXiv 2405.21060, section 7): one decay a head, wider states."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_think.cache import RingState
from nano_think.nn.flops import Product, Reach, products_of
from nano_think.nn.mixers.s6 import init_conv, initial_step_bias
from nano_think.nn.norm import RMSNorm
from nano_think.ops.conv import causal_conv, extend_window
from nano_think.ops.layout import Layout
from nano_think.ops.ssd import CHUNK, ssd_scan


class SSD(nn.Module):
    """in_proj -> causal convolution of x, B, C -> SiLU -> ssd_scan -> gated RMSNorm -> out_proj.

    d_inner: channels of the scan, 2 d_model where not given, in heads of head_dim; d_state: size of B and C,
    which all heads share; d_conv: taps of the convolution. Raises ValueError if head_dim does not divide d_inner.
    """

    def __init__(
        self,
        d_model: int,
        d_inner: int | None = None,
        d_state: int = 64,
        d_conv: int = 4,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        self.d_inner, self.d_state, self.d_conv = d_inner or 2 * d_model, d_state, d_conv
        if self.d_inner % head_dim:
            raise ValueError(f"head_dim {head_dim} must divide d_inner {self.d_inner}")
        self.head_dim, self.num_heads = head_dim, self.d_inner // head_dim
        self.d_mixed = self.d_inner + 2 * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + self.d_mixed + self.num_heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.d_mixed, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(self.d_mixed))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = RMSNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        for parameter in (self.A_log, self.D, self.dt_bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initial values of everything but the Linears: -A uniform in [1, 16], D = 1, steps as in S6."""
        if self.A_log.is_meta:  # without numbers
            return
        init_conv(self.conv_weight, self.conv_bias)
        self.dt_bias.copy_(initial_step_bias(self.num_heads))
        self.A_log.uniform_(1, 16).log_()
        self.D.fill_(1)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(B, L, d_model) to the same shape; token t sees tokens <= t of its own document."""
        z, mixed, dt = self._split(self.in_proj(x))
        segments = None if layout.plain else layout.segments
        mixed = causal_conv(mixed, self.conv_weight, self.conv_bias, segments, silu=True)
        starts = None
        if not layout.plain:
            dt = dt.masked_fill(layout.pads.unsqueeze(-1), 0)  # a pad leaves the state as it is
            starts = layout.starts.expand(x.shape[:2])
        y, _ = self._scan(mixed, dt, starts)
        return self._project(y, z)

    def init_state(self, batch: int, max_len: int, max_rollback: int = 0) -> RingState:
        """The last d_conv - 1 inputs of the convolution and the fp32 state of every head."""
        weight = self.in_proj.weight
        shape = (batch, self.num_heads, self.head_dim, self.d_state)
        return RingState(
            max_rollback,
            window=weight.new_zeros(batch, self.d_mixed, self.d_conv - 1),
            scan=weight.new_zeros(shape, dtype=torch.float32),
        )

    def extend(self, x: Tensor, state: RingState) -> Tensor:
        """Read n new positions (B, n, d_model) after those in `state`."""
        z, mixed, dt = self._split(self.in_proj(x))
        history = extend_window(mixed, state["window"], self.d_conv)
        mixed = causal_conv(mixed, self.conv_weight, self.conv_bias, window=state["window"], silu=True)
        outputs = []
        for piece in state.pieces(x.shape[1]):
            y, scan = self._scan(mixed[:, piece], dt[:, piece], state=state["scan"])
            window = history[:, piece.stop : piece.stop + self.d_conv - 1].transpose(1, 2).clone()
            state.advance(piece.stop - piece.start, window=window, scan=scan)
            outputs.append(y)
        return self._project(torch.cat(outputs, dim=1), z)

    def products(self, reach: Reach) -> Iterator[Product]:
        """See `nano_think.nn.flops`. Of the scan what `ssd_scan` multiplies, the whole square of a chunk."""
        yield from products_of(self.in_proj, reach)
        yield Product(2.0 * self.d_conv * self.d_mixed, self.conv_weight, elementwise=True)
        for parameter in (self.conv_bias, self.dt_bias, self.A_log, self.D):
            yield Product(0.0, parameter)
        chunk = min(CHUNK, reach.length)
        padded = math.ceil(reach.length / chunk) * chunk / reach.length
        # scores inside the chunk, which the heads share, and what they mix
        yield Product(padded * 2.0 * chunk * self.d_state)
        yield Product(padded * 2.0 * chunk * self.d_inner)
        # what chunks take from the state before and add to it: in a single chunk there is nothing to learn of it
        single, states = reach.length <= CHUNK, padded * 2.0 * self.d_inner * self.d_state
        yield Product(states, factor="data" if single else "input")
        yield Product(states, recorded=not single)
        yield Product(states / chunk + 3.0 * self.d_inner, elementwise=True)
        yield from products_of(self.norm, reach)
        yield from products_of(self.out_proj, reach)

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate (B, L, d_inner), inputs of the convolution (B, L, d_mixed), step sizes (B, L, num_heads)."""
        z, mixed, dt = projected.split([self.d_inner, self.d_mixed, self.num_heads], dim=-1)
        return z, mixed, F.softplus(dt.float() + self.dt_bias)

    def _scan(
        self, mixed: Tensor, dt: Tensor, starts: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        u, B, C = mixed.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        u = u.unflatten(-1, (self.num_heads, self.head_dim))
        y, last = ssd_scan(u, dt, -torch.exp(self.A_log.float()), B, C, starts, state)
        return (y + self.D.unsqueeze(-1) * u).flatten(2), last

    def _project(self, y: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(self.norm(y * F.silu(z)))
