"""S6, the selective state-space mixer of Mamba (Gu and Dao, arXiv 2312.00752, section 3.4 and algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_think.cache import RingState
from nano_think.nn.flops import Product, Reach, products_of
from nano_think.ops.conv import causal_conv, extend_window
from nano_think.ops.layout import Layout
from nano_think.ops.selective_scan import Backend, selective_scan

STEP_RANGE, STEP_FLOOR = (1e-3, 1e-1), 1e-4  # initial step sizes: log-uniform, and their smallest value


class Selection(NamedTuple):
    """What the inputs choose for themselves: raw step sizes (B, L, d_inner) and B, C (B, L, d_state).

    A step size is softplus(dt + dt_bias), taken inside the scan; one of -inf gives a step of 0.
    """

    dt: Tensor
    B: Tensor
    C: Tensor


class S6(nn.Module):
    """in_proj -> causal convolution -> SiLU -> selective scan -> SiLU gate -> out_proj.

    d_inner: channels of the scan, 2 d_model where not given; d_state: states a channel; d_conv: taps of the
    convolution; dt_rank: width of the step-size bottleneck, d_model / 16 rounded up where not given.
    backend: see `selective_scan`. gate=False leaves the gate branch out.

    The step-size projection is not an nn.Linear, because its init must survive a general init of all Linears:
    it decides over how many positions a channel remembers.
    """

    def __init__(
        self,
        d_model: int,
        d_inner: int | None = None,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int | None = None,
        backend: Backend = "auto",
        gate: bool = True,
    ) -> None:
        super().__init__()
        self.d_inner, self.d_state, self.d_conv = d_inner or 2 * d_model, d_state, d_conv
        self.dt_rank, self.backend, self.gate = dt_rank or math.ceil(d_model / 16), backend, gate
        self.in_proj = nn.Linear(d_model, (1 + gate) * self.d_inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.d_inner, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(self.d_inner))
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_weight = nn.Parameter(torch.empty(self.d_inner, self.dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(self.d_inner))
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        for parameter in (self.A_log, self.D, self.dt_bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initial values of everything but the three Linears.

        A = -1 .. -n for every channel (S4D-real), D = 1, steps softplus(dt_bias) log-uniform in [1e-3, 1e-1],
        uniform dt_weight in +-dt_rank^-1/2, convolution as torch's Conv1d.
        """
        if self.A_log.is_meta:  # without numbers
            return
        init_conv(self.conv_weight, self.conv_bias)
        self.dt_weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
        self.dt_bias.copy_(initial_step_bias(self.d_inner))
        self.A_log.copy_(torch.arange(1, self.d_state + 1).log().expand_as(self.A_log))
        self.D.fill_(1)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(B, L, d_model) to the same shape; token t sees tokens <= t of its own document."""
        u, z = self._split(self.in_proj(x))
        segments = None if layout.plain else layout.segments
        u = causal_conv(u, self.conv_weight, self.conv_bias, segments, silu=True)
        selection = self._select(u)
        starts = None
        if not layout.plain:
            # A step of 0 leaves the state exactly as it is: exp(0 A) = 1 and 0 B x = 0.
            pads = layout.pads.unsqueeze(-1)
            selection = selection._replace(dt=selection.dt.masked_fill(pads, -math.inf))
            starts = layout.starts.expand(x.shape[:2])
        y, _ = self._scan(u, selection, z, starts)
        return self.out_proj(y)

    def init_state(self, batch: int, max_len: int, max_rollback: int = 0) -> RingState:
        """The last d_conv - 1 inputs of the convolution and the fp32 scan state; `max_len` costs nothing."""
        weight = self.in_proj.weight
        return RingState(
            max_rollback,
            window=weight.new_zeros(batch, self.d_inner, self.d_conv - 1),
            scan=weight.new_zeros(batch, self.d_inner, self.d_state, dtype=torch.float32),
        )

    def extend(self, x: Tensor, state: RingState) -> Tensor:
        """Read n new positions (B, n, d_model) after those in `state`."""
        u, z = self._split(self.in_proj(x))
        history = extend_window(u, state["window"], self.d_conv)
        u = causal_conv(u, self.conv_weight, self.conv_bias, window=state["window"], silu=True)
        selection = self._select(u)
        outputs = []
        for piece in state.pieces(x.shape[1]):
            part = Selection(*(tensor[:, piece] for tensor in selection))
            gate = None if z is None else z[:, piece]
            y, scan = self._scan(u[:, piece], part, gate, state=state["scan"])
            window = history[:, piece.stop : piece.stop + self.d_conv - 1].transpose(1, 2).clone()
            state.advance(piece.stop - piece.start, window=window, scan=scan)
            outputs.append(y)
        return self.out_proj(torch.cat(outputs, dim=1))

    def products(self, reach: Reach) -> Iterator[Product]:
        """See `nano_think.nn.flops`. The scan is that of `reference_scan`, 6 d_inner d_state + 3 d_inner."""
        yield from products_of(self.in_proj, reach)
        yield Product(2.0 * self.d_conv * self.d_inner, self.conv_weight, elementwise=True)
        yield Product(0.0, self.conv_bias)
        yield from products_of(self.x_proj, reach)
        yield Product(2.0 * self.dt_rank * self.d_inner, self.dt_weight)
        for parameter in (self.dt_bias, self.A_log, self.D):
            yield Product(0.0, parameter)
        update = 4.0 * self.d_inner * self.d_state  # dt A, decay h, dt x B and the sum of both
        yield Product(update + 3.0 * self.d_inner, again=update, elementwise=True)
        yield Product(2.0 * self.d_inner * self.d_state)
        yield from products_of(self.out_proj, reach)

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.gate:
            return projected, None
        u, z = projected.chunk(2, dim=-1)
        return u, z

    def _select(self, u: Tensor) -> Selection:
        low, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return Selection(F.linear(low, self.dt_weight), B, C)

    def _scan(
        self,
        u: Tensor,
        selection: Selection,
        z: Tensor | None,
        starts: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        dt, B, C = selection
        A = -torch.exp(self.A_log.float())
        return selective_scan(u, dt, A, B, C, self.D, self.dt_bias, z, starts, state, self.backend)


def init_conv(weight: Tensor, bias: Tensor) -> None:
    """Uniform values as torch's Conv1d draws them, for a depthwise weight (d, K) and its bias (d,)."""
    bound = weight.shape[1] ** -0.5
    weight.uniform_(-bound, bound)
    bias.uniform_(-bound, bound)


def initial_step_bias(size: int) -> Tensor:
    """Biases (size,) whose softplus is log-uniform in STEP_RANGE."""
    low, high = (math.log(limit) for limit in STEP_RANGE)
    step = torch.empty(size).uniform_(low, high).exp().clamp(min=STEP_FLOOR)
    return step + torch.log(-torch.expm1(-step))  # the inverse of softplus
