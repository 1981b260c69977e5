from __future__ import annotations

import io

import pytest
from rich.console import Console

from nano_think.callbacks import progress
from nano_think.callbacks.progress import StepProgress


def _fit(console, objective, data, trainer, **settings):
    callback = StepProgress(console, "transformer")
    runner = trainer(
        max_steps=4, val_check_interval=2, check_val_every_n_epoch=None, callbacks=[callback], **settings
    )
    runner.fit(objective("transformer"), datamodule=data(val_rows=2))
    return callback


def test_one_lasting_line_a_validation_and_no_bar_in_a_file(objective, data, trainer):
    out = io.StringIO()
    _fit(Console(file=out, width=110), objective, data, trainer)
    lines = [line for line in out.getvalue().splitlines() if line.strip()]
    assert [line.split(":")[0].strip() for line in lines] == ["transformer step 2", "transformer step 4"]
    assert all("val " in line and "ppl " in line for line in lines)
    assert "\x1b[" not in out.getvalue()


def test_a_terminal_gets_a_bar_that_counts_to_the_end(objective, data, trainer):
    out = io.StringIO()
    _fit(Console(file=out, width=110, force_terminal=True), objective, data, trainer)
    assert "4/4" in out.getvalue()
    assert "left" in out.getvalue()


def test_the_bar_is_closed_when_the_fit_breaks(objective, data, trainer):
    out = io.StringIO()
    task = objective("transformer")
    task.batch_loss = lambda batch: 1 / 0
    callback = StepProgress(Console(file=out, width=110, force_terminal=True), "transformer")
    with pytest.raises(ZeroDivisionError):
        trainer(max_steps=4, callbacks=[callback]).fit(task, datamodule=data(val_rows=2))
    assert callback.progress is None


def test_the_figures_are_read_now_and_then_and_never_without_a_terminal(
    objective, data, trainer, monkeypatch
):
    read, figures = [], StepProgress._figures

    def noting(runner):
        read.append(runner.global_step)
        return figures(runner)

    monkeypatch.setattr(StepProgress, "_figures", staticmethod(noting))
    _fit(Console(file=io.StringIO(), width=110), objective, data, trainer)
    assert len(read) == 2  # the lines of two validations
    monkeypatch.setattr(progress, "BETWEEN_FIGURES", 1e6)
    _fit(Console(file=io.StringIO(), width=110, force_terminal=True), objective, data, trainer)
    assert len(read) == 2 + 2 + 1
