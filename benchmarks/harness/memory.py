"""Peak memory of one case in a process of its own: the operating system keeps only one high mark a process.

python -m benchmarks.harness.memory <group> <case> <threads> <quick> <kept>
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.harness.case import Options
from benchmarks.harness.discover import FOLDER, load_group
from benchmarks.harness.process import prepare

UNITS = 2  # the second unit runs with gradients and optimizer state already there


def peaks_of(
    group: str, cases: Iterable[str], threads: int, quick: bool, kept: bool
) -> dict[str, dict[str, float]]:
    """Memory of every case in MB; raises RuntimeError with the child's last lines where one fails."""
    return {case: _child(group, case, threads, quick, kept) for case in cases}


def _child(group: str, case: str, threads: int, quick: bool, kept: bool) -> dict[str, float]:
    numbers = [str(threads), str(int(quick)), str(int(kept))]
    command = [sys.executable, "-m", "benchmarks.harness.memory", group, case, *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER.parent)
    if done.returncode:
        raise RuntimeError(f"memory of {case} could not be measured: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(name: str, case: str, threads: str, quick: str, kept: str) -> None:
    """Set one case up, do two units of work, print a JSON line of MB before, at the peak, and their difference."""
    prepare(int(threads), kept=kept == "1")
    group = load_group(name, Options(quick=quick == "1", large=True))
    work = next(c for c in group.cases if c.name == case).setup()
    torch.ones(1).sum()
    before = _high_mark()
    for _ in range(UNITS):
        work()
    peak = _high_mark()
    print(json.dumps({"before_mb": before, "peak_mb": peak, "work_mb": peak - before}))


def _high_mark() -> float:
    """The most this process has held, in MB.

    From Linux's own line where it exists: getrusage there starts with what the parent held when it forked.
    """
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    main(*sys.argv[1:])
