"""Two processes train what one does: the same batches, losses, selection and artefact, in one run folder.

Rows are padded, so that the ranks' batches hold different numbers of labels: a mean of their means would be seen.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from nano_think.phases import ranks
from nano_think.phases.expert import expert_maker
from nano_think.phases.run import Run
from tests.phases.conftest import STEPS, Project

WAIT = 600.0
# 6 steps with a validation after every 3; plain fp32, so that no process chooses its arithmetic by a clock.
FIT = (
    "phase=expert",
    "expert=transformer",
    "data.mode=padded",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
)
FIT += ("precision=32-true",)
# Adam divides a gradient by its size, and so do rounding errors grow where a gradient is small.
WEIGHTS, LOSSES = 2e-4, 2e-5
RANKS = ("trainer.devices=2", "trainer.accelerator=cpu")


class Failing(L.Callback):
    """Fails in the step after the first saved state, on the last rank."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 4 and trainer.global_rank == trainer.world_size - 1:
            raise RuntimeError("a plug was pulled")


class Slow(L.Callback):
    """Takes its time after the first saved state, so that an interrupt comes before the end."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 4:
            time.sleep(5)


FAILS = "++callbacks.failing._target_=tests.phases.test_two_processes.Failing"


def started(project: Project, *overrides: str) -> subprocess.Popen[str]:
    """`python train.py ...`, at work."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ranks.ENTRY.parent)}
    command = [sys.executable, str(ranks.ENTRY), *project.overrides(*overrides)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def train(project: Project, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`python train.py ...`, at its end."""
    with started(project, *overrides) as process:
        try:
            said, errors = process.communicate(timeout=WAIT)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, said, errors)


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def single(tmp_path_factory, shared_project) -> tuple[Run, Path]:
    """The fit in one process: the run and the artefact."""
    with shared_project(tmp_path_factory.mktemp("single")) as project:
        run = project.new(*FIT)
        return run, run.obtain(expert_maker(run, "transformer"))


def assert_same(single: tuple[Run, Path], made: Path) -> None:
    """The same artefact by address, with the weights, losses and figures of the fit in one process."""
    _, path = single
    assert made.name == path.name
    one, two = Run.result_of(path), Run.result_of(made)
    for name in ("steps", "tokens", "best_step", "epochs", "flops", "trained_parameters"):
        assert one[name] == two[name], name
    assert [step for step, _ in one["history"]] == [step for step, _ in two["history"]] == [0, 3, 6]
    for (_, expected), (_, value) in zip(one["history"], two["history"], strict=True):
        assert value == pytest.approx(expected, rel=LOSSES)
    assert one["history"][0][1] - one["history"][-1][1] > 0.3  # it learned
    assert_same_weights(path, made)


def assert_same_weights(path: Path, made: Path) -> None:
    files = sorted(path.glob("*.safetensors"))
    assert files
    for file in files:
        expected, found = load_file(file), load_file(made / file.name)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            apart = (tensor.double() - found[name].double()).abs().max()
            assert apart <= WEIGHTS * tensor.double().abs().max(), name


def test_ddp_equals_one_process_and_writes_once(single, project):
    said = succeeded(train(project, *FIT, *RANKS, "strategy=ddp"))
    assert said.count("building transformer") == said.count("building shards") == 1
    (made,) = (project.root / "artifacts" / "transformer").iterdir()
    assert_same(single, made)
    (folder,) = (project.root / "runs" / "expert").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["result"]["val_loss"]["transformer"] == Run.result_of(made)["val_loss"]
    assert (project.root / "checkpoints" / "transformer_expert" / "spec.json").is_file()
    events = list(folder.rglob("events.out.tfevents.*"))
    assert len({event.name.split(".")[-2] for event in events}) == 1  # of one process
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "hydra",
        "manifest.json",
        "tensorboard",
    }
    assert not list(project.root.rglob(".*.tmp"))
    assert not (project.root / "artifacts" / ".work" / made.name).exists()


def test_a_failing_rank_of_fsdp2_ends_all_and_one_process_goes_on(single, project):
    failed = train(project, *FIT, *RANKS, "strategy=fsdp2", FAILS)
    assert failed.returncode != 0
    assert "a plug was pulled" in failed.stderr
    (folder,) = (project.root / "runs" / "expert").iterdir()
    assert json.loads((folder / "manifest.json").read_text())["status"] == "failed"
    (state,) = (project.root / "artifacts" / ".work").glob("*/newest.ckpt")
    content = torch.load(state, weights_only=True)
    assert content["global_step"] == 3
    assert all(type(tensor) is torch.Tensor for tensor in content["state_dict"].values())
    run = project.new(*FIT)
    assert_same(single, run.obtain(expert_maker(run, "transformer")))
    assert "resuming transformer from" in run.console.file.getvalue()


def test_fsdp2_goes_on_from_one_process(single, project):
    run = project.new(*FIT, FAILS)
    with pytest.raises(RuntimeError, match="a plug was pulled"):
        run.obtain(expert_maker(run, "transformer"))
    assert "resuming transformer from" in succeeded(train(project, *FIT, *RANKS, "strategy=fsdp2"))
    (made,) = (project.root / "artifacts" / "transformer").iterdir()
    assert_same(single, made)


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [
        ("adamw", "fsdp2"),
        pytest.param("adamw", "ddp", marks=pytest.mark.slow),
        pytest.param("muon", "fsdp2", marks=pytest.mark.slow),
        pytest.param("muon", "ddp", marks=pytest.mark.slow),
    ],
)
def test_every_phase_equals_one_process(project, optimizer, strategy):
    """6a to 7d with memory; Muon turns whole matrices, of which a rank of FSDP2 holds a part.

    It turns rounding errors too: where a gradient has fewer directions than its matrix (that of the diffuser's few
    noise levels), what is left of it becomes a step as long as the others, in directions that change no loss.
    """
    settings = ("expert=all", *STEPS, "precision=32-true", f"optimizer={optimizer}", "data.mode=padded")
    settings += (f"++prereq.expert.optimizer={optimizer}",)
    alone = project.new("phase=mla", *settings)
    other = Project(project.root.parent / "two", project.texts)
    succeeded(train(other, "phase=mla", *settings, *RANKS, f"strategy={strategy}"))
    from nano_think.phases import mla

    mla.run(alone)
    kinds = ("transformer", "diffuser", "state_space", "mla_7a", "mla_7b", "mla_7c", "mla_7d")
    for kind in kinds:
        (one,), (two,) = ((root / "artifacts" / kind).iterdir() for root in (project.root, other.root))
        assert one.name == two.name
        expected, found = Run.result_of(one), Run.result_of(two)
        if "history" in expected:
            assert found["best_step"] == expected["best_step"]
            for (_, a), (_, b) in zip(expected["history"], found["history"], strict=True):
                assert b == pytest.approx(a, rel=LOSSES), kind
        if optimizer != "muon":
            assert_same_weights(one, two)


@pytest.mark.slow
def test_an_interrupt_is_agreed_on_saved_and_gone_on_from(single, project):
    """Ctrl+C comes to the ranks in different steps; the state is that of one step, and nothing of it is lost."""
    slow = "++callbacks.slow._target_=tests.phases.test_two_processes.Slow"
    process = started(project, *FIT, *RANKS, "strategy=ddp", slow)
    try:
        until = time.monotonic() + WAIT
        while not list((project.root / "artifacts").glob(".work/*/newest.ckpt")):
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "interrupted: the same command goes on" in errors
    (folder,) = (project.root / "runs" / "expert").iterdir()
    assert json.loads((folder / "manifest.json").read_text())["status"] == "interrupted"
    run = project.new(*FIT)
    assert_same(single, run.obtain(expert_maker(run, "transformer")))
    assert "resuming transformer from" in run.console.file.getvalue()
