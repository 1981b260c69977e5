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
from nano_think.errors import UserError
from nano_think.optim.schedule import capped_warmup
from nano_think.phases.data import data_module, load_tokenizer, loader_settings
from nano_think.phases.run import Maker, Run
from nano_think.tasks.base import FitTask
from nano_think.tokenizer import Tokenizer

# A validation an epoch, in short runs about ten in all, but not more often than every 100 steps.
VALIDATIONS = 10
MIN_STEPS_BETWEEN_VALIDATIONS = 100
# Trainer settings that change what is seen of a fit, or where it runs, but not what comes out of it.
WITHOUT_EFFECT = {"_target_", "accelerator", "log_every_n_steps", "enable_model_summary", "inference_mode"}
WITHOUT_EFFECT |= {"profiler", "detect_anomaly", "max_steps", "max_epochs", "accumulate_grad_batches"}

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


class Fit:
    """Numbers and parts of one fit, resolved from the phase, the expert and what the user set.

    training: the numbers of the phase or expert (lr, weight_decay, warmup_steps, batch_size, accumulate,
    max_epochs, max_steps, patience); the `optimizer` and `trainer` nodes win where they are not null.
    label: name of the fit on screen and of its folder of logs.
    """

    def __init__(
        self, run: Run, shards: Maker, training: dict[str, Any], label: str, train_split: str
    ) -> None:
        self.run, self.shards, self.label, self.train_split = run, shards, label, train_split
        self.trainer = {key: value for key, value in run.plain(run.cfg.trainer).items() if value is not None}
        self.optimizer = run.plain(run.cfg.optimizer)
        asked = {key: self.trainer[key] for key in ("max_steps", "max_epochs") if key in self.trainer}
        # who asks for epochs alone does not want the steps that the phase or expert states
        by_epochs = {"max_steps": None} if "max_epochs" in asked else {}
        self.training = {"max_steps": None, **training, **by_epochs, **asked}
        for key in ("max_steps", "max_epochs"):
            if self.training[key] is not None and self.training[key] < 1:
                raise UserError(f"{key}={self.training[key]} trains nothing: give at least 1")
        self.accumulate = self.trainer.get("accumulate_grad_batches") or training["accumulate"]

    @property
    def spec(self) -> dict[str, Any]:
        """The values that decide the outcome, for the recipe."""
        keys = ("lr", "weight_decay", "warmup_steps", "batch_size", "max_epochs", "max_steps", "patience")
        cfg = self.run.cfg
        return {
            **{key: self.training[key] for key in keys},
            "accumulate": self.accumulate,
            "optimizer": self.optimizer,
            "schedule": self.run.plain(cfg.schedule),
            "trainer": {key: value for key, value in self.trainer.items() if key not in WITHOUT_EFFECT},
            "precision": cfg.precision,
            "seed": cfg.seed,
            "split": self.train_split,
            "seq_len": cfg.size.seq_len,
            "loader": loader_settings(self.run),
        }

    def data(self) -> TokenDataModule:
        """The one data module of every phase, on the shards of this run."""
        return data_module(self.run, self.shards, self.training["batch_size"], self.train_split)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the shards."""
        return load_tokenizer(self.run, self.shards.needs["tokenizer"])

    def factories(self, lr_scale: dict[str, float] | None = None) -> dict[str, Any]:
        """`optimizer` and `schedule` as the tasks take them."""
        settings = {key: value for key, value in self.optimizer.items() if value is not None}
        for key in ("lr", "weight_decay"):
            settings.setdefault(key, self.training[key])
        if lr_scale:
            settings.setdefault("lr_scale", lr_scale)
        schedule = instantiate(
            self.run.cfg.schedule, warmup_steps=self.training["warmup_steps"], _convert_="all"
        )
        return {"optimizer": instantiate(settings, _convert_="all"), "schedule": schedule}

    def steps(self, data: TokenDataModule) -> tuple[int, int]:
        """Planned optimizer steps, and those of an epoch."""
        per_epoch = max(1, data.steps_per_epoch // self.accumulate)
        return self.training["max_steps"] or self.training["max_epochs"] * per_epoch, per_epoch

    def __call__(self, task: FitTask, data: TokenDataModule, work: Path) -> dict[str, Any]:
        """Train `task` until its planned end or a plateau, leave its network with the best weights.

        work: where the newest state is kept; with resume=auto a fit that finds one there goes on from it.
        """
        max_steps, per_epoch = self.steps(data)
        interval = self._interval(max_steps, per_epoch)
        # patience counts epochs, the callback validations
        patience = math.ceil(self.training["patience"] * max(1.0, per_epoch / interval))
        selection = ValidationSelection(patience, capped_warmup(self.training["warmup_steps"], max_steps))
        trainer = self._trainer(task, selection, max_steps, interval, per_epoch, work)
        newest = _newest(work) if self.run.cfg.resume == "auto" else None
        with warnings.catch_warnings():
            for message in EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            try:
                if newest is None:
                    trainer.validate(task, datamodule=data, verbose=False)
                else:
                    self.run.say(f"resuming {self.label} from {newest}")
                trainer.fit(task, datamodule=data, ckpt_path=newest, weights_only=True)
            except SystemExit as error:
                # Lightning's answer to Ctrl+C: it exits the process and leaves it deaf to another one
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt from error
        return self._result(trainer, selection, per_epoch)

    def _interval(self, max_steps: int, per_epoch: int) -> int:
        """Optimizer steps from one validation to the next."""
        often = min(per_epoch, max_steps // VALIDATIONS)
        interval = self.trainer.get("val_check_interval") or max(often, MIN_STEPS_BETWEEN_VALIDATIONS)
        return min(interval, max_steps)

    def _trainer(
        self,
        task: FitTask,
        selection: ValidationSelection,
        max_steps: int,
        interval: int,
        per_epoch: int,
        work: Path,
    ) -> L.Trainer:
        folder = self.run.dir / "tensorboard" / self.label
        folder.mkdir(parents=True, exist_ok=True)
        callbacks = [
            selection,
            StepSeed(self.run.cfg.seed),
            LearningRateMonitor("step"),
            StepProgress(self.run.console, self.label),
            Dashboard(list(getattr(task.network, "experts", {}))),
            *self._configured_callbacks(work),
        ]
        if hasattr(task, "targets"):
            callbacks.append(Reconstructions(self.tokenizer(), seed=self.run.cfg.seed))
        own = ("max_epochs", "max_steps", "val_check_interval", "accumulate_grad_batches")
        # whole optimizer steps: an epoch that ended between two would cut its last step short
        settings = {"limit_train_batches": per_epoch * self.accumulate, **self.trainer}
        return instantiate(
            {key: value for key, value in settings.items() if key not in own},
            callbacks=callbacks,
            logger=instantiate(self.run.cfg.logger, save_dir=str(folder)),
            max_steps=max_steps,
            max_epochs=-1,
            accumulate_grad_batches=self.accumulate,
            val_check_interval=interval * self.accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            precision=resolve_precision(self.run.cfg.precision),
            default_root_dir=str(folder),
            enable_progress_bar=False,
        )

    def _configured_callbacks(self, work: Path) -> list[L.Callback]:
        """The callbacks of conf/callbacks; arguments that stand there as ??? are supplied here."""
        supplied = {"dirpath": work, "tokenizer": self.tokenizer()}
        nodes = self.run.plain(self.run.cfg.callbacks).values()
        return [
            instantiate(node, **{name: supplied[name] for name, value in node.items() if value == "???"})
            for node in nodes
        ]

    def _result(self, trainer: L.Trainer, selection: ValidationSelection, per_epoch: int) -> dict[str, Any]:
        steps = trainer.global_step
        tokens = steps * self.accumulate * self.training["batch_size"] * self.run.cfg.size.seq_len
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
