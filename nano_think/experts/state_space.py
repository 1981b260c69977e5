"""The state-space expert: S6 blocks between the shared embedding and the shared head, linear in the length."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from nano_think.cache import Cache
from nano_think.nn.block import Block, ExpertInput, init_blocks
from nano_think.nn.mixers.s6 import S6
from nano_think.nn.norm import RMSNorm
from nano_think.ops.layout import Layout


class StateSpaceExpert(nn.Module):
    """num_layers blocks of one selective state-space mixer each; (B, L, d_model) in and out.

    The output is post-final-norm: its product with the embedding table is the expert's logits.
    mixer: block factory that receives d_model, S6 with d_inner channels, d_state states a channel and d_conv
    convolution taps where none is given. adaptor: see `ExpertInput`.
    """

    def __init__(
        self,
        d_model: int = 384,
        num_layers: int = 6,
        d_inner: int = 768,
        d_state: int = 16,
        d_conv: int = 4,
        dropout: float = 0.1,
        mixer: partial | None = None,
        adaptor: bool = True,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        mixer = mixer or partial(S6, d_inner=d_inner, d_state=d_state, d_conv=d_conv)
        self.entry = ExpertInput(d_model, adaptor)
        self.blocks = nn.ModuleList(Block(d_model, mixer, dropout=dropout) for _ in range(num_layers))
        self.norm = RMSNorm(d_model)
        init_blocks(self.blocks, num_layers)
        # init_blocks expects two writers into the residual stream a layer; these blocks have one.
        with torch.no_grad():
            for name, parameter in self.blocks.named_parameters():
                if name.endswith("out_proj.weight"):
                    parameter.mul_(math.sqrt(2))

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """(B, L, d_model) token vectors to post-norm hidden states of the same shape."""
        layout = Layout.of(x, layout)
        x = self.entry(x)
        for block in self.blocks:
            x = block(x, layout)
        return self.norm(x)

    def init_state(self, batch: int, max_len: int, max_rollback: int = 0) -> Cache:
        """Convolution windows and scan states of every layer; their size does not depend on `max_len`."""
        return Cache.stack([block.init_state(batch, max_len, max_rollback) for block in self.blocks])

    def extend(self, x: Tensor, state: Cache) -> Tensor:
        """Hidden states (B, n, d_model) of n new positions; `state` moves on by them."""
        x = self.entry(x)
        for i, block in enumerate(self.blocks):
            x = block.extend(x, state[i])
        return self.norm(x)
