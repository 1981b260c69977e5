"""Memory of a fit: how much it will take at its peak, said before it starts, and how much it took."""

from __future__ import annotations

import contextlib
import resource
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from nano_think.phases.probe import Probe

# Rows of the two passes that are measured hold at least this many tokens: from there on a step takes memory in
# proportion to its rows (the chunks of the head are full).
PROBE_TOKENS = 1024
# Copies of the trained parameters: the gradient and AdamW's two moments. Muon has one for matrices.
GRADIENTS, MOMENTS = 1, 2
GB = 1e9
# Estimates are off by a factor of at most 1.35 (tests/phases/test_memory.py): a fit that is estimated to need more
# than so many times the memory there is will not fit, and is refused.
CERTAIN = 1.5


@dataclass(frozen=True)
class Estimate:
    """Bytes by cause.

    process: what the process holds already, weights and data included. kept: what the fit adds for as long as it
    lasts: gradients, moments of the optimizer, the best weights. fixed + a_row * rows: what a forward and backward
    pass holds.
    """

    process: float
    kept: float
    fixed: float
    a_row: float
    rows: int

    @property
    def peak(self) -> float:
        """All of it."""
        return self.process + self.kept + self.fixed + self.a_row * self.rows

    def rows_within(self, available: float) -> int:
        """The most rows of a batch whose estimate stays within so many bytes, 0 where none does."""
        return max(0, int((available - self.peak + self.a_row * self.rows) // max(self.a_row, 1.0)))

    def in_gb(self) -> dict[str, float]:
        """For a manifest."""
        parts = {name: value for name, value in asdict(self).items() if name != "rows"}
        return {name: round(value / GB, 3) for name, value in {**parts, "peak": self.peak}.items()}


def estimate(probe: Probe, precision: str, rows: int) -> Estimate:
    """The peak of a fit with batches of so many rows.

    Two passes of different size are measured (all tensors that are alive at once), and a line through them gives
    what a pass holds at any size. What stays between passes is counted: gradients and moments of the trained
    parameters, the best weights of the whole network, and what the task keeps.
    """
    trained = sum(p.numel() * p.element_size() for p in probe.parameters)
    state = probe.task.network.state_dict().values()
    kept = (GRADIENTS + MOMENTS) * trained + sum(t.numel() * t.element_size() for t in state)
    kept += probe.task.kept_bytes
    few = min(probe.rows, rows, max(1, -(-PROBE_TOKENS // probe.batch["tokens"].shape[1])))
    many = min(probe.rows, rows, 2 * few)
    most = probe.live_bytes(precision, many)
    least = probe.live_bytes(precision, few) if few < many else most
    a_row = (most - least) / (many - few) if few < many else most / many
    # the pass makes gradients too, which are counted as kept
    fixed = max(0.0, most - a_row * many - trained)
    return Estimate(resident(), kept, fixed, a_row, rows)


def warning(expected: Estimate, available: float | None, setting: str, accumulate: int = 1) -> str | None:
    """What to say where a fit will not fit: the setting that would; None where it does or nobody knows.

    available: bytes beyond what the process holds. setting: the key of the rows of a batch.
    accumulate: batches of a step.
    """
    if available is None or expected.peak - expected.process <= available:
        return None
    room = expected.process + available
    fitting = expected.rows_within(room)
    said = f"this fit is estimated to need {expected.peak / GB:.1f} GB, there are {room / GB:.1f} GB"
    if not fitting:
        return f"{said}: not even one row a batch fits, choose a smaller size="
    parts = -(-expected.rows // fitting)
    while expected.rows % parts:
        parts += 1
    fewer = replace(expected, rows=expected.rows // parts)
    return (
        f"{said}: {setting}={fewer.rows} trainer.accumulate_grad_batches={parts * accumulate} takes the same "
        f"steps in {fewer.peak / GB:.1f} GB"
    )


def certain(expected: Estimate, available: float | None) -> bool:
    """Whether a fit that needs so much will not fit, whatever the estimate is off by."""
    return available is not None and expected.peak > CERTAIN * (expected.process + available)


def resident() -> float:
    """Bytes of memory the process holds now (its peak so far where the system does not tell)."""
    return _status("VmRSS") or peak()


def peak(device: torch.device | None = None) -> float:
    """The most bytes the process has held, since `forget_peak` where the system can forget.

    device: where a GPU, the bytes are those of tensors on it.
    """
    if device is not None and device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def forget_peak() -> None:
    """Let `peak` begin anew: one process may run several fits."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def available() -> float | None:
    """Bytes that can still be had: of the machine and of the control group; None where neither tells."""
    found = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            folder = Path("/sys/fs/cgroup")
            found.append(float((folder / limit).read_text()) - float((folder / used).read_text()))
    return min(found) if found else None


def _status(name: str) -> float | None:
    """A line of the process's own status in bytes, None where there is no such file."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    return None
