"""How a fit computes its products on this machine, settled by timing its own step and proved by its values.

Neither follows from a processor's name. bf16 products are twice as fast as fp32 ones on one AVX-512 core and half
as fast on another, and which of torch's two libraries for fp32 products is ahead differs too. The library is
chosen by `float32_matmul_precision`: "medium" allows oneDNN to round to bf16, which it does only where the
processor has units for it, so that elsewhere it is fp32 by another library. A product tells which.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nano_think.errors import UserError
from nano_think.files import hash_json
from nano_think.ops.products import fp32_stays
from nano_think.phases.machine import processor
from nano_think.phases.measured import remembered
from nano_think.phases.probe import Probe, Step

FP32, BF16, FP16 = "32-true", "bf16-mixed", "16-mixed"
ROUNDS = 3
# Seconds a step below which another arithmetic is not worth a look, and what it has to gain.
SHORTEST, GAIN = 0.02, 1.05
# Relative error of loss and gradient against plain fp32 that is still the same training.
TOLERANCES = {FP32: (1e-5, 1e-3), BF16: (2e-2, 0.1)}


def settle(probe: Probe, precision: str, memory: Path | None = None) -> dict[str, Any]:
    """The fastest safe arithmetic of a task on a CPU: {precision, float32_matmul, seconds by candidate}.

    precision: `auto`, or Lightning's name of the one to be used, which leaves the library to be chosen.
    memory: where what was measured for networks and batches of these shapes is kept, see `remembered`.
    Raises UserError for fp16, which only a GPU computes: a CPU would take bf16 under its name.
    """
    if precision == FP16:
        raise UserError(f"precision={FP16} is for GPUs: use precision={BF16} or auto on a CPU")
    candidates = list(_candidates(precision))
    if len(candidates) == 1:
        return _chosen(*candidates[0])
    known: dict[str, Any] = remembered(_key(probe, candidates), lambda: _measure(probe, candidates), memory)
    return known


def on_gpu(precision: str) -> dict[str, Any]:
    """On a GPU `auto` is bf16 where the device computes it; its products are faster there by design."""
    if precision == "auto":
        precision = BF16 if torch.cuda.is_bf16_supported(including_emulation=False) else FP32
    return _chosen(precision, torch.get_float32_matmul_precision())


def _candidates(precision: str) -> Iterator[tuple[str, str]]:
    """Precision and setting for fp32 products; the first is what the others have to beat."""
    if precision in ("auto", FP32):
        yield FP32, "highest"
        if fp32_stays("medium"):
            yield FP32, "medium"
    if precision == "auto":
        yield BF16, "highest"
    elif precision != FP32:
        yield precision, torch.get_float32_matmul_precision()


def _measure(probe: Probe, candidates: list[tuple[str, str]]) -> dict[str, Any]:
    steps = {candidate: probe.step(*candidate) for candidate in candidates}
    plain = steps[candidates[0]]
    safe = [candidate for candidate in candidates if _same(plain, steps[candidate], TOLERANCES[candidate[0]])]
    seconds: dict[tuple[str, str], float] = {}
    for _ in range(ROUNDS):
        for candidate in safe:
            taken = probe.step(*candidate).seconds
            seconds[candidate] = min(taken, seconds.get(candidate, taken))
        if seconds[candidates[0]] < SHORTEST:
            safe = candidates[:1]
    first, best = candidates[0], min(safe, key=seconds.__getitem__)
    chosen = best if seconds[first] >= GAIN * seconds[best] else first
    return _chosen(*chosen, {" ".join(c): round(s, 4) for c, s in seconds.items()})


def _chosen(precision: str, matmul: str, seconds: dict[str, float] | None = None) -> dict[str, Any]:
    return {"precision": precision, "float32_matmul": matmul, "seconds": seconds or {}}


def _same(plain: Step, other: Step, tolerances: tuple[float, float]) -> bool:
    loss = abs(other.loss - plain.loss) / max(abs(plain.loss), 1e-12)
    apart = _norm([a - b for a, b in zip(other.gradients, plain.gradients, strict=True)])
    return loss <= tolerances[0] and apart <= tolerances[1] * _norm(plain.gradients)


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())


def _key(probe: Probe, candidates: list[tuple[str, str]]) -> str:
    """What a measurement is of: machine, threads, libraries, shapes of all parameters and of the rows."""
    shapes = [[n, list(p.shape), p.requires_grad] for n, p in probe.task.network.named_parameters()]
    machine = [torch.__version__, torch.get_num_threads(), processor()]
    rows = list(probe.batch["tokens"].shape)
    return hash_json([machine, type(probe.task).__name__, shapes, rows, candidates])
