"""A command that did not end goes on in its folder; any other begins a new one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from nano_think import files
from nano_think.errors import UserError
from nano_think.phases import trainer
from nano_think.phases.resume import continued, what_stays

TYPED = ["phase=expert", "seed=3"]


@pytest.fixture
def run(tmp_path):
    """`run(name, status, command)`: a run folder with its manifest; the newest one is that of the last call."""

    def make(name, status, command=TYPED, **more):
        folder = tmp_path / "runs" / "expert" / name
        files.write_json(
            folder / "manifest.json", {"command": ["train.py", *command], "status": status, **more}
        )
        os.utime(folder / "manifest.json", (make.time, make.time))
        make.time += 1
        return folder

    make.time = 1_000_000_000
    return make


@pytest.fixture
def typed(tmp_path):
    """What `continued` makes of TYPED and more, as the root of the fixture `run`."""
    root = f"run.root={tmp_path}"

    def ask(*more):
        arguments = [*TYPED, *more, root]
        result = continued(arguments)
        assert result[: len(arguments)] == arguments
        return result[len(arguments) :]

    ask.command = [*TYPED, root]
    return ask


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_a_run_that_did_not_end_goes_on_in_its_folder(run, typed, status):
    folder = run("1", status, typed.command)
    assert typed() == [f"run.dir='{folder}'"]
    # and again, although the command in the manifest says by now where it went on
    run("1", status, [*typed.command, f"run.dir='{folder}'"])
    assert typed() == [f"run.dir='{folder}'"]


def test_a_run_that_ended_is_not_touched(run, typed):
    run("1", "interrupted", typed.command)
    run("2", "done", typed.command)
    assert typed() == []


def test_only_the_newest_run_of_the_same_command_counts(run, typed):
    run("1", "interrupted", typed.command)
    newest = run("2", "interrupted", typed.command)
    run("3", "interrupted", [*typed.command, "size=tiny"])
    run("4", "running", ["phase=mla"])
    (newest.parent / "5").mkdir()
    (newest.parent / "5" / "manifest.json").write_text('{"half of')
    assert typed() == [f"run.dir='{newest}'"]


@pytest.mark.parametrize("more", ["resume=never", "run.dir=elsewhere", "-m", "--multirun", "--cfg"])
def test_who_says_where_or_that_it_begins_anew_is_heard(run, typed, more, tmp_path):
    run("1", "interrupted", [*TYPED, *([] if more.startswith("-") else [more]), f"run.root={tmp_path}"])
    assert typed(more) == []


def test_a_run_that_lives_keeps_its_folder_to_itself(run, typed):
    folder = run("1", "running", typed.command)
    code = "import sys\nfrom nano_think import files\nwith files.sole_owner('.') as alone:\n"
    code += "    print(alone, flush=True)\n    sys.stdin.read()"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes) as other:
        assert other.stdout.readline() == "True\n"
        assert typed() == []
        other.kill()
    assert typed() == [f"run.dir='{folder}'"]


def test_a_folder_with_an_apostrophe_is_a_folder(typed, run, tmp_path):
    root = tmp_path / "it's"
    command = [*TYPED, f"run.root='{tmp_path}/it\\'s'"]
    files.write_json(
        root / "runs/x/1/manifest.json", {"command": ["train.py", *command], "status": "running"}
    )
    assert continued(command)[-1] == f"run.dir='{tmp_path}/it\\'s/runs/x/1'"


def test_the_manifest_keeps_what_earlier_starts_measured(run):
    folder = run("1", "failed", fits={"transformer": {"choices": 1}}, error="x", starts=2, result=5)
    assert what_stays(folder) == {"starts": 3, "fits": {"transformer": {"choices": 1}}}
    assert what_stays(folder.parent) == {"starts": 1}


STEPS = (
    "phase=expert",
    "expert=transformer",
    "trainer.max_steps=4",
    "callbacks.checkpoint.every_n_train_steps=1",
)


def test_an_interrupted_phase_goes_on_in_the_folder_it_is_given(project, monkeypatch):
    """The whole way: `run_phase` is stopped in its fit and called again for the same folder."""
    start = trainer.L.Trainer.fit

    def stop(self, task, **options):
        class Stop(trainer.L.Callback):
            def on_train_batch_start(self, trainer, *_):
                if trainer.global_step == 2:
                    raise KeyboardInterrupt

        self.callbacks.append(Stop())
        start(self, task, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.L.Trainer, "fit", stop)
        with pytest.raises(KeyboardInterrupt):
            project.phase(*STEPS)
    folder = project.root / "runs" / "1"
    assert json.loads((folder / "manifest.json").read_text())["status"] == "interrupted"
    project.runs = 0
    assert project.phase(*STEPS) == folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["status"], manifest["starts"]) == ("done", 2)
    [result] = [
        project.root / "artifacts" / "transformer" / name
        for name, kind in manifest["artifacts"].items()
        if kind == "transformer"
    ]
    assert json.loads((result / "provenance.json").read_text())["result"]["steps"] == 4
    assert not list(project.root.rglob("*.tmp"))
    assert not list(project.root.glob("artifacts/.work/*"))


def test_two_processes_do_not_share_a_run_folder(project, monkeypatch):
    project.phase("phase=data")
    with files.sole_owner(project.root / "runs" / "1") as alone:
        assert alone
        project.runs = 0
        with pytest.raises(UserError, match="another process is at work"):
            project.phase("phase=data")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "7", "[" * 100_000, '{"command": 7}', '{"command": [1]}', '{"command": [], "status": []}',
     '{"command": ["train.py"], "starts": "2"}', '{"command": ["train.py"], "fits": []}',
     '{"command": ["train.py"], "fits": {"transformer": 7}}',
     r'{"command": ["train.py"], "fits": {"transformer": {"choices": "\ud800"}}}'],
    ids=range(12),
)  # fmt: skip
def test_a_damaged_manifest_belongs_to_no_run_and_hinders_none(run, typed, content, tmp_path):
    damaged = run("1", "failed", typed.command)
    (damaged / "manifest.json").write_text(content)
    assert typed() == []
    assert continued([f"run.root={tmp_path}"]) == [f"run.root={tmp_path}"]
    assert what_stays(damaged) == {"starts": 1}
    sound = run("2", "failed", typed.command)
    assert typed() == [f"run.dir='{sound}'"]
