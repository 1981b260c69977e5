"""The numbers and parts of a fit: what decides its outcome, known without the libraries that carry it out.

Whoever only asks which artefact a configuration means (generation, for one) does not wait for Lightning:
`phases.trainer`, which does the work, is imported when a fit begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate

from nano_think.errors import UserError
from nano_think.phases.data import data_module, load_tokenizer, loader_settings
from nano_think.phases.run import Followed, Maker, Run
from nano_think.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nano_think.data.module import TokenDataModule
    from nano_think.tasks.base import FitTask

# Trainer settings that change what is seen of a fit, or where it runs, but not what comes out of it.
WITHOUT_EFFECT = {"_target_", "accelerator", "log_every_n_steps", "enable_model_summary", "inference_mode"}
WITHOUT_EFFECT |= {"profiler", "detect_anomaly", "max_steps", "max_epochs", "accumulate_grad_batches"}
WITHOUT_EFFECT |= {"num_nodes"}


class Fit:
    """Numbers and parts of one fit, resolved from the phase, the expert and what the user set.

    training: the numbers of the phase or expert (lr, weight_decay, warmup_steps, batch_size, accumulate,
    max_epochs, max_steps, max_flops, patience); the `optimizer` and `trainer` nodes win where they are not null.
    label: name of the fit on screen and of its folder of logs. key: of `training` in the settings.
    """

    def __init__(
        self, run: Run, shards: Maker, training: dict[str, Any], label: str, train_split: str, key: str
    ) -> None:
        self.run, self.shards, self.label, self.train_split, self.key = run, shards, label, train_split, key
        self.trainer = {key: value for key, value in run.plain(run.cfg.trainer).items() if value is not None}
        self.optimizer = run.plain(run.cfg.optimizer)
        asked = {key: self.trainer[key] for key in ("max_steps", "max_epochs") if key in self.trainer}
        # who asks for epochs alone does not want the steps that the phase or expert states
        by_epochs = {"max_steps": None} if "max_epochs" in asked else {}
        self.training = {"max_steps": None, "max_flops": None, **training, **by_epochs, **asked}
        for key in ("max_steps", "max_epochs"):
            if self.training[key] is not None and self.training[key] < 1:
                raise UserError(f"{key}={self.training[key]} trains nothing: give at least 1")
        self._check_budget(asked)
        self.accumulate = self.trainer.get("accumulate_grad_batches") or training["accumulate"]
        if training["batch_size"] % run.ranks.world:
            raise UserError(
                f"{self.key}.batch_size={training['batch_size']} is the batch of all processes together and "
                f"cannot be divided among {run.ranks.world}: choose a multiple"
            )

    def _check_budget(self, asked: dict[str, Any]) -> None:
        """Raise UserError for a budget that is none, and for two answers to how long the fit is."""
        budget = self.training["max_flops"]
        if budget is None:
            return
        if isinstance(budget, bool) or not isinstance(budget, int | float) or budget <= 0:
            raise UserError(f"max_flops={budget} of {self.label} is no budget: give FLOPs, such as 1e13")
        if asked:
            raise UserError(
                f"max_flops of {self.label} and trainer.{next(iter(asked))} both say how long it trains: give one"
            )

    @property
    def spec(self) -> dict[str, Any]:
        """The values that decide the outcome, for the recipe."""
        keys = ("lr", "weight_decay", "warmup_steps", "batch_size", "max_epochs", "max_steps", "patience")
        cfg, budget = self.run.cfg, self.training["max_flops"]
        spikes = self.run.plain(cfg.callbacks).get("spikes") or {}
        return {
            **{key: self.training[key] for key in keys},
            **({} if budget is None else {"max_flops": budget}),
            **({} if spikes.get("deviations") is None else {"spikes": spikes}),
            "accumulate": self.accumulate,
            "optimizer": self.optimizer,
            "schedule": self.run.plain(cfg.schedule),
            # batches are those of all processes together: what comes out is the same as on one device
            "trainer": {
                key: 1 if key == "devices" else value
                for key, value in self.trainer.items()
                if key not in WITHOUT_EFFECT
            },
            "precision": cfg.precision,
            "seed": cfg.seed,
            "split": self.train_split,
            "seq_len": cfg.size.seq_len,
            "loader": loader_settings(self.run),
        }

    @property
    def command(self) -> str:
        """The command line that carries out this fit, prerequisites aside."""
        phase = self.run.cfg.phase.name
        if phase == "expert":
            return self.run.command(phase=phase, expert=self.label)
        return self.run.command(
            phase=phase, expert=self.run.cfg.expert.name, stage=self.label.removeprefix("mla_")
        )

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
        """Planned optimizer steps where no budget decides, and those of an epoch."""
        per_epoch = max(1, data.steps_per_epoch // self.accumulate)
        return self.training["max_steps"] or self.training["max_epochs"] * per_epoch, per_epoch

    def seed_everything(self) -> None:
        """Seed the generators of Python, NumPy and torch, and those of data workers."""
        from nano_think.phases import trainer

        trainer.seed_everything(self.run.cfg.seed)

    def __call__(self, task: FitTask, data: TokenDataModule, work: Path) -> dict[str, Any]:
        """Train `task` with Lightning, see `phases.trainer.train`; ranks above 0 leave with `Followed`."""
        from nano_think.phases import trainer

        result = trainer.train(self, task, data, work)
        if self.run.ranks.follows:
            raise Followed
        return result
