"""The Transformer expert: a pre-norm causal decoder between the shared embedding and the shared head."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from nano_think.cache import Cache
from nano_think.nn.block import Block, ExpertInput, init_blocks
from nano_think.nn.ffn import SwiGLU
from nano_think.nn.mixers.attention import CausalSelfAttention
from nano_think.nn.norm import RMSNorm
from nano_think.ops.layout import Layout


class TransformerExpert(nn.Module):
    """num_layers blocks of rotary attention and SwiGLU; (B, L, d_model) in and out.

    The output is post-final-norm: its product with the embedding table is the expert's logits.
    mixer, ffn: block factories that receive d_model, rotary attention with num_heads heads and SwiGLU with
    ffn_dim inner units where none is given. adaptor: see `ExpertInput`.
    """

    def __init__(
        self,
        d_model: int = 384,
        num_layers: int = 6,
        num_heads: int = 6,
        ffn_dim: int = 1536,
        dropout: float = 0.1,
        mixer: partial | None = None,
        ffn: partial | None = None,
        adaptor: bool = True,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        mixer = mixer or partial(CausalSelfAttention, num_heads=num_heads)
        ffn = ffn or partial(SwiGLU, ffn_dim=ffn_dim)
        self.entry = ExpertInput(d_model, adaptor)
        self.blocks = nn.ModuleList(Block(d_model, mixer, ffn, dropout) for _ in range(num_layers))
        self.norm = RMSNorm(d_model)
        init_blocks(self.blocks, num_layers)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """(B, L, d_model) token vectors to post-norm hidden states of the same shape."""
        layout = Layout.of(x, layout)
        x = self.entry(x)
        for block in self.blocks:
            x = block(x, layout)
        return self.norm(x)

    def init_state(self, batch: int, max_len: int, max_rollback: int = 0) -> Cache:
        """Keys and values of every layer."""
        return Cache.stack([block.init_state(batch, max_len, max_rollback) for block in self.blocks])

    def extend(self, x: Tensor, state: Cache) -> Tensor:
        """Hidden states (B, n, d_model) of n new positions; `state` grows by them."""
        x = self.entry(x)
        for i, block in enumerate(self.blocks):
            x = block.extend(x, state[i])
        return self.norm(x)
