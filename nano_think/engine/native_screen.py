"""The head's likeliest tokens alone, `native_screen.h`: its coarse copy, and log-probabilities taken later."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_think.engine.native_library import COLUMNS, LANES, PANEL, Packer, Precision, load_library
from nano_think.ops.native import threads

if TYPE_CHECKING:
    from nano_think.engine.native_step import NativeStep

# Most tokens that may be asked for, as a share of the vocabulary's panels: a bound is found among those.
MOST = 0.5
# Panels that are compared with what they stand for while both are in the cache.
STRIP = 8
# Steps whose logits the head reads out at once.
TOGETHER = 48


class Screen:
    """An int8 copy of a head (V, d_model) as a precision keeps it, and by how much it can be wrong.

    weights: packed bytes. errors: fp32, padded to whole vectors: a coarse logit of row i differs from the exact
    one by at most errors[i] |x|, by the inequality of Cauchy and Schwarz, with room for the rounding of x to 15
    bits and of both sums. Rows of padding have no bound, so that they are never likely.
    """

    def __init__(self, head: Tensor, precision: Precision) -> None:
        packer = Packer("int8")
        packer.matrix(head)
        self.weights = packer.finish()
        size, panels = head.shape[1], self.weights.view(-(-len(head) // PANEL), -1)
        rounding = 4 * size * 2.0**-24 + math.sqrt(size) / 32_000
        errors = []
        for rows, packed in zip(head.split(STRIP * PANEL), panels.split(STRIP), strict=True):
            kept = rows.bfloat16().float() if precision == "bf16" else rows
            apart = (kept - unpacked(packed, *rows.shape)).norm(dim=1)
            # a thousandth for the rounding of these norms
            errors.append(1.001 * (apart + rounding * (kept.norm(dim=1) + apart)))
        self.errors = F.pad(torch.cat(errors), (0, -len(head) % LANES), value=math.inf)


def unpacked(packed: Tensor, rows: int, cols: int) -> Tensor:
    """What int8 bytes of `Packer` stand for, (rows, cols): of a panel scales, then four columns of each row."""
    panels = packed.view(-(-rows // PANEL), -1)
    scales = panels[:, : 4 * PANEL].contiguous().view(torch.float32)
    numbers = (
        panels[:, 4 * PANEL :].view(len(panels), -1, PANEL, COLUMNS).transpose(1, 2).flatten(2).float() - 128
    )
    return (numbers * scales.unsqueeze(-1)).flatten(0, 1)[:rows, :cols]


def pays(best: int, rows: int, precision: Precision, vocab_size: int) -> bool:
    """Whether a step of so many rows is faster with a screen: the head is read for one, and has more bytes."""
    panels = vocab_size / PANEL
    return rows == 1 and precision != "int8" and best <= MOST * panels and bool(load_library().screens())


class LateLogprobs:
    """Log-probabilities of tokens drawn from screened logits of a step of one row, (n,) at a time.

    They need the logits of all tokens. The head gives them for many steps at one reading, with the bits it would
    have given at each.
    """

    def __init__(self, step: NativeStep, banned: Tensor, logprobs: list[float]) -> None:
        self._step, self._banned, self._logprobs = step, banned, logprobs
        self._hidden: list[Tensor] = []
        self._tokens: list[int] = []

    def add(self, token: int) -> None:
        """The token drawn after the last step; the last entry of the list, any number, is to be its."""
        self._hidden.append(self._step.hidden.clone())
        self._tokens.append(token)
        if len(self._tokens) == TOGETHER:
            self.settle()

    def settle(self) -> None:
        """Put the right numbers into the list."""
        if not self._tokens:
            return
        logits = self._step.read_out(torch.stack(self._hidden)).index_fill_(-1, self._banned, -math.inf)
        tokens, values = torch.tensor(self._tokens), torch.empty(len(logits), dtype=torch.float64)
        described = logits.data_ptr(), *logits.shape, logits.stride(0)
        load_library().token_logprobs(*described, tokens.data_ptr(), values.data_ptr(), threads())
        self._logprobs[-len(tokens) :] = values.tolist()
        self._hidden, self._tokens = [], []
