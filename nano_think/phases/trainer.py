"""One Lightning fit with everything around it: batches, callbacks, resume, the best weights."""

from __future__ import annotations

import logging
import math
import resource
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LearningRateMonitor

from nano_think.callbacks.dashboard import Dashboard
from nano_think.callbacks.progress import StepProgress
from nano_think.callbacks.reconstructions import Reconstructions
from nano_think.callbacks.selection import ValidationSelection
from nano_think.callbacks.step_seed import StepSeed
from nano_think.data.module import TokenDataModule
from nano_think.optim.schedule import capped_warmup
from nano_think.phases.choices import Choices
from nano_think.phases.fit import Fit
from nano_think.tasks.base import FitTask

# A validation an epoch, in short runs about ten in all, but not more often than every 100 steps.
VALIDATIONS = 10
MIN_STEPS_BETWEEN_VALIDATIONS = 100

# Lightning's remarks on what is meant here: a fresh fit after a validation, frozen parts in eval mode.
EXPECTED_WARNINGS = (
    r".*does not have many workers.*",
    r".*`isinstance\(treespec.*",
    r".*exists and is not empty.*",
    r".*was called without a model.*",
    r".*there is no last checkpoint available.*",
    r".*module\(s\) in eval mode at the start of training.*",
)
# What hardware there is not, and advertisements for other loggers, hide the lines that matter.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def seed_everything(seed: int) -> None:
    """See `Fit.seed_everything`."""
    L.seed_everything(seed, workers=True, verbose=False)


def train(fit: Fit, task: FitTask, data: TokenDataModule, work: Path) -> dict[str, Any]:
    """Train `task` until its planned end or a plateau, leave its network with the best weights.

    work: where the newest state is kept; with resume=auto a fit that finds one there goes on from it.
    """
    max_steps, per_epoch = fit.steps(data)
    interval = _interval(fit, max_steps, per_epoch)
    # patience counts epochs, the callback validations
    patience = math.ceil(fit.training["patience"] * max(1.0, per_epoch / interval))
    selection = ValidationSelection(patience, capped_warmup(fit.training["warmup_steps"], max_steps))
    choices = made_choices(fit, work)
    trainer = _trainer(fit, task, selection, max_steps, interval, per_epoch, work, choices["precision"])
    newest = _newest(work) if fit.run.cfg.resume == "auto" else None
    with warnings.catch_warnings():
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        try:
            if newest is None:
                trainer.validate(task, datamodule=data, verbose=False)
            else:
                fit.run.say(f"resuming {fit.label} from {newest}")
            trainer.fit(task, datamodule=data, ckpt_path=newest, weights_only=True)
        except SystemExit as error:
            # Lightning's answer to Ctrl+C: it exits the process and leaves it deaf to another one
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from error
    return {**_result(fit, trainer, selection, per_epoch), "choices": choices}


def made_choices(fit: Fit, work: Path) -> dict[str, Any]:
    """Everything that is chosen by the machine and not by the user, by name; also in the manifest of the run.

    A choice is made at the first start and reused by one that resumes, see `phases.choices`.
    """
    choices = Choices(work, reuse=fit.run.cfg.resume == "auto")
    choices.choose("precision", lambda: resolve_precision(fit.run.cfg.precision))
    fit.run.record_fit(fit.label, choices=choices.made)
    return dict(choices.made)


def _interval(fit: Fit, max_steps: int, per_epoch: int) -> int:
    """Optimizer steps from one validation to the next."""
    often = min(per_epoch, max_steps // VALIDATIONS)
    interval = fit.trainer.get("val_check_interval") or max(often, MIN_STEPS_BETWEEN_VALIDATIONS)
    return min(interval, max_steps)


def _trainer(
    fit: Fit,
    task: FitTask,
    selection: ValidationSelection,
    max_steps: int,
    interval: int,
    per_epoch: int,
    work: Path,
    precision: str,
) -> L.Trainer:
    folder = fit.run.dir / "tensorboard" / fit.label
    folder.mkdir(parents=True, exist_ok=True)
    callbacks = [
        selection,
        StepSeed(fit.run.cfg.seed),
        LearningRateMonitor("step"),
        StepProgress(fit.run.console, fit.label),
        Dashboard(list(getattr(task.network, "experts", {}))),
        *configured_callbacks(fit, work),
    ]
    if hasattr(task, "targets"):
        callbacks.append(Reconstructions(fit.tokenizer(), seed=fit.run.cfg.seed))
    own = ("max_epochs", "max_steps", "val_check_interval", "accumulate_grad_batches")
    # whole optimizer steps: an epoch that ended between two would cut its last step short
    settings = {"limit_train_batches": per_epoch * fit.accumulate, **fit.trainer}
    return instantiate(
        {key: value for key, value in settings.items() if key not in own},
        callbacks=callbacks,
        logger=instantiate(fit.run.cfg.logger, save_dir=str(folder)),
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=fit.accumulate,
        val_check_interval=interval * fit.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        precision=precision,
        default_root_dir=str(folder),
        enable_progress_bar=False,
    )


def configured_callbacks(fit: Fit, work: Path) -> list[L.Callback]:
    """The callbacks of conf/callbacks; arguments that stand there as ??? are supplied here."""
    supplied = {"dirpath": work, "tokenizer": fit.tokenizer()}
    nodes = fit.run.plain(fit.run.cfg.callbacks).values()
    return [
        instantiate(node, **{name: supplied[name] for name, value in node.items() if value == "???"})
        for node in nodes
    ]


def _result(fit: Fit, trainer: L.Trainer, selection: ValidationSelection, per_epoch: int) -> dict[str, Any]:
    steps = trainer.global_step
    tokens = steps * fit.accumulate * fit.training["batch_size"] * fit.run.cfg.size.seq_len
    return {
        "steps": steps,
        "epochs": round(steps / per_epoch, 3),
        "tokens": tokens,
        "best_step": selection.best_step,
        "val_loss": selection.best,
        "history": selection.history,
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    }


def resolve_precision(name: str) -> str:
    """`auto` is bf16 autocast on a GPU and plain fp32 on a CPU; anything else is Lightning's name."""
    if name != "auto":
        return name
    return "bf16-mixed" if torch.cuda.is_available() else "32-true"


def _newest(work: Path) -> str | None:
    """The newest state in `work`."""
    states = sorted(work.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    return str(states[-1]) if states else None
