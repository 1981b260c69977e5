"""What denoising steps buy the diffuser, how it restores noisy latents, and what its network adds to formulas.

Letters: B rows, L positions, d features, V vocabulary, T scored tokens, K denoising steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nano_think.evals.losses import Batch
from nano_think.evals.ratios import Floats, mean_interval
from nano_think.metrics.denoising import DenoisingError
from nano_think.model import ExpertLM
from nano_think.ops.cross_entropy import linear_cross_entropy
from nano_think.ops.layout import Layout

STEPS = (1, 2, 5, 10, 25, 50, 100)
LEVELS = (10, 25, 50, 75, 90, 100)
NUM_BUCKETS = 10
PROMPT = 32
RESTORERS = ("network", "context_only", "shrinkage", "combined")
# elements of a table of logits, 16 MiB of float32
_PIECE = 2**22

# A batch to the latents' unstandardised targets (B, L, d) and where they are defined (B, L).
Targets = Callable[[Batch], tuple[Tensor, Tensor]]


class Stopwatch:
    """Seconds by the clock and by the processor, added up over all `with` blocks."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside. The processor's seconds are those of all threads."""
        begun, begun_cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - begun
        self.cpu_seconds += time.process_time() - begun_cpu


@torch.no_grad()
def steps_curve(
    network: ExpertLM,
    teacher: ExpertLM,
    batches: Iterable[Batch],
    steps: Sequence[int] = STEPS,
    *,
    decode_tokens: int = 8,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Loss and time of the diffuser by DDIM steps, beside the Transformer it was distilled from.

    The clean stream of a batch is computed once and serves all numbers of steps. Times are those of whole
    batches (`seconds_per_token`, `cpu_seconds_per_token`, noisy passes alone) and of one position after another
    with a cache (`decode_*`, clean pass and head included, the median of `decode_tokens`).

    Returns:
        target, fused_steps, tokens, documents, teacher_loss, teacher_decode_(cpu_)seconds_per_token,
        clean_seconds_per_token, clean_cpu_seconds_per_token, and in `curve` one row a number of steps: loss,
        minus_one_step (loss minus that of the first number of steps), gap (loss minus the teacher's), kl
        (mean KL(p_T || p_D)), helps (gap < kl: a little of it improves a geometric pool with the Transformer).
    """
    batches = list(batches)
    read = _read(network, teacher, batches, steps, seed)
    losses, document = read.losses, np.unique(read.uid, return_inverse=True)[1]
    decoded = decode_seconds(network, teacher, batches[0], steps, decode_tokens)
    bootstrap = {"n_resamples": n_resamples, "seed": seed}

    def mean(values: Floats) -> dict[str, Any]:
        return mean_interval(values, document, None, **bootstrap)

    return {
        "target": network.expert.target,
        "fused_steps": network.expert.fused_steps,
        "tokens": len(document),
        "documents": int(document.max()) + 1,
        "teacher_loss": mean(losses["teacher"]),
        "teacher_decode_seconds_per_token": decoded["teacher"][0],
        "teacher_decode_cpu_seconds_per_token": decoded["teacher"][1],
        "clean_seconds_per_token": read.clean.seconds / read.tokens,
        "clean_cpu_seconds_per_token": read.clean.cpu_seconds / read.tokens,
        "curve": [
            {
                "steps": k,
                "network_passes": k + 1,
                "loss": mean(losses[k]),
                "minus_one_step": mean(losses[k] - losses[steps[0]]),
                "gap": mean(losses[k] - losses["teacher"]),
                "kl": read.kl[k],
                "helps": bool((losses[k] - losses["teacher"]).mean() < read.kl[k]),
                "seconds_per_token": read.noisy[k].seconds / read.tokens,
                "cpu_seconds_per_token": read.noisy[k].cpu_seconds / read.tokens,
                "decode_seconds_per_token": decoded[k][0],
                "decode_cpu_seconds_per_token": decoded[k][1],
            }
            for k in steps
        ],
    }


@dataclass(frozen=True)
class _Read:
    """losses: (T,) of the `teacher` and by number of steps. uid: (T,). tokens: positions that were timed."""

    losses: dict[Any, Floats]
    kl: dict[int, float]
    uid: NDArray[np.int64]
    tokens: int
    clean: Stopwatch
    noisy: dict[int, Stopwatch]


def _read(
    network: ExpertLM, teacher: ExpertLM, batches: Sequence[Batch], steps: Sequence[int], seed: int
) -> _Read:
    expert, table, teacher_table = network.expert, network.embedding.weight, teacher.embedding.weight
    clean, noisy = Stopwatch(), {k: Stopwatch() for k in steps}
    nll: dict[Any, list[Tensor]] = {key: [] for key in ("teacher", *steps)}
    divergence: dict[int, list[Tensor]] = {k: [] for k in steps}
    for batch in batches:
        scored, labels = batch["labels"] >= 0, batch["labels"]
        layout = Layout(batch["positions"], batch["segments"])
        hidden = teacher(batch["tokens"], layout, with_logits=False).hidden
        nll["teacher"].append(linear_cross_entropy(hidden, teacher_table, labels)[scored])
        c = network.embedding(batch["tokens"])
        with clean.running():
            kv = expert.clean_stream(c, layout)
        for k in steps:
            with noisy[k].running():
                own = expert(c, layout, k, torch.Generator().manual_seed(seed), kv)
            nll[k].append(linear_cross_entropy(own, table, labels)[scored])
            divergence[k].append(token_kl(hidden[scored], teacher_table, own[scored], table))
    return _Read(
        losses={key: torch.cat(parts).double().cpu().numpy() for key, parts in nll.items()},
        kl={k: float(torch.cat(parts).double().mean()) for k, parts in divergence.items()},
        uid=torch.cat([batch["doc_uid"][batch["labels"] >= 0] for batch in batches]).cpu().numpy(),
        tokens=sum(batch["labels"].numel() for batch in batches),
        clean=clean,
        noisy=noisy,
    )


def token_kl(p: Tensor, p_table: Tensor, q: Tensor, q_table: Tensor) -> Tensor:
    """KL(softmax(p p_table^T) || softmax(q q_table^T)) of every row, (T,) in nats, a few rows at a time."""
    rows = max(1, _PIECE // len(p_table))
    parts = []
    for some_p, some_q in zip(p.split(rows), q.split(rows), strict=True):
        log_p = F.linear(some_p, p_table).float().log_softmax(-1)
        log_q = F.linear(some_q, q_table).float().log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts)


@torch.no_grad()
def decode_seconds(
    network: ExpertLM, teacher: ExpertLM, batch: Batch, steps: Sequence[int], count: int
) -> dict[Any, tuple[float, float]]:
    """Median seconds a token of greedy decoding, by clock and by processor: `teacher`, and by number of steps."""
    prompt = batch["tokens"][:1, :PROMPT]
    readers: dict[Any, tuple[ExpertLM, dict[str, int]]] = {"teacher": (teacher, {})}
    readers |= {k: (network, {"steps": k}) for k in steps}
    found = {}
    for key, (model, options) in readers.items():
        state = model.init_state(1, prompt.shape[1] + count)
        tokens, watches = prompt, []
        for _ in range(count + 1):
            watch = Stopwatch()
            with watch.running():
                hidden = model.expert.extend(model.embedding(tokens), state, **options)
                tokens = F.linear(hidden[:, -1:], model.embedding.weight).argmax(-1)
            watches.append((watch.seconds, watch.cpu_seconds))
        clock, cpu = np.median(watches[1:], axis=0).tolist()  # the first one read the prompt
        found[key] = clock, cpu
    return found


@torch.no_grad()
def restoration(
    network: ExpertLM,
    targets: Targets,
    batches: Sequence[Batch],
    levels: Sequence[int] = LEVELS,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Whole texts restored in one pass from latents with noise of some level: what the network adds.

    targets: `denoising_targets` of the network and its teacher. levels: noise levels in 1..train_T.

    Returns:
        tokens; `levels`, a row each with tau, signal_power, and `error` and `agreement` of
          network: the denoiser, which sees the noisy latent and the text so far,
          context_only: the same from pure noise, which is all that the fused model asks of it,
          shrinkage: no network, the noisy latent pulled towards the mean of all latents,
          combined: no second look, context_only and the noisy latent weighed by their variances, which is
            exact where what the context leaves open is normal and independent by feature;
        `error` is the squared error over that of predicting the mean, `agreement` the share of positions whose
        most probable token is that of the clean latent; `buckets` is the network's error at uniform levels.
    """
    expert, table = network.expert, network.embedding.weight
    train_T, d_model = expert.schedule.train_T, expert.d_model
    errors = {(tau, kind): DenoisingError(1, train_T, d_model) for tau in levels for kind in RESTORERS}
    agreed, tokens = dict.fromkeys(errors, 0), 0
    for i, batch in enumerate(batches):
        target, valid = targets(batch)
        x0 = expert.standardise(target)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed + i)).to(x0)
        clean, tokens = _nearest(expert.readout(x0)[valid], table), tokens + int(valid.sum())
        for key, estimate in _restored(network, batch, x0, noise, valid, levels):
            errors[key].update(estimate, x0, torch.full_like(batch["labels"], key[0]), valid)
            said = _nearest(expert.readout(estimate)[valid], table)
            agreed[key] += int((said == clean).sum())
    by_level, _ = denoising_errors(network, targets, batches)
    values = {name: float(value) for name, value in by_level.compute().items()}
    return {
        "tokens": tokens,
        "levels": [
            {
                "tau": tau,
                "signal_power": float(expert.schedule.abar[tau]),
                "error": {kind: float(errors[tau, kind].compute()["mse_relative"]) for kind in RESTORERS},
                "agreement": {kind: agreed[tau, kind] / tokens for kind in RESTORERS},
            }
            for tau in levels
        ],
        "buckets": {
            "levels": [list(pair) for pair in by_level.bucket_levels()],
            "relative_error": [values.get(f"mse_relative_bucket/{k}") for k in range(NUM_BUCKETS)],
        },
    }


def _restored(
    network: ExpertLM, batch: Batch, x0: Tensor, noise: Tensor, valid: Tensor, levels: Sequence[int]
) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """Estimates of x0 by level and kind, see `restoration`."""
    expert, c = network.expert, network.embedding(batch["tokens"])
    layout = Layout(batch["positions"], batch["segments"])
    kv = expert.clean_stream(c, layout)
    context = expert.denoise(noise, expert.schedule.train_T, c, layout, kv)
    left_open = (context - x0)[valid].square().mean(0)
    for tau in levels:
        x_tau = expert.schedule.add_noise(x0, noise, tau)
        yield (tau, "network"), expert.denoise(x_tau, tau, c, layout, kv)
        yield (tau, "context_only"), context
        anything = torch.zeros_like(x0), torch.ones_like(left_open)  # latents are standardised
        yield (tau, "shrinkage"), _weighed(expert, *anything, x_tau, tau)
        yield (tau, "combined"), _weighed(expert, context, left_open, x_tau, tau)


def _weighed(expert: Any, mean: Tensor, variance: Tensor, x_tau: Tensor, tau: int) -> Tensor:
    """E[x0 | x_tau] of x0 normal around `mean` (B, L, d) with `variance` (d,)."""
    a, _ = expert.schedule.levels(tau, x_tau)
    gain = expert.schedule.gain(variance.to(x_tau), tau, x_tau)
    return mean + gain * (x_tau - a * expert.schedule.input_scale * mean)


def _nearest(hidden: Tensor, table: Tensor) -> Tensor:
    """The most probable token (T,) of hidden states (T, d)."""
    rows = max(1, _PIECE // len(table))
    return torch.cat([F.linear(some, table).argmax(-1) for some in hidden.split(rows)])


@torch.no_grad()
def denoising_errors(
    network: ExpertLM, targets: Targets, batches: Iterable[Batch]
) -> tuple[DenoisingError, DenoisingError]:
    """x0 errors by noise bucket, and at pure noise alone, with noise fixed by the batch number."""
    expert = network.expert
    train_T, d_model = expert.schedule.train_T, expert.d_model
    error, pure = DenoisingError(NUM_BUCKETS, train_T, d_model), DenoisingError(1, train_T, d_model)
    for i, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(i)
        target, valid = targets(batch)
        x0, c = expert.standardise(target), network.embedding(batch["tokens"])
        layout = Layout(batch["positions"], batch["segments"])
        kv = expert.clean_stream(c, layout)
        noise = torch.randn(x0.shape, generator=generator)
        some = torch.randint(1, train_T + 1, tuple(valid.shape), generator=generator)
        for metric, tau in ((error, some), (pure, torch.full_like(some, train_T))):
            x_tau = expert.schedule.add_noise(x0, noise, tau)
            metric.update(expert.denoise(x_tau, tau, c, layout, kv), x0, tau, valid)
    return error, pure
