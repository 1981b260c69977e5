"""One Lightning fit with everything around it: batches, callbacks, resume, the best weights."""

from __future__ import annotations

import logging
import math
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import Logger

from nano_think.callbacks.dashboard import Dashboard
from nano_think.callbacks.first_step import FirstStep
from nano_think.callbacks.progress import StepProgress
from nano_think.callbacks.reconstructions import Reconstructions
from nano_think.callbacks.selection import ValidationSelection
from nano_think.callbacks.step_seed import StepSeed
from nano_think.data.module import TokenDataModule
from nano_think.errors import UserError
from nano_think.ops.products import float32_matmul, fp32_stays
from nano_think.optim.schedule import capped_warmup
from nano_think.phases import arithmetic, memory, space
from nano_think.phases.choices import Choices
from nano_think.phases.compiling import compiled
from nano_think.phases.cost import Cost, cost_of, gemm_peak, within_budget
from nano_think.phases.fit import Fit
from nano_think.phases.logs import continue_logs, logger_at, resumed_step
from nano_think.phases.probe import PROBE_TOKENS, Probe
from nano_think.phases.scan_backend import choose_scan, chosen_scan
from nano_think.phases.states import TakenUp, cannot_go_on, check_state
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
    # figures of several processes are added up where they are made
    r".*sync_dist=True.*",
    # nobody writes into what the blocks of a divided network return
    r".*returned a view tensor.*",
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
    planned, per_epoch = fit.steps(data)
    ranks, network = fit.run.ranks, task.network
    strategy = instantiate(fit.run.cfg.strategy, world=ranks.world)
    task.scaled_before = _gradients_out_of_reach(fit, strategy)
    cost = cost_of(fit, task, data)
    max_steps = within_budget(fit, cost, planned)
    interval = _interval(fit, max_steps, per_epoch)
    # patience counts epochs, the callback validations
    patience = math.ceil(fit.training["patience"] * max(1.0, per_epoch / interval))
    selection = ValidationSelection(patience, capped_warmup(fit.training["warmup_steps"], max_steps))
    choices = ranks.after_first(f"prepare {fit.label}", lambda: _prepare(fit, task, data, work))
    how = choices["arithmetic"]
    if not ranks.follows:
        space.check_fit(fit, task, work)
    peak = ranks.world * gemm_peak(_device(fit), how["precision"], how["float32_matmul"])
    fit.run.record_fit(fit.label, peak_flops=peak, flops_per_token=cost.per_token)
    taken_up = TakenUp()
    callbacks = [selection, taken_up, *_callbacks(fit, task, work, cost, peak)]
    newest = _newest(work) if fit.run.cfg.resume == "auto" else None
    if newest is not None:
        check_state(newest, task)
    folder, step = fit.run.dir / "tensorboard" / fit.label, resumed_step(newest)
    if not ranks.follows:
        continue_logs(folder, work, step)
    logger = logger_at(fit.run.cfg.logger, folder, step)
    trainer = _trainer(fit, callbacks, logger, max_steps, interval, per_epoch, how["precision"], strategy)
    scan = chosen_scan(task, choices.get("scan"), _device(fit), fit.run.cfg.precision, fit.run.say)
    group = ranks.group(f"fit {fit.label}", _device(fit).type)
    with warnings.catch_warnings(), float32_matmul(how["float32_matmul"]), scan, group:
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        try:
            if newest is None:
                trainer.validate(task, datamodule=data, verbose=False)
            else:
                fit.run.say(f"resuming {fit.label} from {newest}")
            with compiled(task.network, fit.run.cfg.compile) as parts:
                if fit.run.cfg.compile:
                    fit.run.say(
                        f"[dim]compiled: {', '.join(parts) or 'nothing, a diffuser stays eager'}[/dim]"
                    )
                trainer.fit(task, datamodule=data, ckpt_path=newest, weights_only=True)
            task.whole_network()  # where a divided copy was trained, the network of the caller learns of it here
        except SystemExit as error:
            # Lightning's answer to Ctrl+C: it exits the process and leaves it deaf to another one
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from error
        except Exception as error:
            if newest is None or taken_up.begun or isinstance(error, UserError):
                raise
            raise cannot_go_on(newest, error) from error
    task.network = network
    data.trainer = None  # what follows is the work of one process, and reads all rows
    result = {**_result(fit, trainer, selection, per_epoch, cost), "choices": choices}
    fit.run.record_fit(fit.label, peak_memory_gb=result["peak_memory_gb"])
    fit.run.say(f"[dim]{fit.label}: {result['peak_memory_gb']:.2f} GB at the peak[/dim]")
    return result


def _gradients_out_of_reach(fit: Fit, strategy: Any) -> bool:
    """Whether the strategy lets nobody scale gradients; UserError for settings that it cannot carry out."""
    kind = type(strategy).__name__
    if kind == "FullyShard" and fit.run.cfg.compile:
        raise UserError("compile=true and strategy=fsdp2 do not go together: leave one out")
    if kind == "DeepSpeedStrategy" and fit.accumulate > 1:
        raise UserError("strategy=deepspeed takes steps of one batch: set trainer.accumulate_grad_batches=1")
    return kind == "DeepSpeedStrategy"


def _prepare(fit: Fit, task: FitTask, data: TokenDataModule, work: Path) -> dict[str, Any]:
    """What the machine chooses and not the user, by name, after one look at the memory the fit will take.

    Both go into the manifest. A choice is made at the first start and reused by one that resumes, see
    `phases.choices`.
    """
    choices = Choices(work, reuse=fit.run.cfg.resume == "auto" or fit.run.ranks.follows)
    if fit.run.ranks.follows:
        return dict(choices.made)
    asked = fit.run.cfg.precision
    choose_scan(task, choices, _device(fit), asked)
    memory.forget_peak()
    if _device(fit).type == "cuda":
        choices.choose("arithmetic", lambda: arithmetic.on_gpu(asked))
        fit.run.record_fit(fit.label, choices=choices.made)
        return dict(choices.made)
    probe = Probe(task, _few_rows(fit, data))
    how = choices.choose("arithmetic", lambda: arithmetic.settle(probe, asked))
    if not fp32_stays(how["float32_matmul"]):
        how = {**how, "float32_matmul": "highest"}  # resumed on another processor
    expected = memory.estimate(probe, how["precision"], fit.training["batch_size"] // fit.run.ranks.world)
    fit.run.record_fit(fit.label, choices=choices.made, estimated_memory_gb=expected.in_gb())
    speed = "" if how["precision"] == asked else f", {how['precision']} as the faster"
    fit.run.say(f"[dim]{fit.label}: about {expected.peak / memory.GB:.2f} GB at the peak{speed}[/dim]")
    available = memory.available()
    if said := memory.warning(expected, available, f"{fit.key}.batch_size", fit.accumulate):
        fit.run.guard("memory", said, certain=memory.certain(expected, available))
    return {**choices.made, "arithmetic": how}


def _device(fit: Fit) -> torch.device:
    """Where the fit computes."""
    gpu = torch.cuda.is_available() and fit.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return torch.device("cuda" if gpu else "cpu")


def _few_rows(fit: Fit, data: TokenDataModule) -> dict[str, torch.Tensor]:
    """The first rows of the split that is trained on: as many as a probe wants, at most a batch."""
    rows = min(fit.training["batch_size"], max(1, PROBE_TOKENS // data.seq_len))
    with torch.random.fork_rng(devices=[]):  # an iterator of a loader draws a seed
        return next(iter(data.dataloader(fit.train_split, rows=rows, batch_size=rows)))


def _interval(fit: Fit, max_steps: int, per_epoch: int) -> int:
    """Optimizer steps from one validation to the next."""
    often = min(per_epoch, max_steps // VALIDATIONS)
    interval = fit.trainer.get("val_check_interval") or max(often, MIN_STEPS_BETWEEN_VALIDATIONS)
    return min(interval, max_steps)


def _callbacks(fit: Fit, task: FitTask, work: Path, cost: Cost, peak: float) -> list[L.Callback]:
    """All callbacks of a fit but the selection."""
    callbacks = [
        StepSeed(fit.run.cfg.seed),
        LearningRateMonitor("step"),
        StepProgress(fit.run.console, fit.label),
        Dashboard(list(getattr(task.network, "experts", {}))),
        *configured_callbacks(fit, work, cost, peak),
    ]
    if hasattr(task, "targets"):
        callbacks.append(Reconstructions(fit.tokenizer(), seed=fit.run.cfg.seed))
    if "first_step" not in fit.run.manifest:
        callbacks.append(FirstStep(fit.run.record))
    return callbacks


def _trainer(
    fit: Fit,
    callbacks: list[L.Callback],
    logger: Logger,
    max_steps: int,
    interval: int,
    per_epoch: int,
    precision: str,
    strategy: Any,
) -> L.Trainer:
    own = ("max_epochs", "max_steps", "val_check_interval", "accumulate_grad_batches")
    # whole optimizer steps: an epoch that ended between two would cut its last step short
    settings = {"limit_train_batches": per_epoch * fit.accumulate, **fit.trainer}
    return instantiate(
        {key: value for key, value in settings.items() if key not in own},
        callbacks=callbacks,
        logger=logger,
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=fit.accumulate,
        val_check_interval=interval * fit.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        precision=precision,
        strategy=strategy,
        default_root_dir=logger.save_dir,
        enable_progress_bar=False,
    )


def configured_callbacks(fit: Fit, work: Path, cost: Cost, peak: float) -> list[L.Callback]:
    """The callbacks of conf/callbacks; arguments that stand there as ??? are supplied here."""
    supplied = {"dirpath": work, "tokenizer": fit.tokenizer()}
    supplied |= {"folder": fit.run.dir, "label": fit.label, "command": fit.command, "say": fit.run.say}
    supplied |= {"flops_per_token": cost.model_per_token, "peak_flops": peak}
    nodes = fit.run.plain(fit.run.cfg.callbacks).values()
    return [
        instantiate(node, **{name: supplied[name] for name, value in node.items() if value == "???"})
        for node in nodes
    ]


def _result(
    fit: Fit, trainer: L.Trainer, selection: ValidationSelection, per_epoch: int, cost: Cost
) -> dict[str, Any]:
    steps = trainer.global_step
    tokens = steps * fit.accumulate * fit.training["batch_size"] * fit.run.cfg.size.seq_len
    return {
        "steps": steps,
        "epochs": round(steps / per_epoch, 3),
        "tokens": tokens,
        "trained_parameters": cost.trained,
        "flops_per_token": cost.per_token,
        "flops": cost.total(steps),
        "best_step": selection.best_step,
        "val_loss": selection.best,
        "history": selection.history,
        "peak_memory_gb": round(memory.peak(_device(fit)) / memory.GB, 3),
    }


def _newest(work: Path) -> str | None:
    """The newest state in `work`."""
    states = sorted(work.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    return str(states[-1]) if states else None
