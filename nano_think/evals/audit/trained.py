"""A7: what cannot be predicted must not be learned.

Tokens drawn uniformly have nothing to learn: a model whose loss falls below ln V has seen its targets. The twin
of a model is trained here by a bare loop; nothing of it is kept, so it needs no trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_think.evals.audit.finding import Finding
from nano_think.evals.audit.live import live_copy
from nano_think.ops.seeding import mixed_seed

# Of the untrained network with this many tokens.
Twin = Callable[[int], Any]


@dataclass(frozen=True)
class Training:
    """Sizes of both trainings: small, because a model that can see its targets learns to copy at once."""

    vocab_size: int = 23
    rows: int = 16
    length: int = 32
    steps: int = 120
    learning_rate: float = 3e-3
    seed: int = 0

    @property
    def judged(self) -> int:
        """Steps at the end whose losses count."""
        return self.steps // 3

    @property
    def chance(self) -> float:
        """ln V, the loss of a model that knows nothing."""
        return math.log(self.vocab_size)

    def tokens(self, purpose: int, step: int) -> Tensor:
        """Fresh tokens (B, L + 1) of a step, drawn uniformly."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, purpose, step))
        return torch.randint(self.vocab_size, (self.rows, self.length + 1), generator=generator)


def incompressible(twin: Twin | None, training: Training | None = None) -> Finding:
    """A7: on random tokens, fresh every step, the loss stays at ln V.

    That the twin can learn at all is shown first, on texts in which each token decides the next.
    """
    training = training or Training()
    title = "random tokens cannot be predicted"
    if twin is None:
        return Finding("A7", title, "not applicable", note="there is no spec to build a tiny twin from")
    learned, _ = _train(twin(training.vocab_size), training, _counting(training))
    if _mean(learned) > 0.8 * training.chance:
        note = f"the twin did not even learn to count: {_mean(learned):.2f} nats"
        return Finding("A7", title, "vacuous", note=note)
    losses, model = _train(twin(training.vocab_size), training, _random(training))
    below = (training.chance - _mean(losses)) / standard_error(losses)
    note = (
        f"{_mean(losses):.4f} nats, standard error {standard_error(losses):.4f}, ln V = {training.chance:.4f}"
    )
    if below > 3:
        to_blame = _leaky_expert(model, training) or "model"
        return Finding("A7", title, "fail", training.chance - _mean(losses), None, to_blame, note)
    return Finding("A7", title, "pass", max(0.0, training.chance - _mean(losses)), note=note)


def _random(training: Training) -> Iterator[Tensor]:
    """Texts (B, L + 1) of tokens drawn uniformly, new ones every step."""
    for step in range(training.steps):
        yield training.tokens(1, step)


def _counting(training: Training) -> Iterator[Tensor]:
    """Texts (B, L + 1) that count upwards from a random number."""
    for step in range(training.steps):
        tokens = training.tokens(2, step)
        yield (tokens[:, :1] + torch.arange(tokens.shape[1])) % training.vocab_size


def _train(model: Any, training: Training, texts: Iterable[Tensor]) -> tuple[Tensor, Any]:
    """Losses (judged, B) of the last steps, each measured before the step is taken, and the model."""
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        # an output that starts at zero learns late, and a leak must show soon
        model = live_copy(model, training.seed)[0].train().requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, weight_decay=0.0)
        losses = []
        for tokens in texts:
            logits = model(tokens[:, :-1]).logits
            nll = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
            losses.append(nll.detach())
            optimizer.zero_grad()
            nll.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return torch.stack(losses[-training.judged :]).double(), model.eval()


def _leaky_expert(model: Any, training: Training) -> str | None:
    """The expert that alone already knows too much; None where all do, so that their common input leaks."""
    names = list(getattr(model, "experts", {}))
    leaky = []
    for i, name in enumerate(names):
        vertex = F.one_hot(torch.tensor(i), len(names)).float()
        tokens = training.tokens(1, training.steps)
        with torch.no_grad():
            logits = model(tokens[:, :-1], weights=vertex).logits
        nll = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1).double()
        if (training.chance - float(nll.mean())) / standard_error(nll) > 3:
            leaky.append(f"experts.{name}")
    if not names:
        return "expert"
    return ", ".join(leaky) if 0 < len(leaky) < len(names) else "mla" if leaky else None


def _mean(losses: Tensor) -> float:
    return float(losses.mean())


def standard_error(losses: Tensor) -> float:
    """Standard error of the mean over rows, each of them a document of its own."""
    return float(losses.std() / losses.numel() ** 0.5)
