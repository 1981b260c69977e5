"""Learning-rate factors as closed functions of the step, and the torch schedulers that apply them."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

MAX_WARMUP_SHARE = 0.05


def capped_warmup(warmup_steps: int, total_steps: int) -> int:
    """The warm-up asked for, at most 5% of the run: a short run must not end while it still warms up."""
    return min(warmup_steps, int(MAX_WARMUP_SHARE * total_steps))


def constant_factor(step: int, warmup_steps: int) -> float:
    """Linear from 1 / warmup_steps at step 0 to 1 at step warmup_steps - 1, then 1."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def cosine_factor(step: int, warmup_steps: int, total_steps: int, final: float) -> float:
    """Warm-up, half a cosine from 1 to `final` at `total_steps` (arXiv 1608.03983, eq. 5), then `final`."""
    if step < warmup_steps:
        return constant_factor(step, warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def wsd_factor(step: int, warmup_steps: int, total_steps: int, final: float, decay_share: float) -> float:
    """Warm-up, a plateau at 1, then 1 - sqrt down to `final` in the last `decay_share` of the run.

    Warm-up, stable, decay (Hu et al., arXiv 2404.06395), cooled down as in Hagele et al. (arXiv 2405.18392).
    """
    decay_steps = max(1, round(decay_share * total_steps))
    progress = min(1.0, max(0.0, (step - (total_steps - decay_steps)) / decay_steps))
    return constant_factor(step, warmup_steps) * (final + (1.0 - final) * (1.0 - math.sqrt(progress)))


def constant(optimizer: Optimizer, total_steps: int, warmup_steps: int = 0) -> LambdaLR:
    """Warm-up, then the optimizer's own learning rates."""
    warmup = capped_warmup(warmup_steps, total_steps)
    return LambdaLR(optimizer, partial(constant_factor, warmup_steps=warmup))


def cosine(optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, final: float = 0.1) -> LambdaLR:
    """Warm-up, then a cosine down to `final` times the learning rate at `total_steps`."""
    warmup = capped_warmup(warmup_steps, total_steps)
    factor = partial(cosine_factor, warmup_steps=warmup, total_steps=total_steps, final=final)
    return LambdaLR(optimizer, factor)


def wsd(
    optimizer: Optimizer,
    total_steps: int,
    warmup_steps: int = 0,
    final: float = 0.1,
    decay_share: float = 0.2,
) -> LambdaLR:
    """Warm-up, plateau, and a cool-down to `final` times the learning rate in the last `decay_share`."""
    if not 0.0 < decay_share <= 1.0:
        raise ValueError(f"decay_share must lie in (0, 1], it is {decay_share}")
    warmup = capped_warmup(warmup_steps, total_steps)
    factor = partial(
        wsd_factor, warmup_steps=warmup, total_steps=total_steps, final=final, decay_share=decay_share
    )
    return LambdaLR(optimizer, factor)
