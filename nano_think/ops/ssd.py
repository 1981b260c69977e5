"""State-space duality (Dao and Gu, arXiv 2405.21060, section 6): a scan with one decay a head, as matmuls.

With scalar decays the outputs inside a chunk are a masked attention without softmax, and the chunks exchange one
state each, so that almost all work is matrix products and autograd's backward pass is linear in the length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """y[t] = H[t] C[t] with H[t] = exp(dt[t] A) H[t-1] + dt[t] x[t] B[t]^T for every head, and the last H.

    x: (B, L, heads, P); dt: (B, L, heads) >= 0; A: (heads,) < 0; B, C: (B, L, n), shared by the heads.
    starts: (B, L) bool, True where a document begins: H[t-1] counts as 0 there.
    state: (B, heads, P, n), H before the first position; None: zeros.
    Computes in fp32 (fp64 for fp64 inputs); y has the dtype of x.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, heads, width = x.shape
    if state is None:
        state = x.new_zeros(batch, heads, width, B.shape[-1])
    if starts is None:
        starts = torch.zeros(batch, length, dtype=torch.bool, device=x.device)
    chunk = min(chunk, length)
    with torch.autocast(x.device.type, enabled=False):
        x_c, dt_c, B_c, C_c = (_cut(tensor.to(dtype), chunk) for tensor in (x, dt, B, C))
        document = _cut(starts, chunk).cumsum(2)  # counted inside the chunk; 0 continues the chunk before
        drive = dt_c.unsqueeze(-1) * x_c
        between = _decays_between(dt_c * A.to(dtype), document)
        # Decay of what was there before the chunk, for every position of it.
        since_border = torch.exp((dt_c * A.to(dtype)).cumsum(2)) * (document == 0).unsqueeze(-1)
        inside = torch.einsum("bkin,bkjn->bkij", C_c, B_c).unsqueeze(2) * between
        y = torch.einsum("bkhij,bkjhp->bkihp", inside, drive)
        added = torch.einsum("bkhj,bkjhp,bkjn->bkhpn", between[:, :, :, -1], drive, B_c)
        borders, last = _pass_on(since_border[:, :, -1], added, state.to(dtype))
        y = y + torch.einsum("bkin,bkhpn->bkihp", C_c, borders) * since_border.unsqueeze(-1)
    return y.flatten(1, 2)[:, :length].to(x.dtype), last


def _cut(tensor: Tensor, chunk: int) -> Tensor:
    """(B, L, ...) to (B, chunks, chunk, ...); the zeros at the end have dt = 0 and move no state."""
    missing = -tensor.shape[1] % chunk
    padding = (0, 0) * (tensor.ndim - 2) + (0, missing)
    return F.pad(tensor, padding).unflatten(1, (-1, chunk))


def _decays_between(exponents: Tensor, document: Tensor) -> Tensor:
    """exp(sum of the exponents after j up to i) for i >= j in one document, else 0: (B, chunks, heads, i, j).

    Summed anew for every j: the difference of two cumulative sums would lose the small steps after a large one.
    """
    size = exponents.shape[2]
    order = torch.arange(size, device=exponents.device)
    later = order.unsqueeze(1) > order.unsqueeze(0)
    steps = exponents.transpose(2, 3).unsqueeze(-1).expand(-1, -1, -1, -1, size)
    sums = steps.masked_fill(~later, 0).cumsum(3)
    same = document.unsqueeze(3) == document.unsqueeze(2)
    visible = (later | torch.eye(size, dtype=torch.bool, device=order.device)) & same
    return torch.exp(sums) * visible.unsqueeze(2)


def _pass_on(decay: Tensor, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States in front of every chunk (B, chunks, heads, P, n) and behind the last."""
    borders = []
    for decay_k, added_k in zip(decay.unbind(1), added.unbind(1), strict=True):
        borders.append(state)
        state = decay_k[..., None, None] * state + added_k
    return torch.stack(borders, dim=1), state
