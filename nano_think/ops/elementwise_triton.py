"""The kernels between matrix products for GPUs, in Triton: each one pass over memory instead of five to ten.

Activations are fp32 or bf16, arithmetic and weights fp32, as in `elementwise.cpp`. Rows are independent. A sum
over rows (a norm's gain) is made in parts whose number is fixed, so that the order of the programs changes no bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements of a program's tile of rows
PIECE = 4096  # logits of a row taken at a time
PARTS = 512  # partial sums over rows
WARPS, HEAD_WARPS = 4, 8


def softmax_minus_one_hot(z: Tensor, labels: Tensor) -> Tensor:
    """Turn logits z (n, V) into softmax - one-hot of `labels` (n,) in place; their losses (n,), fp32.

    A label below 0 is none: its loss is 0 and so is its row of z afterwards.
    """
    losses = z.new_empty(len(z), dtype=torch.float32)
    if len(z):
        _head_losses[(len(z),)](z, labels, losses, z.shape[1], PIECE=PIECE, num_warps=HEAD_WARPS)
    return losses


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up."""
    out, n = torch.empty_like(gate), gate.numel()
    _gated_silu[(triton.cdiv(n, TILE),)](gate, up, out, n, TILE=TILE, num_warps=WARPS)
    return out


def gated_silu_gradients(gate: Tensor, up: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    d_gate, d_up, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    _gated_silu_gradients[(triton.cdiv(n, TILE),)](
        gate, up, upstream, d_gate, d_up, n, TILE=TILE, num_warps=WARPS
    )
    return d_gate, d_up


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight in `dtype`, and the inverse root (..., 1) in fp32; weight fp32."""
    out, inverse = torch.empty_like(x, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    rows, width, tile = _tiles(x)
    _norm[(triton.cdiv(rows, tile["R"]),)](
        x, x if weight is None else weight, out, inverse, rows, width, eps,
        GAIN=weight is not None, **tile, num_warps=WARPS,
    )  # fmt: skip
    return out, inverse


def rms_norm_gradients(
    x: Tensor, weight: Tensor | None, inverse: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of weight."""
    dx = torch.empty_like(x)
    rows, width, tile = _tiles(x)
    parts = max(1, min(PARTS, triton.cdiv(rows, tile["R"])))
    steps = triton.cdiv(rows, parts * tile["R"])
    d_weight = None if weight is None else weight.new_empty(parts, width)
    _norm_gradients[(parts,)](
        x, x if weight is None else weight, inverse, upstream, dx, x if d_weight is None else d_weight,
        rows, width, parts, steps, GAIN=weight is not None, **tile, num_warps=WARPS,
    )  # fmt: skip
    return dx, None if d_weight is None else d_weight.sum(dim=0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: int) -> Tensor:
    """x (B, H, L, D) turned by `sign` times the angles of cos and sin (B or 1, 1, L, D / 2); contiguous.

    x may be a view whose last dimension is contiguous; cos and sin are contiguous.
    """
    out = x.new_empty(x.shape)
    batch, heads, length, dim = x.shape
    rows, half = batch * heads * length, dim // 2
    width = triton.next_power_of_2(half)
    own = 0 if cos.shape[0] == 1 else length * half
    tile = max(1, TILE // width)
    _rotate[(triton.cdiv(rows, tile),)](
        x, cos, sin, out, rows, heads, length, half, own, *x.stride()[:3], float(sign),
        STEP=2 if interleaved else 1, R=tile, W=width, num_warps=WARPS,
    )  # fmt: skip
    return out


def _tiles(x: Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows, their width, and rows R by columns W of a program's tile."""
    width = x.shape[-1]
    columns = triton.next_power_of_2(width)
    return x.numel() // width, width, {"R": max(1, TILE // columns), "W": columns}


@triton.jit
def _sigmoid(v):
    e = tl.exp(-tl.abs(v))
    return tl.where(v < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _head_losses(z, labels, losses, n, PIECE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    own, k = z + row * n, tl.arange(0, PIECE)
    label = tl.load(labels + row)
    largest = tl.full((PIECE,), -float("inf"), tl.float32)
    total = tl.zeros((PIECE,), tl.float32)
    # every lane keeps a running maximum and the sum below it, joined at the end
    for start in range(0, n, PIECE):
        v = tl.load(own + start + k, mask=start + k < n, other=-float("inf")).to(tl.float32)
        above = tl.where(v > largest, v, largest)
        above = tl.where(v != v, v, above)  # a NaN stays one
        known = above > -float("inf")
        grown = total * tl.exp(tl.where(known, largest - above, 0.0)) + tl.exp(tl.where(known, v - above, v))
        total = tl.where(v != v, v, grown)
        largest = above
    top = tl.max(largest, 0)
    total = tl.sum(total * tl.exp(largest - top), 0)
    inverse = tl.where(label >= 0, 1.0 / total, 0.0)
    logit = tl.load(own + tl.maximum(label, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(label >= 0, top - logit + tl.log(total), 0.0))
    hit = tl.where(label >= 0, 1.0, 0.0)
    for start in range(0, n, PIECE):
        inside = start + k < n
        v = tl.load(own + start + k, mask=inside, other=0.0).to(tl.float32)
        p = tl.exp(v - top) * inverse - tl.where(start + k == label, hit, 0.0)
        tl.store(own + start + k, p, mask=inside)


@triton.jit
def _gated_silu(gate, up, out, n, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    g = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out + at, g * _sigmoid(g) * u, mask=at < n)


@triton.jit
def _gated_silu_gradients(gate, up, upstream, d_gate, d_up, n, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    g = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < n, other=0.0).to(tl.float32)
    d = tl.load(upstream + at, mask=at < n, other=0.0).to(tl.float32)
    opened = _sigmoid(g)
    tl.store(d_gate + at, d * u * opened * (1.0 + g * (1.0 - opened)), mask=at < n)
    tl.store(d_up + at, d * g * opened, mask=at < n)


@triton.jit
def _norm(x, weight, out, inverse, rows, width, eps, GAIN: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, W)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    root = 1.0 / tl.sqrt(tl.sum(v * v, 1) / width + eps)
    v *= root[:, None]
    if GAIN:
        v *= tl.load(weight + column, mask=column < width, other=0.0)[None, :]
    tl.store(out + at, v, mask=inside)
    tl.store(inverse + row, root, mask=row < rows)


@triton.jit
def _norm_gradients(
    x, weight, inverse, upstream, dx, d_weight, rows, width, parts, steps,
    GAIN: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    part, column = tl.program_id(0).to(tl.int64), tl.arange(0, W)
    gain = tl.load(weight + column, mask=column < width, other=0.0)[None, :] if GAIN else 1.0
    total = tl.zeros((R, W), tl.float32)
    for i in range(steps):
        row = (i * parts + part) * R + tl.arange(0, R)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        root = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
        normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * root
        d = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32)
        if GAIN:
            total += d * normed
            d *= gain
        mean = tl.sum(d * normed, 1) / width
        tl.store(dx + at, (d - normed * mean[:, None]) * root, mask=inside)
    if GAIN:
        tl.store(d_weight + part * width + column, tl.sum(total, 0), mask=column < width)


@triton.jit
def _rotate(
    x, cos, sin, out, rows, heads, length, half, own, row_step, head_step, step, sign,
    STEP: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    row, pair = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, W)
    inside = (row < rows)[:, None] & (pair < half)[None, :]
    t, head, batch = row % length, row // length % heads, row // (length * heads)
    gap = half if STEP == 1 else 1
    from_ = (batch * row_step + head * head_step + t * step)[:, None] + pair[None, :] * STEP
    to = row[:, None] * 2 * half + pair[None, :] * STEP
    angle = (batch * own + t * half)[:, None] + pair[None, :]
    c, s = (tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0) * sign)
    a = tl.load(x + from_, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + from_ + gap, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + to, a * c - b * s, mask=inside)
    tl.store(out + to + gap, b * c + a * s, mask=inside)
