"""The table at the end of a multirun: one row a job, what it changed, how it ended, what it reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from nano_think.evals.report import Table, render_table
from nano_think.files import atomic_write, write_json
from nano_think.phases.run import console


class SweepSummary(Callback):
    """Writes summary.md and summary.json into the sweep folder and shows the table."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Read the manifests of all jobs."""
        folder = Path(config.hydra.sweep.dir)
        jobs = [read_job(path) for path in sorted(folder.glob("*/manifest.json"), key=_number)]
        if not jobs:
            return
        table = summary_table(jobs)
        write_json(folder / "summary.json", jobs)
        atomic_write(folder / "summary.md", table.markdown() + "\n")
        screen = console()
        render_table(table, screen)
        screen.print(f"summary: {folder / 'summary.md'}", highlight=False)


def read_job(manifest: Path) -> dict[str, Any]:
    """Folder, overrides, status and result of one job."""
    content = json.loads(manifest.read_text())
    result = content.get("result") or {}
    return {
        "job": manifest.parent.name,
        "overrides": content["command"][1:],
        "status": content["status"],
        "objective": result.get("objective"),
        "error": content.get("error"),
    }


def summary_table(jobs: list[dict[str, Any]]) -> Table:
    """One row a job with the overrides in which the jobs differ."""
    common = set.intersection(*(set(job["overrides"]) for job in jobs))
    rows = []
    for job in jobs:
        own = " ".join(o for o in job["overrides"] if o not in common)
        rows.append([job["job"], own or "-", job["status"], _objective(job)])
    return Table(["job", "settings", "status", "validation loss"], rows, title="Sweep")


def _objective(job: dict[str, Any]) -> Any:
    return job["error"] if job["objective"] is None and job["error"] else job["objective"]


def _number(manifest: Path) -> tuple[int, str]:
    name = manifest.parent.name
    return (int(name) if name.isdigit() else -1, name)
