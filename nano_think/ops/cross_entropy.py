"""Cross-entropy of a linear head that never holds the logits of all tokens at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_think.ops.elementwise import gpu_kernels, kernels_for

IGNORED = -100
CHUNK, GPU_CHUNK = 1024, 4096
# A CPU takes the softmax in pieces of 4 MiB: they stay in the cache. Without a backward pass, logits come in such
# pieces too: the holes that larger ones leave in the heap once took an evaluation from 1 to 6 GB.
PIECE_ELEMENTS = 2**20


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None, uniform: bool = True
) -> Tensor:
    """-log softmax(hidden weight^T)[label] in nats, fp32, 0 where the label is -100.

    hidden: (..., d), weight: (V, d), labels: (...) int64; the result has the shape of `labels`.

    Tokens are taken `chunk` at a time (CHUNK, on a GPU GPU_CHUNK) and no logits are kept: the forward pass
    already forms the gradients of the plain sum of the losses (as Liger's kernels do, arXiv 2410.10989) and the
    backward pass scales them. That is exact for any weighting of the tokens towards `hidden`, and for an equal one
    towards `weight`; otherwise the backward pass computes the chunks again.
    uniform: say False where tokens will be weighted differently, to save the forward pass the vain attempt.
    Where no gradient is asked for, nothing is saved.
    Raises ValueError for labels that are no int64 and IndexError for one outside the vocabulary, but not on a
    GPU: to look would be to wait for it.
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, not {labels.dtype}")
    flat, targets = hidden.flatten(0, -2), labels.flatten()
    dtype = torch.get_autocast_dtype(hidden.device.type)
    dtype = dtype if torch.is_autocast_enabled(hidden.device.type) else weight.dtype
    chunk = chunk or (GPU_CHUNK if hidden.is_cuda else CHUNK)
    differentiated = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)

    def losses(rows: Tensor, targets: Tensor) -> Tensor:
        if differentiated:
            found: Tensor = _LinearCrossEntropy.apply(rows, weight, targets, dtype, chunk, uniform)
            return found
        few = min(chunk, max(1, PIECE_ELEMENTS // weight.shape[0])) if not hidden.is_cuda else chunk
        return _losses(rows.to(dtype), weight.to(dtype), targets, few)

    if _takes_unlabelled(hidden, dtype):
        return losses(flat, targets).view(labels.shape)
    labelled = (targets != IGNORED).nonzero().squeeze(1)
    nll = torch.zeros(labels.numel(), dtype=torch.float32, device=hidden.device)
    targets = targets[labelled]
    if not targets.is_cuda:
        _check_vocabulary(targets, len(weight))
    found = losses(flat.index_select(0, labelled), targets)
    return nll.index_copy(0, labelled, found).view(labels.shape)


def _check_vocabulary(targets: Tensor, vocab_size: int) -> None:
    """Raise IndexError for a label that no row of the head stands for: a kernel would read what lies beside it."""
    if len(targets):
        low, high = (int(end) for end in targets.aminmax())
        if low < 0 or high >= vocab_size:
            outside = low if low < 0 else high
            raise IndexError(f"label {outside} is outside of a vocabulary of {vocab_size} tokens")


def _takes_unlabelled(hidden: Tensor, dtype: torch.dtype) -> bool:
    """Whether tokens without a label go through the products too: to count the others is to wait for the GPU."""
    return dtype in (torch.float32, torch.bfloat16) and gpu_kernels(hidden) is not None


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same with all logits in memory, differentiated by autograd."""
    logits = F.linear(hidden.flatten(0, -2).to(weight.dtype), weight).float()
    nll = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view(labels.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses (T,) of hidden (T, d), head (V, d) and targets (T,); d loss / d logits = softmax - one-hot.

    Both sides are cast to `dtype` in here, so that the gradient of an fp32 head stays in the fp32 it is summed in.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        chunk: int,
        uniform: bool,
    ) -> Tensor:
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        for_weight &= uniform
        rows, head = hidden.to(dtype), weight.to(dtype)
        losses = rows.new_empty(len(rows), dtype=torch.float32)
        d_hidden = torch.empty_like(rows) if for_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        for part, d_logits in _logit_gradients(rows, head, targets, chunk, losses):
            if d_hidden is not None:
                torch.mm(d_logits, head, out=d_hidden[part])
            if d_weight is not None:
                _add_product(d_weight, d_logits, rows[part])
        ctx.save_for_backward(hidden, weight, targets, d_hidden, d_weight)
        ctx.dtype, ctx.chunk = dtype, chunk
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = (d_hidden * upstream.unsqueeze(1)).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            scale = None if d_weight is None else _common(upstream, targets)
            if scale is None:
                d_weight = _weighted(hidden.to(ctx.dtype), weight.to(ctx.dtype), targets, ctx.chunk, upstream)
            else:
                d_weight = d_weight * scale
            d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None


def _common(upstream: Tensor, targets: Tensor) -> Tensor | None:
    """The one weight of all labelled tokens, 0 where there are none; None where weights differ.

    The gradient of a sum is one number seen through strides of 0, which says so without its value being read: on
    a GPU to read is to wait for the whole forward pass.
    """
    if upstream.numel() and upstream.stride() == (0,):
        return upstream[0]
    low, high = _extremes(upstream, targets)
    if bool(low < high):
        return None
    return torch.where(low > high, 0.0, high)  # the first of no token


def _extremes(upstream: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest weight of a labelled token; infinity and its opposite where there is none."""
    low = upstream.masked_fill(targets == IGNORED, math.inf)
    high = upstream.masked_fill(targets == IGNORED, -math.inf)
    if not len(upstream):
        return upstream.new_tensor(math.inf), upstream.new_tensor(-math.inf)
    return low.amin(), high.amax()


def _weighted(rows: Tensor, head: Tensor, targets: Tensor, chunk: int, upstream: Tensor) -> Tensor:
    """The head's fp32 gradient (V, d) where every token has its own weight `upstream` (T,)."""
    d_weight = torch.zeros_like(head, dtype=torch.float32)
    for part, d_logits in _logit_gradients(rows, head, targets, chunk):
        _add_product(d_weight, d_logits.mul_(upstream[part].unsqueeze(1)), rows[part])
    return d_weight


def _logit_gradients(
    rows: Tensor, head: Tensor, targets: Tensor, chunk: int, losses: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk of tokens and its softmax - one-hot (chunk, V) in the dtype of `rows`; fills `losses` (T,).

    Products want large chunks, the softmax what fits the cache: it takes a few tokens of a chunk at a time. All
    buffers are used again, since writing to fresh memory costs more than the arithmetic done here.
    """
    few = max(1, PIECE_ELEMENTS // len(head)) if rows.device.type == "cpu" else chunk
    logits = rows.new_empty(min(chunk, len(rows)), len(head))
    small = (min(few, len(logits)), len(head))
    count = 0 if kernels_for(logits) is not None else 2
    buffers = [rows.new_empty(small, dtype=torch.float32) for _ in range(count)]
    for part in _parts(len(rows), chunk):
        z = logits[: len(targets[part])]
        with torch.autocast(rows.device.type, enabled=False):
            torch.mm(rows[part], head.T, out=z)
        pieces = zip(z.split(few), targets[part].split(few), strict=True)
        found = torch.cat([_softmax_minus_one_hot(piece, labels, buffers) for piece, labels in pieces])
        if losses is not None:
            losses[part] = found
        yield part, z


def _softmax_minus_one_hot(z: Tensor, labels: Tensor, buffers: list[Tensor]) -> Tensor:
    """Turn logits z (n, V) into softmax - one-hot of `labels` (n,) in place; their losses (n,), fp32."""
    kernels = kernels_for(z)
    if kernels is not None:
        losses: Tensor = kernels.softmax_minus_one_hot(z, labels)
        return losses
    logits, p = (buffer[: len(z)] for buffer in buffers)
    torch.softmax(logits.copy_(z), dim=-1, out=p)
    label = labels.unsqueeze(1)
    # The largest probability is 1 / sum exp(z - max z): the normaliser without another pass of exponentials.
    found = logits.amax(dim=-1) - p.amax(dim=-1).log() - logits.gather(1, label).squeeze(1)
    p.scatter_add_(1, label, torch.full_like(label, -1, dtype=p.dtype))
    z.copy_(p)
    return found


def _losses(rows: Tensor, head: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Losses (T,) alone."""
    losses = rows.new_empty(len(rows), dtype=torch.float32)
    for part in _parts(len(rows), chunk):
        with torch.autocast(rows.device.type, enabled=False):
            logits = F.linear(rows[part], head).float()
        losses[part] = F.cross_entropy(logits, targets[part], reduction="none")
    return losses


def _add_product(total: Tensor, d_logits: Tensor, rows: Tensor) -> None:
    """total (V, d) fp32 += d_logits^T rows."""
    with torch.autocast(rows.device.type, enabled=False):
        if rows.dtype == total.dtype:
            total.addmm_(d_logits.T, rows)
            return
        product = d_logits.T @ rows
    # a CPU widens a summand before it adds it: the whole one would be another table of fresh memory for each chunk
    few = max(1, PIECE_ELEMENTS // total.shape[1]) if total.device.type == "cpu" else len(total)
    for part in _parts(len(total), few):
        total[part].add_(product[part])


def _parts(length: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, length, chunk)]
