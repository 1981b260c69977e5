"""The selective scan for GPUs, in Triton; the backward pass rebuilds the states of one chunk at a time.

A program walks the chunks of one row for a block of channels; inside a chunk the recurrence of one state is an
associative scan over the positions. The forward pass keeps the states at chunk borders alone. All arithmetic is
fp32, whatever the sequences are stored in. Softplus and gate are those of `selective_scan.cpp`.

Sums over channels, the gradients of B and C, are written a block and added afterwards: the result does not depend
on which program comes first.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nano_think.ops.native import rows
from nano_think.ops.scan_kernel import ScanGradients, ScanInputs

CHUNK, BLOCK = 64, 16  # positions and channels of a tile
FORWARD_WARPS, BACKWARD_WARPS = 4, 8  # the backward pass has more tiles to hold in registers


class TritonScan:
    """The `Kernel` for CUDA devices (and for CPU tensors where TRITON_INTERPRET=1); sequences in any float type.

    chunk, block: positions and channels of a tile, powers of 2.
    """

    def __init__(self, chunk: int = CHUNK, block: int = BLOCK) -> None:
        self.chunk, self.block = chunk, block

    def forward(
        self, inputs: ScanInputs, starts: Tensor | None, state: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        batch, length, channels = inputs.x.shape
        chunks = triton.cdiv(length, self.chunk)
        packed, state = _pack(inputs), state.contiguous()
        y = torch.empty(inputs.x.shape, dtype=inputs.x.dtype, device=inputs.x.device)
        last = torch.empty_like(state)
        borders = state.new_empty(batch, chunks, *state.shape[1:]) if keep else None
        _forward[(batch, triton.cdiv(channels, self.block))](
            *_arguments(packed, starts),
            state,
            y,
            last,
            borders if keep else last,
            *_sizes(packed),
            KEEP=keep,
            num_warps=FORWARD_WARPS,
            **self._constants(packed, starts),
        )
        return y, last, borders

    def backward(
        self, inputs: ScanInputs, starts: Tensor | None, borders: Tensor, dy: Tensor, dlast: Tensor
    ) -> ScanGradients:
        batch, length, channels = inputs.x.shape
        packed, n = _pack(inputs), inputs.A.shape[1]
        blocks = triton.cdiv(channels, self.block)
        x = packed.x
        dx, ddt, dz = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(3))
        dB, dC = (borders.new_empty(blocks, batch, length, n) for _ in range(2))
        dA, dD, dbias = (
            borders.new_empty(batch, *shape) for shape in ((channels, n), (channels,), (channels,))
        )
        dstate = torch.empty_like(dlast, memory_format=torch.contiguous_format)
        _backward[(batch, blocks)](
            *_arguments(packed, starts),
            borders,
            dy.contiguous(),
            dlast.contiguous(),
            *(dx, ddt, dA, dB, dC, dD, dbias, dz, dstate),
            *_sizes(packed),
            num_warps=BACKWARD_WARPS,
            **self._constants(packed, starts),
        )
        return ScanGradients(
            x=dx,
            dt=ddt,
            A=dA.sum(0),
            B=dB.sum(0).to(inputs.B.dtype),
            C=dC.sum(0).to(inputs.C.dtype),
            D=dD.sum(0),
            dt_bias=None if inputs.dt_bias is None else dbias.sum(0),
            z=None if inputs.z is None else dz,
            state=dstate,
        )

    def _constants(self, packed: ScanInputs, starts: Tensor | None) -> dict[str, Any]:
        return {
            "T": self.chunk,
            "W": self.block,
            "N": triton.next_power_of_2(packed.A.shape[1]),
            "GATED": packed.z is not None,
            "RAW": packed.dt_bias is not None,
            "STARTS": starts is not None,
        }


def _pack(inputs: ScanInputs) -> ScanInputs:
    """Sequences with regular rows, parameters contiguous."""
    x, dt, A, B, C, D, dt_bias, z = inputs
    bias = None if dt_bias is None else dt_bias.contiguous()
    gate = None if z is None else rows(z)
    return ScanInputs(rows(x), rows(dt), A.contiguous(), rows(B), rows(C), D.contiguous(), bias, gate)


def _arguments(packed: ScanInputs, starts: Tensor | None) -> list[Tensor]:
    """All tensors a kernel reads; what is absent is stood in for by x and not read."""
    marks = None if starts is None else starts.contiguous().view(torch.uint8)
    return [packed.x if tensor is None else tensor for tensor in (*packed, marks)]


def _sizes(packed: ScanInputs) -> tuple[int, ...]:
    sequences = (packed.x, packed.dt, packed.B, packed.C, packed.z)
    steps = (0 if tensor is None else tensor.stride(1) for tensor in sequences)
    _, length, channels = packed.x.shape
    return *steps, length, channels, packed.A.shape[1]


@triton.jit
def _compose(decay1, drive1, decay2, drive2):
    # After a decay of 0 nothing before is left, even if it is not finite.
    return decay1 * decay2, tl.where(decay2 == 0.0, drive2, decay2 * drive1 + drive2)


@triton.jit
def _sigmoid(v):
    e = tl.exp(-tl.abs(v))
    return tl.where(v < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _softplus(v):
    # log(1 + e) = 2 atanh(q), see simd.h
    e = tl.exp(-tl.abs(v))
    q = e / (2.0 + e)
    s = q * q
    series = 1.0 + s * (3.33332081e-1 + s * (2.00107637e-1 + s * (1.40009021e-1 + s * 1.40059965e-1)))
    return tl.maximum(v, 0.0) + 2.0 * q * series


@triton.jit
def _steps(dt, bias, at, step, channel, inside, RAW: tl.constexpr):
    """Step sizes (T, W), 0 outside, and their derivatives by dt."""
    raw = tl.load(dt + at[:, None] * step + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if RAW:
        raw += bias[None, :]
        return tl.where(inside, _softplus(raw), 0.0), _sigmoid(raw)
    else:
        return raw, tl.full(raw.shape, 1.0, tl.float32)


@triton.jit
def _begins(starts, at, inside, STARTS: tl.constexpr):
    if STARTS:
        return tl.load(starts + at, mask=inside, other=0) != 0
    else:
        return at < 0


@triton.jit
def _chunk_scan(s, drive, A, B, begins, before):
    """Decays and states (T, W) of one state of a chunk, what each position adds to it, from that in front (W,)."""
    decay = tl.where(begins[:, None], 0.0, tl.exp(s * A[None, :]))
    added = drive * B[:, None]
    whole, states = tl.associative_scan((decay, added), 0, _compose)
    return decay, added, tl.where(whole == 0.0, states, whole * before[None, :] + states)


@triton.jit
def _forward(
    x, dt, A, B, C, D, dt_bias, z, starts, state, y, last, borders,
    x_step, dt_step, B_step, C_step, z_step, length, channels, n,
    T: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
    GATED: tl.constexpr, RAW: tl.constexpr, STARTS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel, column, k = tl.program_id(1) * W + tl.arange(0, W), tl.arange(0, N), tl.arange(0, T)
    valid = channel < channels
    cells, kept = channel[:, None] * n + column[None, :], valid[:, None] & (column < n)[None, :]
    skip = tl.load(D + channel, mask=valid, other=0.0)
    bias = tl.load(dt_bias + channel, mask=valid, other=0.0) if RAW else skip
    carried = tl.load(state + row * channels * n + cells, mask=kept, other=0.0)
    chunks = tl.cdiv(length, T)
    for chunk in range(chunks):
        t = chunk * T + k
        here = t < length
        at = row * length + t
        inside = here[:, None] & valid[None, :]
        if KEEP:
            tl.store(borders + (row * chunks + chunk) * channels * n + cells, carried, mask=kept)
        u = tl.load(x + at[:, None] * x_step + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        s, _ = _steps(dt, bias, at, dt_step, channel, inside, RAW)
        begins = _begins(starts, at, here, STARTS)
        out, drive = u * skip[None, :], s * u
        for i in range(n):
            A_i = tl.load(A + channel * n + i, mask=valid, other=0.0)
            B_i = tl.load(B + at * B_step + i, mask=here, other=0.0).to(tl.float32)
            C_i = tl.load(C + at * C_step + i, mask=here, other=0.0).to(tl.float32)
            mine = (column == i)[None, :]
            before = tl.sum(tl.where(mine, carried, 0.0), 1)
            _, _, h = _chunk_scan(s, drive, A_i, B_i, begins, before)
            out += h * C_i[:, None]
            after = tl.sum(tl.where((k == T - 1)[:, None], h, 0.0), 0)
            carried = tl.where(mine, after[:, None], carried)
        if GATED:
            gate = tl.load(z + at[:, None] * z_step + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            out *= gate * _sigmoid(gate)
        tl.store(y + at[:, None] * channels + channel[None, :], out, mask=inside)
    tl.store(last + row * channels * n + cells, carried, mask=kept)


@triton.jit
def _backward(
    x, dt, A, B, C, D, dt_bias, z, starts, borders, dy, dlast,
    dx, ddt, dA, dB, dC, dD, dbias, dz, dstate,
    x_step, dt_step, B_step, C_step, z_step, length, channels, n,
    T: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
    GATED: tl.constexpr, RAW: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows_before = (block * tl.num_programs(0) + row) * length  # of this program's part of dB and dC
    channel, column, k = tl.program_id(1) * W + tl.arange(0, W), tl.arange(0, N), tl.arange(0, T)
    valid = channel < channels
    cells, kept = channel[:, None] * n + column[None, :], valid[:, None] & (column < n)[None, :]
    skip = tl.load(D + channel, mask=valid, other=0.0)
    bias = tl.load(dt_bias + channel, mask=valid, other=0.0) if RAW else skip
    carry = tl.load(dlast + row * channels * n + cells, mask=kept, other=0.0)
    A_sums = tl.zeros((W, N), tl.float32)
    D_sums, bias_sums = tl.zeros((W,), tl.float32), tl.zeros((W,), tl.float32)
    chunks = tl.cdiv(length, T)
    for back in range(chunks):
        chunk = chunks - 1 - back
        t = chunk * T + k
        here, follows = t < length, t + 1 < length
        at = row * length + t
        inside = here[:, None] & valid[None, :]
        u = tl.load(x + at[:, None] * x_step + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        s, slope = _steps(dt, bias, at, dt_step, channel, inside, RAW)
        s_next, _ = _steps(dt, bias, at + 1, dt_step, channel, follows[:, None] & valid[None, :], RAW)
        begins, begins_next = _begins(starts, at, here, STARTS), _begins(starts, at + 1, follows, STARTS)
        upstream = tl.load(dy + at[:, None] * channels + channel[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        through_gate = upstream
        if GATED:
            gate = tl.load(z + at[:, None] * z_step + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            opened = _sigmoid(gate)
            through_gate = upstream * opened * (1.0 + gate * (1.0 - opened))
            upstream = upstream * gate * opened
        out, drive = u * skip[None, :], s * u
        through_drive, through_decay = tl.zeros((T, W), tl.float32), tl.zeros((T, W), tl.float32)
        border = tl.load(borders + (row * chunks + chunk) * channels * n + cells, mask=kept, other=0.0)
        for i in range(n):
            A_i = tl.load(A + channel * n + i, mask=valid, other=0.0)
            B_i = tl.load(B + at * B_step + i, mask=here, other=0.0).to(tl.float32)
            C_i = tl.load(C + at * C_step + i, mask=here, other=0.0).to(tl.float32)
            mine = (column == i)[None, :]
            before = tl.sum(tl.where(mine, border, 0.0), 1)
            decay, added, h = _chunk_scan(s, drive, A_i, B_i, begins, before)
            out += h * C_i[:, None]
            # g[t] = C[t] dy[t] + decay[t + 1] g[t + 1]; what comes from behind the chunk enters at its end.
            arriving = tl.sum(tl.where(mine, carry, 0.0), 1)
            decay_next = tl.where(begins_next[:, None], 0.0, tl.exp(s_next * A_i[None, :]))
            own = upstream * C_i[:, None] + tl.where((k == T - 1)[:, None], arriving[None, :], 0.0)
            _, grad = tl.associative_scan((decay_next, own), 0, _compose, reverse=True)
            leaving = tl.where((k == 0)[:, None] & (decay != 0.0), decay * grad, 0.0)
            carry = tl.where(mine, tl.sum(leaving, 0)[:, None], carry)
            # The state in front of a position, decayed, is what the position did not add itself.
            change = tl.where(begins[:, None], 0.0, grad * (h - added))
            through_drive += grad * B_i[:, None]
            through_decay += change * A_i[None, :]
            A_sums += tl.where(mine, tl.sum(change * s, 0)[:, None], 0.0)
            tl.store(dB + (rows_before + t) * n + i, tl.sum(grad * drive, 1), mask=here)
            tl.store(dC + (rows_before + t) * n + i, tl.sum(h * upstream, 1), mask=here)
        ds = (u * through_drive + through_decay) * slope
        to = at[:, None] * channels + channel[None, :]
        tl.store(dx + to, skip[None, :] * upstream + s * through_drive, mask=inside)
        tl.store(ddt + to, ds, mask=inside)
        if GATED:
            tl.store(dz + to, through_gate * out, mask=inside)
        D_sums += tl.sum(upstream * u, 0)
        bias_sums += tl.sum(tl.where(inside, ds, 0.0), 0)
    tl.store(dA + row * channels * n + cells, A_sums, mask=kept)
    tl.store(dD + row * channels + channel, D_sums, mask=valid)
    tl.store(dbias + row * channels + channel, bias_sums, mask=valid)
    tl.store(dstate + row * channels * n + cells, carry, mask=kept)
