"""Fits of a study beside each other: each in a process of its own, by the command that anybody could type."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from nano_think.errors import UserError
from nano_think.phases.run import Maker, Run

ENTRY = Path(__file__).resolve().parents[2] / "train.py"
SHOWN_LINES = 15


def make_all(run: Run, makers: Iterable[Maker], workers: int) -> None:
    """Have every artefact made, each once and after what it needs, up to `workers` at a time.

    Raises UserError with the end of the output of a fit that failed; what others made stays.
    """
    missing = _missing(run, makers)
    if workers < 2:
        for maker in missing.values():
            run.obtain(maker, named=True)
        return
    for maker in _data(missing.values()):
        run.obtain(maker, named=True)
    missing = {key: maker for key, maker in missing.items() if not maker.recipe.exists(run.artifacts)}
    total = len(missing)
    running: dict[Future[float], Maker] = {}
    with ThreadPoolExecutor(workers) as pool:
        while missing or running:
            ready = [key for key, maker in missing.items() if _ready(run, maker)]
            for key in ready[: workers - len(running)]:
                maker = missing.pop(key)
                running[pool.submit(_make, run, maker, workers)] = maker
            if not running:
                raise UserError(
                    f"{next(iter(missing.values())).kind} needs what no command made: run it again"
                )
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                _report(run, running.pop(future), future, total - len(missing) - len(running), total)


def _missing(run: Run, makers: Iterable[Maker]) -> dict[str, Maker]:
    """What does not exist, with its needs before it, by hash."""
    found: dict[str, Maker] = {}
    for maker in makers:
        if not maker.recipe.exists(run.artifacts):
            found |= _missing(run, maker.needs.values()) | {maker.recipe.hash: maker}
    return found


def _data(makers: Iterable[Maker]) -> list[Maker]:
    """Artefacts that are no fit: they use all cores themselves."""
    return [maker for maker in makers if maker.kind in ("corpus", "tokenizer", "shards")]


def _ready(run: Run, maker: Maker) -> bool:
    return all(need.recipe.exists(run.artifacts) for need in maker.needs.values())


def _make(run: Run, maker: Maker, workers: int) -> float:
    """Run the command of an artefact with a share of the cores; the seconds it took."""
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    arguments = [*shlex.split(maker.command)[2:], "prerequisites=require"]
    folder = run.dir / "fits" / f"{maker.kind}-{maker.recipe.hash}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "w", encoding="utf-8") as output:
        subprocess.run(
            [sys.executable, str(ENTRY), *arguments, f"run.dir={folder}"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            check=False,
        )
    if not maker.recipe.exists(run.artifacts):
        lines = (folder / "output.txt").read_text(encoding="utf-8").splitlines()
        end = "\n".join(lines[-SHOWN_LINES:])
        raise UserError(f"{maker.kind} {maker.recipe.hash} was not made by `{maker.command}`:\n{end}")
    return run.provenance_of(maker.recipe.path(run.artifacts))["seconds"]


def _report(run: Run, maker: Maker, future: Future[float], done: int, total: int) -> None:
    seconds = future.result()
    run.say(f"({done} of {total}) {maker.kind} {maker.recipe.hash} in {seconds:.0f} s")
