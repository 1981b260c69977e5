"""What a sweep was asked to do and how far each of its jobs is: one file, written by many processes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from nano_think.errors import UserError, brief
from nano_think.files import locked, read_json, write_json

Job = dict[str, Any]
# A job's number, with that of an earlier one of the same number; its folder is called so too.
NAME = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
WAITING, RUNNING, DONE, FAILED, INTERRUPTED = "waiting", "running", "done", "failed", "interrupted"


class Journal:
    """`sweep.json` in the folder of a sweep.

    command: as typed. asked: settings by which the same sweep is recognised. jobs: by number, each with its
    overrides, state (waiting, running, done, failed, interrupted), folder, number of attempts, and once it has
    ended its objective and figures, or the error.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "sweep.json"

    def read(self) -> dict[str, Any]:
        """The content; without jobs where there is none yet. Raises UserError where it is damaged."""
        if not self.path.exists():
            return {"jobs": {}}
        try:
            content: dict[str, Any] = read_json(self.path)
            _check(content)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path} is damaged ({brief(error)}): delete it, and the same command runs all jobs, or {OWN}"
            ) from error
        return content

    @contextmanager
    def change(self) -> Iterator[dict[str, Any]]:
        """The content, which is written when the block ends; nobody else writes meanwhile."""
        with locked(self.folder / ".sweep.json.lock"):
            content = self.read()
            yield content
            write_json(self.path, content)

    def alone(self) -> AbstractContextManager[None]:
        """Held while the sweep goes on; UserError where the same sweep is going on already."""

        def refuse() -> None:
            raise UserError(
                f"the sweep in {self.folder} is going on in another process: wait for it, or end it"
            )

        return locked(self.folder / ".running.lock", refuse)

    def open(self, command: str, asked: list[str], jobs: Sequence[list[str]] | None, again: bool) -> None:
        """Begin or go on: what has not ended waits again, and so does what failed; with `again` everything does.

        jobs: overrides of all jobs in their order, None where a sweeper decides on the way.
        Raises UserError, naming the difference, where the folder holds a sweep of other settings.
        """
        with self.change() as content:
            if "asked" in content and content["asked"] != asked:
                raise UserError(
                    f"{self.folder} holds another sweep: {_difference(content['asked'], asked)}; {OWN}"
                )
            for number, overrides in enumerate(jobs or []):
                job = content["jobs"].setdefault(str(number), _new(number, overrides))
                if job["overrides"] != overrides:
                    raise UserError(
                        f"job {number} of {self.folder} was {_shown(job)}, it is {' '.join(overrides)} now; {OWN}"
                    )
            content |= {
                "command": command,
                "asked": asked,
                "planned": len(jobs) if jobs is not None else None,
            }
            for job in content["jobs"].values():
                if again or job["state"] != DONE:
                    job["state"] = WAITING

    def begin(self, number: int, overrides: list[str]) -> Job | None:
        """Enter that a job runs; where one of its overrides is done already, that one is returned instead.

        A sweeper that decides on the way may come to other overrides for a number, once an earlier job that had
        failed has succeeded: what is done and lies in its folder is set aside first.
        """
        with self.change() as content:
            jobs = content["jobs"]
            for job in jobs.values():
                if job["state"] == DONE and job["overrides"] == overrides:
                    return job
            name = str(number)
            if name in jobs and jobs[name]["overrides"] != overrides:
                self._set_aside(jobs, name)
            job = jobs.setdefault(name, _new(number, overrides))
            job |= {"state": RUNNING, "attempts": job["attempts"] + 1}
            job.pop("error", None)
        return None

    def end(self, number: int, state: str, **known: Any) -> None:
        """Enter how a job ended."""
        with self.change() as content:
            content["jobs"][str(number)] |= {"state": state, **known}

    def _set_aside(self, jobs: dict[str, Job], name: str) -> None:
        if jobs[name]["state"] != DONE:
            del jobs[name]
            return
        aside = next(new for n in range(1, len(jobs) + 2) if (new := f"{name}.{n}") not in jobs)
        (self.folder / name).rename(self.folder / aside)
        (self.folder / name).mkdir()
        jobs[aside] = jobs.pop(name) | {"folder": aside}


OWN = "give run.sweep_dir=... for a sweep of its own"


def _check(content: dict[str, Any]) -> None:
    """Raise ValueError, LookupError, TypeError or AttributeError for what no journal says."""
    if not isinstance(content.get("command", ""), str) or not _texts(content.get("asked", [])):
        raise ValueError("command or asked is no text")
    for name, job in content["jobs"].items():
        if not NAME.fullmatch(name) or not NAME.fullmatch(job["folder"]):
            raise ValueError("a job has no number")
        if job["state"] not in (WAITING, RUNNING, DONE, FAILED, INTERRUPTED) or not _texts(job["overrides"]):
            raise ValueError(f"job {name} has a state or overrides that no job has")
        if type(job["attempts"]) is not int or not 0 <= job["attempts"] < 1 << 31:
            raise ValueError(f"job {name} was begun {job['attempts']!a:.40} times")
        figures = [job.get("objective"), *job.get("figures", {}).values()]
        if not all(figure is None or type(figure) in (int, float) for figure in figures):
            raise ValueError(f"a figure of job {name} is no number")
        if not isinstance(job.get("error") or "", str):
            raise ValueError(f"the error of job {name} is no text")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _new(number: int, overrides: list[str]) -> Job:
    return {"overrides": overrides, "state": WAITING, "folder": str(number), "attempts": 0}


def _shown(job: Job) -> str:
    return " ".join(job["overrides"]) or "without overrides"


def _difference(before: Sequence[str], now: Sequence[str]) -> str:
    """What two lists of settings do not share, in words."""
    parts = [f"it had {' '.join(gone)}" if (gone := [o for o in before if o not in now]) else ""]
    parts.append(f"this command has {' '.join(new)}" if (new := [o for o in now if o not in before]) else "")
    return (
        ", ".join(filter(None, parts))
        or "the same settings in another order, which numbers its jobs differently"
    )
