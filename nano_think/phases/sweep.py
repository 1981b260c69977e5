"""Sweeps: a command that is issued again goes on, a failed job stops no other, one table shows all of them.

Hydra's sweepers and launchers are used as they are. The callback below opens the journal of the sweep before any
job, `run_job` keeps it from inside each job, in whatever process that runs, and `close` shows the table.
"""

from __future__ import annotations

import json
import shlex
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from nano_think.config import override_name
from nano_think.errors import UserError, brief
from nano_think.evals.report import Table, render_table
from nano_think.files import atomic_write, hash_json, write_json
from nano_think.phases.journal import DONE, FAILED, INTERRUPTED, OWN, Job, Journal
from nano_think.phases.run import console, run_phase

# How a sweep is carried out and not what it asks: with these changed it is the same sweep.
HOW = {"resume", "prerequisites", "run.root", "run.dir", "run.sweep_dir", "hydra.sweeper.n_trials"}
HYDRA_ASKS = ("hydra/sweeper", "hydra.sweeper")

# The sweep of this process: Hydra makes the callback, and `close` is called when Hydra is through.
_open: list[tuple[Journal, ExitStack]] = []


class SweepJournal(Callback):
    """Opens the journal of a sweep before its first job."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Find the folder of the sweep and what is done of it; leave with one line where it does not fit."""
        try:
            open_sweep(config, GlobalHydra.instance().config_loader())
        except UserError as error:
            sys.exit(f"error: {error}")  # Hydra makes a warning of an exception here


def open_sweep(config: DictConfig, loader: ConfigLoader) -> None:
    """Open the journal in `run.sweep_dir`, else in the folder of the command; UserError for what has changed."""
    task, of_hydra = list(config.hydra.overrides.task), list(config.hydra.overrides.hydra)
    asked = [*_asked(task), *(o for o in _asked(of_hydra) if override_name(o).startswith(HYDRA_ASKS))]
    named = Path(config.run.root) / "sweeps" / config.phase.name / hash_json(asked)[:12]
    folder = Path(config.run.sweep_dir or named)
    with read_write(config), open_dict(config):
        config.hydra.sweep.dir = str(folder)
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={json.dumps(str(folder))}")
        if OmegaConf.select(config, "hydra.sweeper.sampler.seed", default=0) is None:
            # a study that goes on is one that is repeated, with the values of what is done: see `Journal.begin`
            config.hydra.sweeper.sampler.seed = int(config.seed)
    journal, stack = Journal(folder), ExitStack()
    with stack:
        stack.enter_context(journal.alone())
        _refuse_changed_settings(journal, config, loader)
        command = shlex.join(["python", "train.py", "-m", *task, *_typed(of_hydra)])
        journal.open(command, asked, _jobs(config, loader, task), again=config.resume == "never")
        _open.append((journal, stack.pop_all()))
    jobs = journal.read()["jobs"].values()
    done = sum(job["state"] == DONE for job in jobs)
    console().print(
        f"sweep folder: {folder}" + f", {done} of {len(jobs)} jobs done before" * bool(jobs), highlight=False
    )


def run_job(cfg: DictConfig) -> float | None:
    """One job of a sweep: its phase, unless it is done; what goes wrong is entered and the sweep goes on.

    Returns the objective, None for a job that failed or has none.
    """
    hydra = HydraConfig.get()
    journal, number = Journal(Path(hydra.sweep.dir)), int(hydra.job.num)
    overrides, screen = _asked(hydra.overrides.task), console()
    if (before := journal.begin(number, overrides)) is not None:
        return before.get("objective")
    screen.print(f"[bold]job {number}[/bold]: {' '.join(overrides)}", highlight=False, soft_wrap=True)
    try:
        objective = run_phase(cfg)
    except KeyboardInterrupt:
        journal.end(number, INTERRUPTED)
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {_first_line(error)}"
        screen.print(f"job {number} failed: {reason}", markup=False, highlight=False, soft_wrap=True)
        journal.end(number, FAILED, error=reason)
        return None
    manifest = json.loads((Path(hydra.runtime.output_dir) / "manifest.json").read_text())
    journal.end(number, DONE, objective=objective, figures=_figures(manifest["result"]))
    return objective


def close() -> str | None:
    """Show the table of the sweep of this process, if there is one; returns what to say where a job has failed."""
    if not _open:
        return None
    journal, stack = _open.pop()
    with stack:
        content = journal.read()
        jobs = content["jobs"]
        table = summary_table(jobs)
        write_json(journal.folder / "summary.json", list(jobs.values()))
        atomic_write(journal.folder / "summary.md", table.markdown() + "\n")
        screen = console()
        render_table(table, screen)
        screen.print(f"summary: {journal.folder / 'summary.md'}", highlight=False, soft_wrap=True)
    failed = [name for name, job in jobs.items() if job["state"] == FAILED]
    if not failed:
        return None
    return (
        f"{len(failed)} of {len(jobs)} jobs failed ({', '.join(failed)}): the same command tries them again"
    )


def summary_table(jobs: dict[str, Job]) -> Table:
    """One row a job with the overrides in which the jobs differ, the smallest objective first."""
    common = set.intersection(*(set(job["overrides"]) for job in jobs.values())) if jobs else set()
    failed = any("error" in job for job in jobs.values())
    rows = []
    for name, job in sorted(jobs.items(), key=_rank):
        own = " ".join(o for o in job["overrides"] if o not in common)
        row = [name, own or "-", job["state"], job["attempts"], job.get("objective")]
        rows.append([*row, job.get("error")] if failed else row)
    headers = ["job", "settings", "state", "attempts", "validation loss", *["reason"] * failed]
    return Table(headers, rows, title="Sweep")


def _rank(item: tuple[str, Job]) -> tuple[bool, float, tuple[int, ...]]:
    name, job = item
    objective = job.get("objective")
    return objective is None, objective or 0.0, tuple(int(part) for part in name.split("."))


def _jobs(config: DictConfig, loader: ConfigLoader, task: list[str]) -> list[list[str]] | None:
    """What Hydra's own sweeper will run, in its order; None for one that decides on the way."""
    sweeper = config.hydra.sweeper
    if not sweeper._target_.endswith(".BasicSweeper"):
        return None
    stated = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*stated, *task])
    [jobs] = BasicSweeper.split_arguments(parsed, None)
    return [_asked(job) for job in jobs]


def _refuse_changed_settings(journal: Journal, config: DictConfig, loader: ConfigLoader) -> None:
    """Raise UserError where a job that is done would be another one now: a YAML file or a default has changed."""
    for job in journal.read()["jobs"].values():
        if job["state"] != DONE or config.resume == "never":
            continue
        path = journal.folder / job["folder"] / "config.yaml"
        with open_dict(composed := loader.load_sweep_config(config, job["overrides"])):
            del composed["hydra"]
        before, now = settings_in(path), _settings(composed)
        changed = sorted(key for key in before | now if before.get(key) != now.get(key))
        if changed:
            first = changed[0]
            was, are = (
                f"{first}={values[first]}" if first in values else f"no {first}" for values in (before, now)
            )
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise UserError(
                f"{path.parent} was made with {was}, it is {are} now{more}: set it back, or {OWN}"
            )


def settings_in(path: Path) -> dict[str, Any]:
    """What decided the outcome of a job, of the config.yaml in its folder; UserError where that is damaged."""
    try:
        return _settings(OmegaConf.load(path))
    except Exception as error:  # yaml's errors, OmegaConf's, and those of a file that is no mapping
        raise UserError(f"{path} is damaged ({brief(error)}): delete {path.parent}, or {OWN}") from error


def _settings(cfg: Any) -> dict[str, Any]:
    """Dotted keys and values of what decides a job's outcome."""
    leaves: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, dict | list) and value:
                walk(value, f"{prefix}{key}.")
            else:
                leaves[f"{prefix}{key}"] = value

    walk(OmegaConf.to_container(cfg, resolve=True), "")
    # a phase of experts takes expert_seed as its seed
    without = HOW | ({"seed"} if leaves.get("expert_seed") is not None else set())
    return {key: value for key, value in leaves.items() if key not in without}


def _asked(overrides: Any) -> list[str]:
    return [o for o in overrides if override_name(o) not in HOW]


def _typed(of_hydra: Any) -> list[str]:
    """Overrides of Hydra that the user has typed."""
    return [
        o for o in of_hydra if override_name(o) not in ("hydra.mode", "hydra.searchpath", "hydra.sweep.dir")
    ]


def _reason(error: Exception) -> str | None:
    """What the user can mend, in one line; None for any other error."""
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, UserError):
        error = error.__cause__
    return _first_line(error) if isinstance(error, UserError) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _figures(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of a phase's result, those of its parts by dotted name."""
    flat: dict[str, float] = {}
    for key, value in result.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": number for name, number in _figures(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[key] = value
    return flat
