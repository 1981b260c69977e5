from __future__ import annotations

import json
import os
import signal

import lightning as L
import pytest
import torch

from nano_think.artifacts.checkpoint import load_checkpoint, load_tensors
from nano_think.errors import UserError
from nano_think.ops.layout import Layout
from nano_think.phases import arithmetic, trainer
from nano_think.phases.expert import expert_maker
from nano_think.phases.fit import Fit
from nano_think.phases.mla import mla_maker

NUMBERS = {"lr": 1e-3, "weight_decay": 0.1, "warmup_steps": 0, "batch_size": 8, "accumulate": 1}
NUMBERS |= {"max_epochs": 2, "max_steps": None, "patience": 3}


class PressCtrlC(L.Callback):
    """Asks the process to stop in the batch after `step` optimizer steps."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.step = None
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def interrupt(monkeypatch):
    """`interrupt(step)`: every fit from now on is interrupted once after that step; `interrupt(None)`: none."""
    configured = trainer.configured_callbacks

    def at(step):
        extra = [PressCtrlC(step)] if step is not None else []
        monkeypatch.setattr(
            trainer, "configured_callbacks", lambda *arguments: [*configured(*arguments), *extra]
        )

    yield at
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _weights(path):
    return {file.name: load_tensors(file) for file in sorted(path.glob("*.safetensors"))}


def _equal(one, other):
    assert one.keys() == other.keys()
    for file in one:
        assert all(torch.equal(tensor, other[file][name]) for name, tensor in one[file].items()), file


def test_an_interrupted_expert_goes_on_to_the_same_bits(project, interrupt, printed):
    settings = ("phase=expert", "expert=transformer", "trainer.max_steps=9", "trainer.val_check_interval=4")
    settings += ("experts.transformer.dropout=0.2", "trainer.accumulate_grad_batches=2")
    interrupt(5)
    with pytest.raises(KeyboardInterrupt):
        project.phase(*settings)
    manifest = json.loads((project.root / "runs" / "1" / "manifest.json").read_text())
    assert manifest["status"] == "interrupted"
    assert not list((project.root / "artifacts").glob("transformer/*"))
    assert not list((project.root / "checkpoints").glob("*"))
    with pytest.raises(KeyboardInterrupt):
        raise KeyboardInterrupt
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    interrupt(None)
    run = project.new(*settings)
    resumed = run.obtain(expert_maker(run, "transformer"), named=True)
    assert "resuming transformer" in printed(run)
    assert not list((project.root / "artifacts" / ".work").iterdir())
    resumed = resumed.rename(project.root / "resumed")
    whole = project.new(*settings)
    path = whole.obtain(expert_maker(whole, "transformer"), named=True)
    assert "resuming" not in printed(whole)
    _equal(_weights(resumed), _weights(path))
    one, other = (json.loads((p / "provenance.json").read_text())["result"] for p in (resumed, path))
    assert {k: v for k, v in one.items() if "memory" not in k} == {
        k: v for k, v in other.items() if "memory" not in k
    }
    assert [step for step, _ in one["history"]] == [0, 4, 8, 9]


@pytest.mark.parametrize("stage", ["7b", "7c", pytest.param("7d", marks=pytest.mark.slow)])
def test_an_interrupted_stage_goes_on_to_the_same_bits(stage, built, interrupt, printed):
    """The anchor still pulls to the start of the stage, and dropped memory rows are the same."""
    settings = ("phase=mla", "expert=all", "++prereq.expert.trainer.max_steps=6", "trainer.max_steps=6")
    settings += (f"++training.mla.stage_{stage}.max_steps=5", f"training.mla.stage_{stage}.lr=0.01")
    settings += ("trainer.max_steps=null", "++training.mla.anchor=5.0")
    settings += ("trainer.val_check_interval=3", f"stage={stage}", "training.mla.max_epochs=1")
    run = built.new(*settings)
    run.obtain(mla_maker(run, stage).needs["before"])
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        run.obtain(mla_maker(run, stage), named=True)
    interrupt(None)
    again = built.new(*settings)
    path = again.obtain(mla_maker(again, stage), named=True)
    assert f"resuming mla_{stage}" in printed(again)
    resumed = path.rename(built.root / f"resumed_{stage}")
    whole = built.new(*settings)
    path = whole.obtain(mla_maker(whole, stage), named=True)
    assert "resuming" not in printed(whole)
    _equal(_weights(resumed), _weights(path))


def test_a_state_that_is_damaged_or_of_another_fit_is_refused_and_its_deletion_helps(
    project, interrupt, printed
):
    settings = ("phase=expert", "expert=transformer", "trainer.max_steps=4")
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        project.phase(*settings)
    interrupt(None)
    [newest] = (project.root / "artifacts" / ".work").glob("transformer-*/newest.ckpt")
    data = newest.read_bytes()
    other = torch.load(newest, weights_only=True)
    other["loops"]["fit_loop"]["epoch_progress"] = {"total": "of another version"}
    for content in (data[:-9], b"hello", other):
        if content is other:
            torch.save(other, newest)
        else:
            newest.write_bytes(content)
        with pytest.raises(UserError, match=rf"{newest} is no state .* the same command begins the fit anew"):
            project.new(*settings).obtain(expert_maker(project.new(*settings), "transformer"), named=True)
    newest.unlink()
    run = project.new(*settings)
    assert run.obtain(expert_maker(run, "transformer"), named=True)
    assert "resuming" not in printed(run)


def test_a_resumed_fit_keeps_what_was_chosen_for_it(project, interrupt, monkeypatch):
    """Chosen at the first start, in the manifest of both runs and in the provenance; the artefact is the same."""
    settings = ("phase=expert", "expert=transformer", "trainer.max_steps=4")
    slow, fast = (
        {"precision": p, "float32_matmul": "highest", "seconds": {}} for p in ("32-true", "bf16-mixed")
    )
    monkeypatch.setattr(arithmetic, "settle", lambda probe, precision: fast)
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        project.phase(*settings)
    monkeypatch.setattr(arithmetic, "settle", lambda probe, precision: slow)
    interrupt(None)
    resumed = project.phase(*settings)
    for folder in (project.root / "runs" / "1", resumed):
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["fits"]["transformer"]["choices"]["arithmetic"] == fast
    run = project.new(*settings)
    maker = expert_maker(run, "transformer")
    assert maker.recipe.exists(run.artifacts)
    assert run.result_of(maker.recipe.path(run.artifacts))["choices"]["arithmetic"] == fast


def test_resume_never_starts_anew(project, interrupt, printed):
    settings = ("phase=expert", "expert=transformer", "trainer.max_steps=4", "resume=never")
    interrupt(2)
    run = project.new(*settings)
    with pytest.raises(KeyboardInterrupt):
        run.obtain(expert_maker(run, "transformer"), named=True)
    interrupt(None)
    again = project.new(*settings)
    again.obtain(expert_maker(again, "transformer"), named=True)
    assert "resuming" not in printed(again)


def test_the_selected_loss_is_that_of_the_saved_weights(built):
    """Recomputed from the published checkpoint, on the validation rows of the fit."""
    path = built.root / "artifacts" / "transformer"
    [folder] = [p for p in path.iterdir() if p.name in built.first.used]
    checkpoint = load_checkpoint(folder)
    run = built.new("phase=expert", "expert=transformer", "trainer.max_steps=6")
    maker = expert_maker(run, "transformer")
    data = Fit(run, maker.needs["shards"], NUMBERS, "x", "expert_train", "training.transformer").data()
    nll = tokens = 0.0
    with torch.no_grad():
        for batch in data.val_dataloader():
            layout = Layout(batch["positions"], batch["segments"])
            nll += float(checkpoint.model.token_nll(batch["tokens"], batch["labels"], layout).double().sum())
            tokens += int((batch["labels"] != -100).sum())
    result = checkpoint.provenance["result"]
    assert result["val_loss"] == pytest.approx(nll / tokens, abs=1e-5)
    assert result["val_loss"] == min(loss for _, loss in result["history"])
    assert result["tokens"] == 6 * 8 * 64


def test_logs_lie_in_the_run_folder_by_fit(built):
    folder = built.first.dir / "tensorboard"
    fits = {"transformer", "diffuser", "state_space", "mla_7b", "mla_7c", "mla_7d"}
    assert {path.name for path in folder.iterdir()} == fits
    for name in fits:
        assert list((folder / name).glob("events.out.*"))
        assert "### samples/prose, step 6" in (folder / name / "texts.md").read_text()


@pytest.mark.parametrize("override", ["trainer.max_steps=0", "trainer.max_steps=-1", "trainer.max_epochs=0"])
def test_a_fit_of_no_step_is_refused(override, project):
    run = project.new("phase=expert", "expert=transformer", override)
    with pytest.raises(UserError, match="trains nothing"):
        expert_maker(run, "transformer")


def test_whoever_names_epochs_gets_epochs(project):
    """`trainer.max_epochs` wins over the steps that a phase or experiment has set, and the other way round."""
    maker = expert_maker(
        project.new(
            "phase=expert", "expert=transformer", "training.transformer.max_steps=50", "trainer.max_epochs=3"
        ),
        "transformer",
    )
    assert (maker.spec["fit"]["max_steps"], maker.spec["fit"]["max_epochs"]) == (None, 3)
    maker = expert_maker(
        project.new("phase=expert", "expert=transformer", "trainer.max_steps=7"), "transformer"
    )
    assert maker.spec["fit"]["max_steps"] == 7
