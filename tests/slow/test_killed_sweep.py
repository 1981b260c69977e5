"""A sweep of six real jobs, killed midway and issued again, against one that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
JOBS = 6
PATIENCE = 1800


def command(root: Path, corpus: Path) -> list[str]:
    """Two learning rates times three seeds of a tiny Transformer."""
    settings = ["phase=expert", "expert=transformer", "training.transformer.lr=1e-3,3e-3", "seed=1,2,3"]
    settings += ["size=tiny", "size.vocab_size=290", "data=jsonl", f"data.root={corpus}", "data.val_rows=2"]
    settings += ["trainer.max_steps=30", "callbacks.checkpoint.every_n_train_steps=10", f"run.root={root}"]
    return [sys.executable, str(ROOT / "train.py"), "-m", *settings]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def journal(root: Path) -> dict[str, Any]:
    paths = list(root.glob("sweeps/expert/*/sweep.json"))
    return json.loads(paths[0].read_text())["jobs"] if paths else {}


def wait(process: subprocess.Popen[bytes], ends: float) -> None:
    assert process.poll() is None
    assert time.monotonic() < ends
    time.sleep(0.05)


def kill_midway(root: Path, corpus: Path) -> dict[str, Any]:
    """SIGKILL while the third job runs; the jobs as they were left."""
    with subprocess.Popen(command(root, corpus), env=environment(), stdout=subprocess.DEVNULL) as process:
        ends = time.monotonic() + PATIENCE
        while [job["state"] for job in journal(root).values()][2:3] != ["running"]:
            wait(process, ends)
        while (
            not list(root.glob("artifacts/.work/transformer-*/*.ckpt"))
            and journal(root)["2"]["state"] == "running"
        ):
            wait(process, ends)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return journal(root)


def finish(root: Path, corpus: Path) -> str:
    run = subprocess.run(
        command(root, corpus),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
def test_six_jobs_killed_midway_run_exactly_what_is_missing(tmp_path: Path) -> None:
    corpus = tmp_path / "texts" / "one"
    corpus.mkdir(parents=True)
    lines = [
        json.dumps({"text": f"{n}: the cat sat on mat {n * n}, and a dog ran over hill {n % 7}"})
        for n in range(120)
    ]
    (corpus / "part.jsonl").write_text("\n".join(lines) + "\n")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    left = kill_midway(killed, corpus.parent)
    states = [job["state"] for job in left.values()]
    assert len(states) == JOBS
    assert states.count("done") == 2
    assert states.count("running") == 1
    printed = finish(killed, corpus.parent)
    jobs = journal(killed)
    attempts = [job["attempts"] for job in jobs.values()]
    assert attempts == [1, 1, 2, 1, 1, 1]
    assert [line for line in printed.splitlines() if line.startswith("job ")] == [
        line for line in printed.splitlines() if line.startswith(("job 2:", "job 3:", "job 4:", "job 5:"))
    ]
    assert printed.count("validation loss ┃") == 1
    finish(whole, corpus.parent)
    undisturbed = journal(whole)
    for name, job in jobs.items():
        assert job["state"] == "done"
        assert job["objective"] == undisturbed[name]["objective"], name
    table = next(killed.glob("sweeps/expert/*/summary.md")).read_text().splitlines()[4:]
    losses = [float(row.split("|")[5]) for row in table]
    assert len(losses) == JOBS
    assert losses == sorted(losses)
