"""What a fit costs in FLOPs: for its record, a budget that it may not exceed, and its share of the peak."""

from __future__ import annotations

import time
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nano_think.data.module import TokenDataModule
from nano_think.errors import UserError
from nano_think.evals.flops import filling_flops, optimizer_flops, training_flops
from nano_think.files import hash_json
from nano_think.ops.products import float32_matmul
from nano_think.phases.fit import Fit
from nano_think.phases.machine import processor
from nano_think.phases.measured import remembered
from nano_think.phases.probe import LIGHTNING_AUTOCAST
from nano_think.tasks.base import FitTask

# Rows a domain that tell how long documents are.
LENGTH_ROWS = 16
# Width of the square matrices that the peak is measured with, and how long that may take.
PEAK_WIDTH = {"cpu": 768, "cuda": 8192}
PEAK_SECONDS = 0.3


@dataclass(frozen=True)
class Cost:
    """FLOPs of a fit. Validations, samples and the statistics of a diffuser's targets are not training.

    per_token: of forward and backward pass. model_per_token: the same without what is computed again.
    per_step: of the optimizer. tokens: of a step, pads included.
    filling: of a token whose expert outputs are kept (7b); unique: how many tokens that are, at most.
    trained: parameters.
    """

    per_token: float
    model_per_token: float
    per_step: float
    tokens: int
    filling: float
    unique: int
    trained: int

    def total(self, steps: int) -> float:
        """FLOPs of so many optimizer steps."""
        tokens = steps * self.tokens
        return tokens * self.per_token + steps * self.per_step + min(tokens, self.unique) * self.filling

    def steps_within(self, budget: float) -> int:
        """As many steps as do not cost more than `budget`."""
        return bisect_right(range(1, 1 << 40), budget, key=self.total)


def cost_of(fit: Fit, task: FitTask, data: TokenDataModule) -> Cost:
    """The cost of a fit before it starts; UserError where a network does not say what it multiplies."""
    length, network = document_length(data, fit.train_split), task.network
    unique = data.num_rows(fit.train_split) * data.seq_len
    if data.train_tokens is not None:
        unique = min(unique, data.train_tokens)
    micro_batch = fit.training["batch_size"] * data.seq_len
    options = {"tokens": micro_batch, **task.flops_options}
    try:
        per_token = training_flops(network, length, **options)
        model = training_flops(network, length, recompute=False, **options)
        filling = filling_flops(network, length, tokens=data.seq_len) if options.get("cached") else 0.0
    except ValueError as error:
        raise UserError(f"the FLOPs of {fit.label} cannot be counted: {error}") from error
    return Cost(
        per_token,
        model,
        optimizer_flops(task.make_optimizer(network)),
        tokens=micro_batch * fit.accumulate,
        filling=filling,
        unique=unique,
        trained=sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad),
    )


def document_length(data: TokenDataModule, split: str) -> float:
    """The length of equal documents whose tokens see as many keys as those of the first rows of a split."""
    with torch.random.fork_rng(devices=[]):  # an iterator of a loader draws a seed
        batches = list(data.dataloader(split, rows=LENGTH_ROWS))
    seen = torch.cat([batch["positions"][batch["segments"] >= 0] + 1 for batch in batches])
    return 2 * float(seen.double().mean()) - 1


def within_budget(fit: Fit, cost: Cost, planned: int) -> int:
    """Steps of a fit: those planned, or those that its budget pays for."""
    budget = fit.training["max_flops"]
    if budget is None:
        return planned
    steps = cost.steps_within(budget)
    if not steps:
        raise UserError(
            f"max_flops={budget:.3g} of {fit.label} does not pay for one step, which costs {cost.total(1):.3g}: "
            "raise it, or lower the batch size"
        )
    fit.run.say(f"{fit.label}: {budget:.3g} FLOPs pay for {steps:,} steps")
    return steps


def gemm_peak(device: torch.device, precision: str, matmul: str, memory: Path | None = None) -> float:
    """FLOP/s of the best of a few large square products, in the arithmetic of a fit.

    memory: where it is kept, see `remembered`.
    """
    machine = [torch.__version__, torch.get_num_threads(), processor()]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    key = hash_json(["gemm_peak by processor time", *machine, name, precision, matmul])
    known: float = remembered(key, lambda: _measured_peak(device, precision, matmul), memory)
    return known


def _measured_peak(device: torch.device, precision: str, matmul: str) -> float:
    width = PEAK_WIDTH[device.type]
    wide = torch.float64 if precision.startswith("64") else torch.float32
    a, b = (
        torch.ones(width, width, device=device, dtype=LIGHTNING_AUTOCAST.get(precision, wide)) for _ in "ab"
    )
    with float32_matmul(matmul):
        _seconds(a, b)  # libraries load and buffers are made on the first call
        best, until = _seconds(a, b), time.perf_counter() + PEAK_SECONDS
        while time.perf_counter() < until:
            best = min(best, _seconds(a, b))
    return 2.0 * width**3 / best


def _seconds(a: Tensor, b: Tensor) -> float:
    if a.is_cuda:
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.mm(a, b)
        torch.cuda.synchronize()
        return time.perf_counter() - started
    # seconds of the processor: what else runs on the machine takes part of the clock's, and the figure is kept
    started = time.process_time()
    torch.mm(a, b)
    return (time.process_time() - started) / torch.get_num_threads()
