"""The fused model of phase 7 at the size of a benchmark, packed rows for it, and its plain twin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

import nano_think.model as model_module
from nano_think.experts.diffuser import DiffuserExpert, GradMode
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.mla import MultiHeadLatentAttention
from nano_think.model import Fusion, NanoThink
from nano_think.nn.norm import RMSNorm, rms_norm_reference
from nano_think.ops.cross_entropy import linear_cross_entropy_reference
from nano_think.ops.layout import Layout
from nano_think.optim.groups import adamw
from nano_think.optim.schedule import constant
from nano_think.tasks.expert_cache import ExpertCache
from nano_think.tasks.route import RouteTask, set_trainable

CACHED_TOKENS = 100_000


@dataclass(frozen=True)
class Size:
    """Of the fused model and a batch of `rows` rows."""

    rows: int = 2
    length: int = 512
    d_model: int = 384
    heads: int = 6
    layers: int = 6
    denoiser_layers: int = 4
    ffn: int = 1536
    denoiser_ffn: int = 512
    inner: int = 768
    vocab: int = 32_000
    cached_tokens: int = CACHED_TOKENS

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.rows * self.length


QUICK = Size(2, 160, 16, 2, 1, 1, 24, 24, 32, 64, cached_tokens=960)


@cache
def fused(size: Size, stage: str, fusion: Fusion = "hidden", seed: int = 0) -> NanoThink:
    """The fused model of a size, its experts frozen; no zero-initialised part is left at zero."""
    torch.manual_seed(seed)
    experts = {
        "transformer": TransformerExpert(size.d_model, size.layers, size.heads, size.ffn),
        "diffuser": diffuser(size),
        "state_space": StateSpaceExpert(size.d_model, size.layers, size.inner),
    }
    mla = partial(MultiHeadLatentAttention, num_heads=size.heads)
    model = NanoThink(experts, size.vocab, size.d_model, mla=mla, fusion=fusion)
    stir(model)
    model.freeze_experts()
    set_trainable(model, stage)
    return model.train()


def diffuser(size: Size, steps: int = 1, grad: GradMode = "last") -> DiffuserExpert:
    """A diffuser whose noisy stream counts, the same weights every time."""
    torch.manual_seed(1)
    expert = DiffuserExpert(
        size.d_model, size.denoiser_layers, size.heads, size.denoiser_ffn, fused_steps=steps, grad=grad
    )
    expert.fit_statistics(torch.randn(64, size.d_model, generator=torch.Generator().manual_seed(3)))
    stir(expert)
    return expert.requires_grad_(False).eval()


@torch.no_grad()
def stir(module: nn.Module) -> None:
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)


def batch(size: Size, seed: int = 0) -> dict[str, Tensor]:
    """Random packed rows as the data module gives them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(size.vocab, (size.rows, size.length), generator=generator)
    starts = torch.rand(tokens.shape, generator=generator) < 3 / size.length
    starts[:, 0] = True
    order = torch.arange(size.length).expand_as(tokens)
    segments = starts.long().cumsum(1) - 1
    labels = tokens.roll(-1, 1)
    labels[:, :-1][segments[:, 1:] != segments[:, :-1]] = -100
    positions = order - order.masked_fill(~starts, 0).cummax(1).values
    row = torch.arange(size.rows) + size.rows * seed
    places = {"row": row, "domain": row % 2}
    return {"tokens": tokens, "labels": labels, "positions": positions, "segments": segments, **places}


def layout(rows: dict[str, Tensor]) -> Layout:
    return Layout(rows["positions"], rows["segments"])


class Given(nn.Module):
    """Stands for an expert while a cache is filled: what is timed afterwards does not depend on the values."""

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        return x.roll(1, -1)


def route(network: NanoThink, size: Size, stage: str = "7b", cached: bool = False) -> RouteTask:
    """The task of a stage, with room for `cached_tokens` and a batch of kept expert outputs where `cached`."""
    rows = size.cached_tokens // size.length + size.rows
    return RouteTask(
        network,
        optimizer=partial(adamw, lr=1e-4, weight_decay=0.0),
        schedule=partial(constant, warmup_steps=0),
        domains=["one", "two"],
        byte_lengths=torch.ones(size.vocab),
        stage=stage,
        cache=ExpertCache(network, rows, size.length) if cached else None,
    )


@contextmanager
def plain() -> Iterator[None]:
    """Everything this group times by its plain twin: masks, norms, loss."""
    kept = Layout.sight, RMSNorm.forward, model_module.linear_cross_entropy
    Layout.sight = property(lambda self: (self.mask, None))  # type: ignore[assignment, misc]
    RMSNorm.forward = lambda self, x, dtype=None: rms_norm_reference(x, self.weight, self.eps)  # type: ignore
    model_module.linear_cross_entropy = lambda hidden, weight, labels, **_: linear_cross_entropy_reference(
        hidden, weight, labels
    )
    try:
        yield
    finally:
        Layout.sight, RMSNorm.forward, model_module.linear_cross_entropy = kept  # type: ignore
