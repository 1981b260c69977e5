"""Killing a process at a chosen moment, and noting how far it came. Nothing in nano_think knows of this module.

It is installed into a process that then runs train.py: it wraps the calls by which files become durable, a
validation batch and a training batch, counts how often each place is passed, and ends the process by SIGKILL where
it was told to. `python -m tests.reliability.moments SPEC ARGUMENTS` does so in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_TEMPORARY = re.compile(r"/\.([^/]+)\.\d+-[0-9a-f]{8}\.tmp")
# The first that fits, of a path without temporary names.
_PLACES = (
    (r"/\.work/[^/]+/newest\.ckpt$", "checkpoint"),
    (r"/memory(/|$)", "store"),
    (r"/artifacts/corpus/", "corpus"),
    (r"/artifacts/tokenizer/", "tokenizer"),
    (r"/artifacts/shards/", "shards"),
    (r"/artifacts/[^.]", "artefact"),
    (r"/checkpoints/", "published"),
    (r"/runs/.*/(report\.|figures/|losses/|tokens\.json)", "report"),
    (r"/runs/.*/(manifest\.json|config\.yaml)$", "manifest"),
)


@dataclass(frozen=True)
class Moment:
    """Where a process is killed: the `count`-th time that it passes `place`; never where place is "".

    half: the file that is about to be synced loses its second half first, as if that had never reached the disk.
    journal: where the process notes what it did.
    """

    place: str
    count: int
    half: bool
    journal: str

    def spec(self) -> str:
        """As a word of a command line."""
        return json.dumps(asdict(self))


def place_of(path: str) -> str | None:
    """What is written to a path, temporary or not; None where it is nothing of interest."""
    final = _TEMPORARY.sub(r"/\1", path)
    return next((name for pattern, name in _PLACES if re.search(pattern, final)), None)


class Moments:
    """The wrappers of one process. `install` puts them in place for good."""

    def __init__(self, moment: Moment) -> None:
        self.moment, self.passed = moment, Counter[str]()
        self._journal = os.open(moment.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._pid = os.getpid()

    def note(self, *words: object) -> None:
        """One line of the journal; a single write, which a kill cannot cut."""
        os.write(self._journal, ("\t".join(map(str, words)) + "\n").encode())

    def reached(self, place: str | None, path: str | None = None) -> None:
        """Count a place, and end the process where it is the chosen one. Forked workers go on."""
        if place is None or os.getpid() != self._pid:
            return
        self.passed[place] += 1
        if place == self.moment.place and self.passed[place] == self.moment.count:
            if self.moment.half and path is not None and os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
            self.note("killed", place, path or "")
            os.kill(self._pid, signal.SIGKILL)

    def install(self) -> None:
        """Wrap what is watched; imports Lightning."""
        from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
        from lightning.pytorch.loops.fit_loop import _FitLoop
        from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

        os.fsync = self._around_sync(os.fsync)
        os.replace, os.rename = self._around_rename(os.replace), self._around_rename(os.rename)
        _EvaluationLoop._evaluation_step = self._before(_EvaluationLoop._evaluation_step, "validation")
        _TrainingEpochLoop.advance = self._around_batch(_TrainingEpochLoop.advance)
        _FitLoop.on_run_end = self._before(_FitLoop.on_run_end, "last step")
        self.note("started", self._pid)

    def _around_sync(self, sync: Callable[[int], None]) -> Callable[[int], None]:
        def call(handle: int) -> None:
            path = os.readlink(f"/proc/self/fd/{handle}")
            self.reached(place_of(path), path)
            sync(handle)

        return call

    def _around_rename(self, rename: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any, **options: Any) -> None:
            place = place_of(str(target))
            self.reached(place)
            rename(source, target, **options)
            if place == "checkpoint":
                self.note("saved")
            self.reached(place)

        return call

    def _before(self, function: Callable[..., Any], place: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.reached(place)
            return function(*arguments, **options)

        return call

    def _around_batch(self, advance: Callable[..., None]) -> Callable[..., None]:
        seen: set[str] = set()

        def call(loop: Any, *arguments: Any) -> None:
            fit, before = Path(loop.trainer.default_root_dir).name, loop.global_step
            if fit not in seen:
                seen.add(fit)
                self.note("from", fit, before)
            last = before == loop.max_steps - 1
            self.reached("last step" if last else "anywhere")
            advance(loop, *arguments)
            if loop.global_step > before:
                self.note("step", fit, loop.global_step)
            self.reached("last step" if last else "anywhere")

        return call


def run_train(moment: Moment, arguments: list[str]) -> None:
    """What `python train.py ARGUMENTS` does, with the wrappers in place; ends by SystemExit or not at all."""
    Moments(moment).install()
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


if __name__ == "__main__":
    run_train(Moment(**json.loads(sys.argv[1])), sys.argv[2:])
