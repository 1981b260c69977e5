"""A fit that was stopped and resumed leaves the curves and texts of one that was not: every step once."""

from __future__ import annotations

import os
import time

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from nano_think.callbacks.domain_shares import DomainShares
from nano_think.callbacks.newest import NewestState
from nano_think.callbacks.samples import SampleTexts
from nano_think.callbacks.selection import ValidationSelection
from nano_think.callbacks.step_seed import StepSeed
from nano_think.callbacks.text import forget_texts
from nano_think.callbacks.throughput import Throughput
from nano_think.phases.logs import continue_logs, logger_at, resumed_step
from tests.reliability.compare import merged

STEPS, ACCUMULATE, INTERVAL, PER_EPOCH = 8, 2, 3, 10
NODE = OmegaConf.create(
    {
        "_target_": "lightning.pytorch.loggers.TensorBoardLogger",
        "save_dir": "???",
        "name": None,
        "version": "",
    }
)


class Gone(BaseException):
    """The process is gone: nothing after this may run."""


class At(L.Callback):
    """Ends everything in a batch or after it, before or after its state was saved, or within a validation."""

    def __init__(self, batch=None, after=None, validation=None):
        self.batch, self.after, self.validation = batch, after, validation

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self._number(trainer) == self.batch:
            raise Gone

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self._number(trainer) - 1 == self.after:
            raise Gone

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.validation is not None and trainer.global_step == self.validation and not trainer.training:
            raise Gone

    @staticmethod
    def _number(trainer):
        return trainer.fit_loop.epoch_loop.batch_progress.total.processed


@pytest.fixture
def fit(objective, data, trainer, byte_tokenizer, tmp_path):
    """`fit(folder, at=None, logs=None)`: train below a folder until the end or `at`, as `phases.trainer` does."""

    def run(folder, at=None, logs=None):
        work, logs = tmp_path / folder, tmp_path / (logs or f"{folder}_logs")
        newest = NewestState(work, every_n_train_steps=2)
        state = str(newest.path) if newest.path.exists() else None
        step = resumed_step(state)
        # event files are ordered by the second that they were begun in: no two runs of a machine share one
        time.sleep(1.01 - time.time() % 1)
        continue_logs(logs, work, step)
        callbacks = [ValidationSelection(patience=99), DomainShares(), Throughput(), StepSeed(3)]
        callbacks += [LearningRateMonitor("step"), SampleTexts(byte_tokenizer, max_new_tokens=2), newest]
        runner = trainer(
            max_steps=STEPS,
            accumulate_grad_batches=ACCUMULATE,
            val_check_interval=INTERVAL * ACCUMULATE,
            check_val_every_n_epoch=None,
            limit_train_batches=PER_EPOCH,
            enable_checkpointing=True,
            log_every_n_steps=1,
            logger=logger_at(NODE, logs, step),
            callbacks=[*callbacks, *([at] if at else [])],
        )
        task, module = objective("transformer", lr=1e-2), data(batch_size=4, val_rows=2)
        try:
            if state is None:
                runner.validate(task, datamodule=module, verbose=False)
            runner.fit(task, datamodule=module, ckpt_path=state, weights_only=True)
        except Gone:
            for logger in runner.loggers:
                logger.experiment.close()  # events that were logged are on disk after each step
        return logs

    return run


@pytest.fixture
def whole(fit):
    """Curves and texts of a fit that nobody stopped."""
    logs = fit("whole")
    return merged(logs), (logs / "texts.md").read_text()


# Step 2 is saved after batch 3, step 3 validated after batch 5, step 5 saved after batch 9, the end of the epoch.
STOPS = [{"batch": 0}, {"batch": 3}, {"batch": 4}, {"after": 3}, {"after": 4}, {"batch": 6}, {"after": 9}]
STOPS += [{"batch": 10}, {"validation": 0}, {"validation": 3}, {"validation": 6}, {"validation": 8}]
SLOW = STOPS[1:3] + STOPS[4:7] + STOPS[8:9] + STOPS[10:11]


@pytest.mark.parametrize(
    "stop", [pytest.param(s, marks=pytest.mark.slow) if s in SLOW else s for s in STOPS], ids=str
)
def test_every_step_is_logged_once_wherever_the_fit_was_stopped(stop, fit, whole, tmp_path):
    fit("stopped", At(**stop))
    logs = fit("stopped")
    expected, texts = whole
    found = merged(logs)
    assert [step for step, _ in expected["train/loss"]] == list(range(STEPS))
    # the weights before the first step, and after steps 3, 6 and 8
    assert [step for step, _ in expected["val/loss"]] == [0, 2, 5, 7]
    for tag in expected.keys() | found.keys():
        assert found.get(tag) == expected.get(tag), tag
    assert (logs / "texts.md").read_text() == texts


def test_steps_that_are_done_again_are_in_the_files_twice_and_shown_once(fit, whole):
    """Or the test above could not fail."""
    fit("stopped", At(batch=9))
    logs = fit("stopped")
    raw = []
    for path in sorted(logs.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        for event in EventFileLoader(str(path)).Load():
            raw += [event.step for value in event.summary.value if value.tag == "train/loss"]
    assert raw == [0, 1, 2, 3, 3, 4, 5, 6, 7]
    assert merged(logs) == whole[0]


def test_a_fit_that_goes_on_in_another_run_folder_takes_its_curves_along(fit, whole):
    fit("stopped", At(batch=8), logs="first")
    logs = fit("stopped", logs="second")
    assert logs.name == "second"
    assert merged(logs) == whole[0]
    assert (logs / "texts.md").read_text() == whole[1]


def test_a_state_is_the_newest_only_after_its_step_was_logged(fit, tmp_path):
    """A kill between the two would lose the step from the curves for good."""
    fit("stopped", At(after=3))
    assert not (tmp_path / "stopped" / "newest.ckpt").exists()
    assert not list((tmp_path / "stopped").glob(".*.tmp"))
    fit("stopped", At(batch=4))
    saved = torch.load(tmp_path / "stopped" / "newest.ckpt", weights_only=True)
    assert saved["global_step"] == 2


def test_states_are_written_beside_their_name_and_nowhere_else(fit, tmp_path, monkeypatch):
    """Lightning's own way leads through the system's folder for temporary files, and a copy from there."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "not there"))
    renamed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (renamed.append((a, b)), replace(a, b)))
    fit("whole")
    folders = {(a.parent, b.parent) for a, b in renamed if b.name == "newest.ckpt"}
    assert folders == {(tmp_path / "whole", tmp_path / "whole")}


BLOCK = "### {0}, step {1}\n\n```\n{2}\n```\n\n"


@pytest.mark.parametrize("torn", [0, 1, 5, 30])
def test_texts_are_cut_where_the_fit_goes_on(tmp_path, torn):
    text = "é text\n### no heading, step 9\nends here"
    blocks = [BLOCK.format("samples/fruit", step, text) for step in range(4)]
    (tmp_path / "texts.md").write_bytes("".join(blocks).encode()[: -torn or None])
    forget_texts(tmp_path, after=2)
    assert (tmp_path / "texts.md").read_text() == "".join(blocks[:3])
    (tmp_path / "texts.md").write_bytes("".join(blocks).encode()[: -torn or None])
    forget_texts(tmp_path, after=5)
    assert (tmp_path / "texts.md").read_text() == "".join(blocks[: 3 if torn else 4])
    forget_texts(tmp_path, after=-1)
    assert (tmp_path / "texts.md").read_text() == ""
