"""Sweeps by Hydra's sweepers and launchers: what is missing or failed runs and nothing else, whatever the end."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from nano_think.phases import sweep as sweep_module
from nano_think.phases.journal import Journal

# A project whose jobs train nothing: each notes that it ran, and ends as the test has asked for its seed. A module
# of its own, because a launcher may run it in other processes.
PROJECT = '''
import json
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from nano_think.errors import UserError
from nano_think.phases import sweep

class Stopped(BaseException):
    """As a process that is killed, for whoever waits for it."""

def phase(cfg):
    root, seed, rate = Path(cfg.run.root), cfg.seed, cfg.rate
    with open(root / "log", "a") as file:
        file.write(json.dumps([seed, rate]) + "\\n")
    trouble = json.loads((root / "trouble.json").read_text())
    above, kind = trouble.get("above", [10**6, ""])
    kind = trouble.get(str(seed), kind if rate > above else "")
    if kind == "stop":
        raise Stopped
    if kind == "mistake":
        raise UserError("the corpus is empty: add text")
    if kind == "bug":
        raise ZeroDivisionError("division by zero\\nsecond line")
    folder, loss = Path(HydraConfig.get().runtime.output_dir), (seed * 7) % 11 + (rate - 3.0) ** 2
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    result = {"objective": loss, "val_loss": {"transformer": loss}, "report": "x"}
    (folder / "manifest.json").write_text(json.dumps({"result": result}))
    return loss

def job(cfg):
    sweep.run_phase = phase
    return sweep.run_job(cfg)

def main():
    try:
        hydra.main(version_base="1.3", config_path=str(Path(__file__).parent), config_name="config")(job)()
    finally:
        failed = sweep.close()
    return f"error: {failed}" if failed else ""
'''
CONFIG = """
defaults: [{override hydra/job_logging: none}, {override hydra/hydra_logging: none}, _self_]
hydra:
  sweep: {dir: "${run.root}/sweeps", subdir: "${hydra.job.num}"}
  callbacks: {sweep: {_target_: nano_think.phases.sweep.SweepJournal}}
phase: {name: small}
run: {root: "", sweep_dir: null}
seed: 1
expert_seed: null
rate: 1.0
resume: auto
"""
SEEDS = "seed=1,2,3,4,5,6"


class Sweeps:
    """Sweeps of the project above in this process, below a folder of its own."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.patch = root, monkeypatch
        root.mkdir()
        self.trouble()

    def trouble(self, **by_seed: Any) -> None:
        """How jobs end from now on: seed_3="stop", "mistake" or "bug", above=(rate, the same)."""
        named = {key.removeprefix("seed_"): how for key, how in by_seed.items()}
        (self.root / "trouble.json").write_text(json.dumps(named))

    def __call__(self, *arguments: str) -> str:
        """Its error line, "" for success, "stopped" where a job was stopped."""
        GlobalHydra.instance().clear()
        self.patch.setattr(sys, "argv", ["train.py", "-m", f"run.root={self.root}", *arguments])
        self.patch.setattr(sweep_module, "run_phase", sweep_module.run_phase)
        try:
            return import_module("small_project").main()
        except SystemExit as end:
            return str(end.code or "")
        except BaseException as error:
            if type(error).__name__ != "Stopped":
                raise
            return "stopped"

    def ran(self) -> list[list[float]]:
        """Seed and rate of the jobs that have run since the last call."""
        log = self.root / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def seeds(self) -> list[float]:
        return [seed for seed, _ in self.ran()]

    @property
    def folder(self) -> Path:
        [folder] = (self.root / "sweeps" / "small").iterdir()
        return folder

    def jobs(self) -> dict[str, Any]:
        return Journal(self.folder).read()["jobs"]

    def table(self) -> list[list[str]]:
        """The rows of the summary."""
        lines = (self.folder / "summary.md").read_text().splitlines()[4:]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeps:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "small_project.py").write_text(PROJECT)
    (tmp_path / "modules" / "config.yaml").write_text(CONFIG)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "small_project", raising=False)
    return Sweeps(tmp_path / "outputs", monkeypatch)


@pytest.fixture
def another(tmp_path: Path, sweep: Sweeps) -> Callable[[], Sweeps]:
    """A second folder, for what would have happened."""
    return lambda: Sweeps(tmp_path / "others", sweep.patch)


def test_a_sweep_that_was_stopped_goes_on_with_what_is_missing(sweep: Sweeps, capsys) -> None:
    sweep.trouble(seed_4="stop")
    assert sweep(SEEDS) == "stopped"
    assert sweep.seeds() == [1, 2, 3, 4]
    assert [job["state"] for job in sweep.jobs().values()] == ["done"] * 3 + ["running"] + ["waiting"] * 2
    sweep.trouble()
    capsys.readouterr()
    assert sweep(SEEDS) == ""
    assert sweep.seeds() == [4, 5, 6]
    # (seed * 7) % 11 + 4, the smallest first
    assert [(row[1], row[2], row[3], row[4]) for row in sweep.table()] == [
        ("seed=5", "done", "1", "6"),
        ("seed=2", "done", "1", "7"),
        ("seed=4", "done", "2", "10"),
        ("seed=1", "done", "1", "11"),
        ("seed=6", "done", "1", "13"),
        ("seed=3", "done", "1", "14"),
    ]
    assert capsys.readouterr().out.count("validation loss") == 1
    content = json.loads((sweep.folder / "sweep.json").read_text())
    assert content["command"] == f"python train.py -m run.root={sweep.root} {SEEDS}"
    assert content["jobs"]["3"]["figures"] == {"objective": 10.0, "val_loss.transformer": 10.0}


def test_what_is_done_is_not_done_again_unless_asked(sweep: Sweeps) -> None:
    assert sweep("seed=1,2") == ""
    assert sweep.seeds() == [1, 2]
    assert sweep("seed=1,2") == ""
    assert sweep.seeds() == []
    assert len(sweep.table()) == 2
    assert sweep("seed=1,2", "resume=never") == ""
    assert sweep.seeds() == [1, 2]
    assert [job["attempts"] for job in sweep.jobs().values()] == [2, 2]


def test_a_failed_job_stops_no_other_and_is_tried_again(sweep: Sweeps) -> None:
    sweep.trouble(seed_2="mistake", seed_3="bug")
    message = sweep("seed=1,2,3,4")
    assert message == "error: 2 of 4 jobs failed (1, 2): the same command tries them again"
    assert sweep.seeds() == [1, 2, 3, 4]
    reasons = {row[1]: (row[2], row[5]) for row in sweep.table()}
    assert reasons["seed=2"] == ("failed", "the corpus is empty: add text")
    assert reasons["seed=3"] == ("failed", "ZeroDivisionError: division by zero")
    assert reasons["seed=4"] == ("done", "–")
    sweep.trouble(seed_3="bug")
    assert sweep("seed=1,2,3,4").startswith("error: 1 of 4 jobs failed (2)")
    assert sweep.seeds() == [2, 3]
    assert [job["attempts"] for job in sweep.jobs().values()] == [1, 2, 2, 1]


def test_another_command_has_another_folder(sweep: Sweeps) -> None:
    assert sweep("seed=1,2") == ""
    assert sweep("seed=1,2", "rate=2.0") == ""
    assert sweep.seeds() == [1, 2, 1, 2]
    assert len(list((sweep.root / "sweeps" / "small").iterdir())) == 2


def test_other_settings_in_a_named_folder_are_refused_with_what_differs(sweep: Sweeps) -> None:
    named = f"run.sweep_dir={sweep.root / 'mine'}"
    assert sweep("seed=1,2", named) == ""
    message = sweep("seed=1,2", "rate=2.0", named)
    assert re.fullmatch(
        r"error: \S+/mine holds another sweep: this command has rate=2.0; "
        r"give run.sweep_dir=... for a sweep of its own",
        message,
    )
    assert "it had seed=1,2, this command has seed=1,2,3" in sweep("seed=1,2,3", named)
    assert sweep.seeds() == [1, 2]


def test_a_default_that_has_changed_is_refused_with_both_values(sweep: Sweeps) -> None:
    """As after an edit in conf/: the command is the same, a job that is done would be another one."""
    sweep.trouble(seed_2="stop")
    sweep("seed=1,2")
    config = sweep.folder / "0" / "config.yaml"
    config.write_text(config.read_text().replace("rate: 1.0", "rate: 5.0"))
    sweep.ran()
    message = sweep("seed=1,2")
    assert "/0 was made with rate=5.0, it is rate=1.0 now" in message
    assert sweep.seeds() == []


def test_the_same_sweep_twice_at_once_is_refused(sweep: Sweeps) -> None:
    sweep("seed=1,2")
    with Journal(sweep.folder).alone():
        assert "is going on in another process" in sweep("seed=1,2")
    assert sweep("seed=1,2") == ""


def test_joblib_runs_what_is_missing_beside_each_other(sweep: Sweeps) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install nano_think[sweep]")
    sweep.trouble(seed_2="bug", seed_3="mistake")
    assert "2 of 4 jobs failed (1, 2)" in sweep(
        "seed=1,2,3,4", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"
    )
    assert sorted(sweep.seeds()) == [1, 2, 3, 4]
    sweep.trouble()
    # the launcher is how, not what: the same sweep
    assert sweep("seed=1,2,3,4", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1") == ""
    assert sorted(sweep.seeds()) == [2, 3]
    assert [job["attempts"] for job in sweep.jobs().values()] == [1, 2, 2, 1]


OPTUNA = ("hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.n_startup_trials=3")
OPTUNA += ("rate=interval(0.5,5.0)",)


@pytest.fixture
def _optuna() -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="see README, Sweep")
    optuna = pytest.importorskip("optuna", minversion="4")
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.mark.usefixtures("_optuna")
def test_an_optuna_study_goes_on_as_if_it_had_never_stopped(sweep: Sweeps, another) -> None:
    """More trials than the random ones at the start (3): what is asked next depends on every value before."""
    undisturbed = another()
    undisturbed(*OPTUNA, "hydra.sweeper.n_trials=7")
    expected = undisturbed.ran()
    assert len({rate for _, rate in expected}) == 7
    sweep.trouble(above=(sorted(rate for _, rate in expected)[-1] - 1e-9, "stop"))
    assert sweep(*OPTUNA, "hydra.sweeper.n_trials=7") == "stopped"
    first = sweep.ran()
    assert first == expected[: len(first)]
    assert len(first) < 7
    sweep.trouble()
    assert sweep(*OPTUNA, "hydra.sweeper.n_trials=6") == ""
    second = sweep.ran()
    assert sweep(*OPTUNA, "hydra.sweeper.n_trials=7") == ""
    assert [*first[:-1], *second, *sweep.ran()] == expected
    best = min(expected, key=lambda point: (point[1] - 3.0) ** 2)
    assert f"={best[1]}" in sweep.table()[0][1]


@pytest.mark.usefixtures("_optuna")
def test_an_optuna_trial_that_failed_is_tried_again_and_nothing_is_lost(sweep: Sweeps) -> None:
    sweep.trouble(above=(3.0, "bug"))
    message = sweep(*OPTUNA, "hydra.sweeper.n_trials=6")
    tried = sweep.ran()
    bad = [point for point in tried if point[1] > 3.0]
    assert bad
    assert message.startswith(f"error: {len(bad)} of 6 jobs failed")
    sweep.trouble()
    assert sweep(*OPTUNA, "hydra.sweeper.n_trials=6") == ""
    again = sweep.ran()
    # what is asked after a success may be another point than after a failure: the points that are done stay
    assert again[0] == bad[0]
    done = [point for point in tried if point not in bad]
    assert not [point for point in again if point in done]
    assert {row[2] for row in sweep.table()} == {"done"}
    rates = {float(row[1].rpartition("=")[2]) for row in sweep.table()}
    assert rates == {rate for _, rate in [*done, *again]}
    for name, job in sweep.jobs().items():
        config = (sweep.folder / job["folder"] / "config.yaml").read_text()
        assert f"\n{job['overrides'][0].replace('=', ': ')}\n" in config, name
