"""From logits to a token: temperature, top-k, top-p, and one random stream a row."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn.

    temperature: divides the logits; 0 takes the most likely token.
    top_k: draw among the k most likely tokens only; None for no limit.
    top_p: draw among the smallest set of likely tokens that holds at least this probability; 1 for no limit.
    seed: the random stream of row r depends on (seed, r) alone.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 (most likely token) or more, it is {self.temperature}")
        if self.top_k == 0:
            raise ValueError("top_k=0 is not allowed: leave it out (null) for no limit")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, it is {self.top_k}: null sets no limit")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], it is {self.top_p}: 1 sets no limit")

    @property
    def tokens_of_interest(self) -> int | None:
        """How many of the likeliest tokens a draw can take; None for all."""
        return 1 if self.temperature == 0 else self.top_k


def warp(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Logits (..., V) of the distribution that is sampled, -inf where a token is out of reach.

    Temperature, then top-k, then top-p on what top-k left, in fp64 so that the cut does not depend on the
    precision of the model. Equal logits are ranked by token id, so exactly k tokens pass top-k.
    Raises ValueError where no token of a row has a finite logit.
    """
    logits = logits.double()
    best = _best(logits)
    if config.temperature == 0:
        return torch.full_like(logits, -math.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    logits = (logits - best.values) / config.temperature
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    if config.top_k is not None:
        ranked[..., config.top_k :] = -math.inf
    if config.top_p < 1:
        probabilities = ranked.softmax(dim=-1)
        more_likely = probabilities.cumsum(dim=-1) - probabilities
        ranked = ranked.masked_fill(more_likely >= config.top_p, -math.inf)
    return torch.empty_like(ranked).scatter_(-1, order, ranked)


def row_generators(seed: int, rows: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each row id, unrelated between neighbouring seeds and rows."""
    digests = (hashlib.blake2b(f"{seed}/{row}".encode(), digest_size=8).digest() for row in rows)
    return [torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1) for digest in digests]


def uniforms(generators: Sequence[torch.Generator]) -> Tensor:
    """The next number of every stream, (B,) fp64 in [0, 1)."""
    return torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])


def draw(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token id (B,) a row from softmax(logits), logits (B, V), by inversion of the distribution function.

    Each row takes one uniform number of its own generator, so its draws do not depend on the other rows.
    """
    uniform = uniforms(generators).unsqueeze(1)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # The sum of probabilities is 1 up to rounding; a target equal to it would point behind the last token.
    target = torch.minimum(uniform.to(logits.device) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def sample(logits: Tensor, config: SamplingConfig, generators: Sequence[torch.Generator]) -> Tensor:
    """Next token ids (B,) for the logits (B, V) of a model; with temperature 0 no random number is used."""
    if config.temperature == 0:
        return _best(logits).indices.squeeze(-1)
    return draw(warp(logits, config), generators)


def choose(
    logits: Tensor, config: SamplingConfig, generators: Sequence[torch.Generator]
) -> tuple[list[int], list[float]]:
    """Next token ids for the logits (B, V), and the log-probability of each before temperature and limits."""
    drawn, logits = sample(logits, config, generators), logits.float()
    chosen = logits.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    return drawn.tolist(), (chosen - logits.logsumexp(dim=-1)).tolist()


def require_drawable(drawable: bool) -> None:
    """Raises ValueError unless a token can be drawn."""
    if not drawable:
        raise ValueError("no token can be drawn: the logits of a row are not finite or all tokens are banned")


def _best(logits: Tensor) -> Any:
    """Values and indices (..., 1) of the largest logits, the first of equal ones; ValueError if not finite."""
    best = logits.max(dim=-1, keepdim=True)
    require_drawable(bool(best.values.isfinite().all()))
    return best
