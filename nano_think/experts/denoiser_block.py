"""The network inside the diffuser: one stack of blocks, run as a clean and as a noisy stream.

The clean stream reads the context and leaves keys and values; the noisy stream carries one latent a position
and looks only at those keys and values, never at other latents. Its cost is that of one more query per
position, and one cache serves every denoising step (block size 1 of Arriola et al., arXiv 2503.09573).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_think.cache import Cache
from nano_think.nn.block import init_blocks, product_dtype
from nano_think.nn.ffn import SwiGLU
from nano_think.nn.flops import Product, Reach, attention_products, products_of
from nano_think.nn.mixers.attention import CausalSelfAttention
from nano_think.nn.norm import RMSNorm
from nano_think.ops.layout import Layout

KeysValues = tuple[Tensor, Tensor]


class WholeDocuments(Layout):
    """A layout in which a token attends to all of its document, later tokens included: good for analysis only."""

    @property
    def sight(self) -> tuple[Tensor | None, Tensor | None]:
        """A mask alone: `first` speaks of causal layouts."""
        return self.mask, None

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, L, L) bool, True inside one document; a pad attends to itself alone."""
        same = self.segments.unsqueeze(2) == self.segments.unsqueeze(1)
        itself = torch.eye(self.segments.shape[1], dtype=torch.bool, device=self.segments.device)
        return ((same & ~self.pads.unsqueeze(1)) | itself).unsqueeze(1)


class TimeEmbedding(nn.Module):
    """Noise level to a vector: 256 sinusoids, then two linear maps (arXiv 2006.11239, appendix B)."""

    def __init__(self, d_model: int, num_features: int = 256) -> None:
        super().__init__()
        self.num_features = num_features
        self.hidden = nn.Linear(num_features, d_model)
        self.output = nn.Linear(d_model, d_model)

    def forward(self, tau: Tensor) -> Tensor:
        """tau (...) to (..., d_model)."""
        half = self.num_features // 2
        exponents = torch.arange(half, dtype=torch.float32, device=tau.device) / half
        angles = tau.float().unsqueeze(-1) * 10_000.0**-exponents
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.hidden.weight.dtype)
        return self.output(F.silu(self.hidden(waves)))

    def products(self, reach: Reach) -> Iterator[Product]:
        """Of one noise level."""
        yield from products_of(self.hidden, reach, factor="data")
        yield from products_of(self.output, reach, factor="parameters")


class ModulatedBlock(nn.Module):
    """Attention and SwiGLU; the noise level shifts and scales their inputs and gates their outputs.

    The six modulation vectors are shared by all layers plus this layer's own `table` (adaLN-single of Chen et
    al., arXiv 2310.00426, after the zero-initialised gates of Peebles and Xie, arXiv 2212.09748).
    """

    def __init__(self, d_model: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(d_model)
        self.mixer = CausalSelfAttention(d_model, num_heads)
        self.ffn_norm = RMSNorm(d_model)
        self.ffn = SwiGLU(d_model, ffn_dim)
        self.table = nn.Parameter(torch.zeros(6, d_model))
        self.dropout = nn.Dropout(dropout)

    def keys_values(self, x: Tensor, modulation: Tensor, layout: Layout) -> KeysValues:
        """What the clean stream x (B, L, d_model) offers to the queries of both streams."""
        shift, scale = (modulation + self.table).unbind(-2)[:2]
        return self.mixer.keys_values(_modulated(self.mixer_norm, x, shift, scale), layout)

    def forward(self, x: Tensor, modulation: Tensor, layout: Layout, keys_values: KeysValues) -> Tensor:
        """x (B, L, d_model) and modulation (..., 6, d_model), broadcast over positions, to the shape of x."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (modulation + self.table).unbind(-2)
        queries = self.mixer.queries(_modulated(self.mixer_norm, x, shift, scale), layout)
        mixed = self.mixer.attend(queries, *keys_values, *layout.sight)
        x = torch.addcmul(x, gate, self.dropout(mixed))
        fed = self.ffn(_modulated(self.ffn_norm, x, ffn_shift, ffn_scale))
        return torch.addcmul(x, ffn_gate, self.dropout(fed))

    def key_value_products(self, reach: Reach) -> Iterator[Product]:
        """Of `keys_values`."""
        yield Product(0.0, self.table)
        for part in (self.mixer_norm, self.mixer.k_proj, self.mixer.v_proj):
            yield from products_of(part, reach)

    def products(self, reach: Reach) -> Iterator[Product]:
        """Of `forward`, which is given keys and values."""
        mixer = self.mixer
        for part in (self.mixer_norm, mixer.q_proj):
            yield from products_of(part, reach)
        yield from attention_products(reach, mixer.num_heads, mixer.head_dim, mixer.head_dim)
        for part in (mixer.out_proj, self.ffn_norm, self.ffn):
            yield from products_of(part, reach)


def _modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift, rounded once for all the products that read it."""
    return torch.addcmul(shift, norm(x), 1 + scale).to(product_dtype(x))


class TwoStreamDenoiser(nn.Module):
    """num_layers modulated blocks with shared weights in both streams; calling it is one noisy pass.

    Gates and output map start at zero: the first prediction is 0. With `self_cond` the noisy stream has one
    more input map, for the previous estimate of x0 (Chen et al., arXiv 2208.04202).
    """

    def __init__(
        self,
        d_model: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        train_T: int,
        self_cond: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.train_T = train_T
        self.context_in = nn.Linear(d_model, d_model, bias=False)
        self.latent_in = nn.Linear(d_model, d_model, bias=False)
        self.estimate_in = nn.Linear(d_model, d_model, bias=False) if self_cond else None
        self.time = TimeEmbedding(d_model)
        self.clean_code = nn.Parameter(torch.empty(d_model))
        self.modulation = nn.Linear(d_model, 6 * d_model)
        self.blocks = nn.ModuleList(
            ModulatedBlock(d_model, num_heads, ffn_dim, dropout) for _ in range(num_layers)
        )
        self.norm = RMSNorm(d_model)
        self.output = nn.Linear(d_model, d_model, bias=False)
        init_blocks(self, num_layers)
        nn.init.normal_(self.clean_code, std=0.02)
        for parameter in (*self.modulation.parameters(), *self.output.parameters()):
            nn.init.zeros_(parameter)

    def clean_stream(self, context: Tensor, layout: Layout, state: Cache | None = None) -> list[KeysValues]:
        """Keys and values of every layer for `context` (B, L, d_model), causal inside each document.

        With `state` they are appended to it, and those of all positions so far are returned.
        The last block stops there: nobody reads the clean stream's own output.
        """
        modulation = self._modulate(self.clean_code)
        streams, x = [], context
        for i, block in enumerate(self.blocks):
            keys_values = block.keys_values(x, modulation, layout)
            if state is not None:
                keys_values = state[i].append(key=keys_values[0], value=keys_values[1])
            streams.append(keys_values)
            if i < len(self.blocks) - 1:
                x = block(x, modulation, layout, keys_values)
        return streams

    def forward(
        self,
        x_tau: Tensor,
        tau: int | Tensor,
        context: Tensor,
        clean: list[KeysValues],
        layout: Layout,
        estimate: Tensor | None = None,
    ) -> Tensor:
        """One noisy pass: latents x_tau (B, L, d_model) at levels tau (), (B,) or (B, L) to a prediction."""
        x = context + self.latent_in(x_tau.to(context.dtype))
        if self.estimate_in is not None:
            estimate = torch.zeros_like(x_tau) if estimate is None else estimate
            x = x + self.estimate_in(estimate.to(context.dtype))
        modulation = self._level(tau, context.device)
        for block, keys_values in zip(self.blocks, clean, strict=True):
            x = block(x, modulation, layout, keys_values)
        return self.output(self.norm(x)).to(x_tau.dtype)

    def clean_products(self, reach: Reach) -> Iterator[Product]:
        """Of `clean_stream`."""
        yield Product(0.0, self.clean_code)
        yield from products_of(self.modulation, reach, reach.per_call, factor="parameters")
        for i, block in enumerate(self.blocks):
            yield from block.key_value_products(reach)
            if i < len(self.blocks) - 1:
                yield from products_of(block, reach)

    def pass_products(self, reach: Reach, levels: float = 1.0, drawn: bool = True) -> Iterator[Product]:
        """Of `forward`, one noisy pass, at so many noise levels a call.

        drawn: the latents are noise, or come from a pass without gradient.
        """
        for part in filter(None, (self.latent_in, self.estimate_in)):
            yield from products_of(part, reach, factor="data" if drawn else "input")
        yield from products_of(self.time, reach, levels * reach.per_call)
        yield from products_of(self.modulation, reach, levels * reach.per_call, factor="parameters")
        for part in (*self.blocks, self.norm, self.output):
            yield from products_of(part, reach)

    def _level(self, tau: int | Tensor, device: torch.device) -> Tensor:
        """Modulation (1 or B, 1 or L, 6, d_model) of noise levels."""
        tau = tau if isinstance(tau, Tensor) else torch.full((), tau, device=device)
        tau = tau.reshape(tau.shape + (1,) * (2 - tau.dim()))
        if tau.numel() <= self.train_T + 1:
            return self._modulate(self.time(tau))
        # fewer levels exist than are asked for: compute each once
        every = self._modulate(self.time(torch.arange(self.train_T + 1, device=device)))
        return F.embedding(tau, every.flatten(1)).unflatten(-1, every.shape[1:])

    def _modulate(self, code: Tensor) -> Tensor:
        return self.modulation(F.silu(code)).unflatten(-1, (6, -1))
