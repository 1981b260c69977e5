"""A whole command with all its processes: time, CPU time and peak memory, written beside the other results.

python -m benchmarks.harness.command text_to_shards -- train.py phase=data size=seed run.root=FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.report import RESULTS
from nano_think.files import write_json
from nano_think.phases.machine import versions

POLL_SECONDS = 0.1


def measure_command(arguments: list[str]) -> dict[str, Any]:
    """Run `python ARGUMENTS` to its end.

    Returns:
        `wall_s`; `cpu_s` of it and of all processes it waited for; `largest_mb`, peak resident memory of the
        largest process; `together_mb`, peak of the sum over all that lived at once (pages that two of them share
        count twice). Memory is None where there is no /proc.

    Raises:
        RuntimeError: the command failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments])
    largest = together = 0
    while process.poll() is None:
        # not getrusage: its peak starts with what the parent held when it forked
        held = [_resident(pid) for pid in _family(process.pid)]
        largest = max(largest, *(peak for _, peak in held))
        together = max(together, sum(now for now, _ in held))
        time.sleep(POLL_SECONDS)
    wall = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with status {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall_s": round(wall, 2),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "largest_mb": round(largest / 1e6, 1) or None,
        "together_mb": round(together / 1e6, 1) or None,
    }


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [each for child in task.read_text().split() for each in _family(int(child))]
        except OSError:  # gone meanwhile
            continue
    return found


def _resident(pid: int) -> tuple[int, int]:
    """Resident bytes of a process now and at their peak, 0 where it cannot be known."""
    values = {"VmRSS": 0, "VmHWM": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in values:
                values[name] = int(value.split()[0]) * 1024
    return values["VmRSS"], values["VmHWM"]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser("python -m benchmarks.harness.command", description=__doc__)
    parser.add_argument("name", help="of the result")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("command", nargs="+", help="what follows `python`, after --")
    args = parser.parse_args()
    load = round(os.getloadavg()[0], 2)
    measured = measure_command(args.command)
    result = {"command": ["python", *args.command], "load_average_before": load, **measured, **versions()}
    write_json(args.out / f"{args.name}.json", result)
    print(*(f"{name} {value}" for name, value in measured.items()), sep=", ")


if __name__ == "__main__":
    main()
