"""Multi-head latent attention as the shared context, and the router that decides whom to trust from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_think.cache import AppendState, RingState
from nano_think.nn.block import init_blocks
from nano_think.nn.flops import Product, Reach
from nano_think.nn.mixers.latent_attention import KeyValueKind, LatentAttention
from nano_think.nn.norm import RMSNorm
from nano_think.nn.pools import Pool, RunningMean, Sums, WholeDocument, WindowMean
from nano_think.nn.slots import SlotReaderKind, Slots
from nano_think.ops.layout import Layout
from nano_think.ops.rope import RopeLayout

PostNorm = Literal["none", "rms", "layer"]
PoolKind = Literal["cummean", "token", "ema", "window", "cummean+token", "prefix", "sequence"]


class MultiHeadLatentAttention(nn.Module):
    """context = e + W_o attention(RMSNorm(e), memory slots), W_o starting at zero so that context = e.

    latent_dim, head_dim, rope_dim, kv, memory, slot_bias, slot_reader: see `LatentAttention`.
    post_norm: a norm behind the residual; `layer` is the seeds' LayerNorm, which moves the experts' input.
    """

    def __init__(
        self,
        d_model: int = 384,
        num_heads: int = 6,
        latent_dim: int | None = None,
        head_dim: int | None = None,
        rope_dim: int | None = None,
        rope_theta: float = 10_000.0,
        rope_layout: RopeLayout = "half",
        kv: KeyValueKind = "latent",
        memory: bool = False,
        post_norm: PostNorm = "none",
        slot_bias: float = -8.0,
        slot_reader: SlotReaderKind = "shared",
    ) -> None:
        super().__init__()
        norms = {"none": nn.Identity, "rms": RMSNorm, "layer": nn.LayerNorm}
        if post_norm not in norms:
            raise ValueError(f"post_norm must be none, rms or layer, not {post_norm!r}")
        self.norm = RMSNorm(d_model)
        self.attention = LatentAttention(
            d_model,
            num_heads,
            latent_dim,
            head_dim,
            rope_dim,
            rope_theta,
            rope_layout,
            kv,
            memory,
            slot_bias,
            slot_reader,
        )
        self.post_norm = norms[post_norm](d_model)
        init_blocks(self.attention, num_layers=1)
        nn.init.zeros_(self.attention.out_proj.weight)
        if self.attention.reads_apart:
            self.attention.slots.reset_parameters()

    def forward(self, e: Tensor, layout: Layout | None = None, memory: Slots | None = None) -> Tensor:
        """Embeddings (B, L, d_model) to context of the same shape; the slots lengthen nothing."""
        layout = Layout.of(e, layout)
        return self.post_norm(e + self.attention(self.norm(e), layout, memory))

    def init_state(self, batch: int, max_len: int, max_rollback: int = 0) -> AppendState:
        """The attention's cache."""
        return self.attention.init_state(batch, max_len, max_rollback)

    def extend(self, e: Tensor, state: AppendState, memory: Slots | None = None) -> Tensor:
        """Context (B, n, d_model) of n new positions; memory.index speaks of these alone."""
        return self.post_norm(e + self.attention.extend(self.norm(e), state, memory))

    def slot_mass(self, e: Tensor, layout: Layout | None, memory: Slots) -> tuple[Tensor, Tensor]:
        """Attention (B, H, L) that goes to real slots and to the null slot."""
        return self.attention.slot_mass(self.norm(e), Layout.of(e, layout), memory)


class ExpertRouter(nn.Module):
    """w_t = softmax((pool_{j <= t} W_r RMSNorm(c_j) + b_r) / tau): whom to trust at every token.

    W_r is linear, so that pooling num_experts numbers a token equals pooling d_model of them; at the last
    position of a document `cummean` is the seeds' softmax(W_r MeanPool(context)). The norm has no gain. All
    arithmetic is fp32, also under autocast: a bf16 sum would stand still after some 256 terms.

    pool: `cummean` mean of the document so far; `token` this token alone; `ema` with weight decay^i for the
    i-th last token; `window` mean of the last `span`; `prefix` mean of the first `span`, then frozen;
    `cummean+token` adds a zero-initialised term of the token; `sequence` the seeds' mean over all tokens, later
    ones included: for analysis in eval mode, refused in training.
    floor: every expert keeps at least this weight. pool_includes_memory: a token's visible slots join its mean.
    """

    def __init__(
        self,
        d_model: int = 384,
        num_experts: int = 3,
        pool: PoolKind = "cummean",
        tau: float = 1.0,
        floor: float = 0.0,
        decay: float = 0.9,
        span: int = 64,
        pool_includes_memory: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= floor * num_experts < 1:
            raise ValueError(f"floor {floor} leaves nothing to route among {num_experts} experts")
        self.num_experts, self.kind = num_experts, pool
        self.tau, self.floor, self.pool_includes_memory = tau, floor, pool_includes_memory
        self.pool = _pool(pool, decay, span)
        self.norm = RMSNorm(d_model, gain=False)
        self.weight = nn.Parameter(torch.zeros(num_experts, d_model))
        self.bias = nn.Parameter(torch.zeros(num_experts))
        self.token_weight = (
            nn.Parameter(torch.zeros(num_experts, d_model)) if pool == "cummean+token" else None
        )

    @property
    def leaks(self) -> list[str]:
        """Leaky options that are on, see `nano_think.nn.leaks`."""
        return ["router.pool=sequence reads later tokens"] if self.kind == "sequence" else []

    def forward(self, context: Tensor, layout: Layout | None = None, memory: Slots | None = None) -> Tensor:
        """(B, L, d_model) to weights (B, L, num_experts), fp32, positive, summing to 1."""
        if self.kind == "sequence" and self.training:
            raise ValueError("router.pool=sequence reads later tokens; train with cummean")
        layout = Layout.of(context, layout)
        with torch.autocast(context.device.type, enabled=False):
            normed = self.norm(context.float())
            sums = self.pool.sums(F.linear(normed, self.weight.float()), layout)
            return self._weights(normed, sums, memory)

    def init_state(self, batch: int, max_len: int, max_rollback: int = 0) -> RingState:
        """Running sums and counts, always fp32."""
        return RingState(max_rollback, **self.pool.init_values(batch, self.num_experts, self.weight.device))

    def extend(self, context: Tensor, state: RingState, memory: Slots | None = None) -> Tensor:
        """Weights (B, n, num_experts) of n new positions."""
        with torch.autocast(context.device.type, enabled=False):
            normed = self.norm(context.float())
            u, totals, counts = F.linear(normed, self.weight.float()), [], []
            for piece in state.pieces(u.shape[1]):
                (total, count), values = self.pool.extend(u[:, piece], state.values, state.length)
                state.advance(piece.stop - piece.start, **values)
                totals.append(total)
                counts.append(count)
            return self._weights(normed, (torch.cat(totals, dim=1), torch.cat(counts, dim=1)), memory)

    @torch.no_grad()
    def set_static(self, weights: Tensor) -> None:
        """Give every token the weights (num_experts,), until training moves them.

        A weight at or below `floor` is out of the softmax's reach and becomes 1e-3 above it.
        """
        free = 1 - self.num_experts * self.floor
        target = ((weights.to(self.bias) - self.floor) / free).clamp_min(1e-3)
        self.bias.copy_(self.tau * (target / target.sum()).log())
        self.weight.zero_()
        if self.token_weight is not None:
            self.token_weight.zero_()

    def products(self, reach: Reach) -> Iterator[Product]:
        """See `nano_think.nn.flops`."""
        rows = 2.0 * self.weight.numel()
        yield Product(rows, self.weight)
        yield Product(0.0, self.bias)
        if self.kind == "sequence":
            yield Product(2.0 * self.num_experts * reach.length, factor="data")
        if self.pool_includes_memory:
            # every group's slots but the null slot, and one row of the choice of groups a token
            slots = reach.readers * reach.groups * reach.slots / reach.length
            yield Product(rows * slots, self.weight, factor="data")
            yield Product(2.0 * self.num_experts * reach.groups, factor="data")
            yield Product(2.0 * reach.groups, recorded=False)
        if self.token_weight is not None:
            yield Product(rows, self.token_weight)

    def _weights(self, normed: Tensor, sums: Sums, memory: Slots | None) -> Tensor:
        total, count = sums
        if self.pool_includes_memory and memory is not None:
            slot_total, slot_count = self._slot_sums(memory)
            total, count = total + slot_total, count + slot_count
        # only a pad can have counted nothing, and its NaN would reach the gradients
        z = total / count.clamp_min(1.0) + self.bias
        if self.token_weight is not None:
            z = z + F.linear(normed, self.token_weight.float())
        return (1 - self.num_experts * self.floor) * (z / self.tau).softmax(dim=-1) + self.floor

    def _slot_sums(self, memory: Slots) -> Sums:
        """What the slots of each token's group add to its mean: (B, L, num_experts) and (B, L, 1)."""
        valid = memory.valid.unsqueeze(-1)
        u = F.linear(self.norm(memory.values.float().masked_fill(~valid, 0.0)), self.weight)
        own = memory.index.unsqueeze(-1) == torch.arange(valid.shape[1], device=valid.device)
        return own.float() @ u.sum(dim=2), own.float() @ valid.float().sum(dim=2)


def _pool(kind: str, decay: float, span: int) -> Pool:
    pools: dict[str, Pool] = {
        "cummean": RunningMean(),
        "cummean+token": RunningMean(),
        "token": RunningMean(decay=0.0),
        "ema": RunningMean(decay=decay),
        "prefix": RunningMean(span=span),
        "window": WindowMean(span),
        "sequence": WholeDocument(),
    }
    if kind not in pools:
        raise ValueError(f"router.pool must be one of {', '.join(pools)}, not {kind!r}")
    return pools[kind]
