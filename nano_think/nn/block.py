"""The residual block every stack is made of, and the entry that puts an expert into the shared space."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nano_think.cache import State
from nano_think.nn.norm import RMSNorm
from nano_think.ops.layout import Layout


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)); `ffn=None` leaves the second half out (state-space stacks).

    mixer, ffn: factories that receive `d_model`; a mixer offers forward, init_state and extend.
    """

    def __init__(
        self,
        d_model: int,
        mixer: Callable[..., nn.Module],
        ffn: Callable[..., nn.Module] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(d_model)
        self.mixer = mixer(d_model=d_model)
        self.ffn_norm: Any = RMSNorm(d_model) if ffn else None
        self.ffn: Any = ffn(d_model=d_model) if ffn else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(B, L, d_model) to the same shape."""
        return self._feed(x + self.dropout(self.mixer(self.mixer_norm(x, product_dtype(x)), layout)))

    def init_state(self, batch: int, max_len: int, max_rollback: int = 0) -> State:
        """The mixer's decode state: nothing else in a block looks back."""
        return self.mixer.init_state(batch, max_len, max_rollback)

    def extend(self, x: Tensor, state: State) -> Tensor:
        """(B, n, d_model) new positions after those in `state`."""
        return self._feed(x + self.mixer.extend(self.mixer_norm(x, product_dtype(x)), state))

    def _feed(self, x: Tensor) -> Tensor:
        return x if self.ffn is None else x + self.dropout(self.ffn(self.ffn_norm(x, product_dtype(x))))


def product_dtype(x: Tensor) -> torch.dtype:
    """What autocast would cast the norm's output to, once for every projection that reads it."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class ExpertInput(nn.Module):
    """Gain-free RMSNorm, then a square adaptor that starts as the identity.

    The norm makes an expert blind to the scale of what it is fed; the adaptor lets it turn the shared basis
    into its own without a private embedding table.

    adaptor: False leaves it out, so that the body reads the shared basis as it is.
    """

    def __init__(self, d_model: int, adaptor: bool = True) -> None:
        super().__init__()
        self.d_model = d_model
        self.norm = RMSNorm(d_model, gain=False)
        self.adaptor: nn.Module = nn.Linear(d_model, d_model, bias=False) if adaptor else nn.Identity()
        if isinstance(self.adaptor, nn.Linear):
            nn.init.eye_(self.adaptor.weight)

    @property
    def matrix(self) -> Tensor:
        """(d_model, d_model), what the adaptor multiplies with; the identity where it was left out."""
        if isinstance(self.adaptor, nn.Linear):
            return self.adaptor.weight
        return torch.eye(self.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) to the same shape."""
        return self.adaptor(self.norm(x, product_dtype(x)))


RESIDUAL_OUTPUTS = ("out_proj", "down_proj")


def init_blocks(blocks: nn.Module, num_layers: int, std: float = 0.02) -> None:
    """Normal init of every Linear; those that write into the residual stream are divided by sqrt(2 layers).

    Only weights are touched: biases may carry an init of their own (a step-size bias, a gate).
    """
    for name, module in blocks.named_modules():
        if isinstance(module, nn.Linear):
            scale = math.sqrt(2 * num_layers) if name.endswith(RESIDUAL_OUTPUTS) else 1.0
            with torch.no_grad():
                nn.init.normal_(module.weight, std=std / scale)
