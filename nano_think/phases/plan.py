"""`strategy=plan`: what the fits of a run would take on several devices, from settings and one small pass each.

Bytes of one rank of N, with P parameters in all, T of them trained, M moments of the optimizer a trained
parameter, W parameters outside of blocks, B in the largest block and all in fp32 (8 for 4 in fp64):

    ddp       4 P             4 T        4 M T          everything in each
    zero1     4 P             4 T        4 M T / N      optimizer state divided
    zero2     4 P             4 T / N    4 M T / N      gradients too
    fsdp2     4 (P / N + W + B)   4 T / N    4 M T / N      parameters too, W and one block at a time put together

Activations are those of batch / N rows, measured by `phases.memory` on this processor, whose fast paths keep
other things than those of a GPU. What a library keeps for itself is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import get_object
from torch import nn

from nano_think.artifacts.build import build as build_network
from nano_think.errors import UserError
from nano_think.evals.flops import filling_flops, optimizer_flops, training_flops
from nano_think.evals.report import Table, render_table
from nano_think.experts.denoiser_block import ModulatedBlock
from nano_think.experts.diffuser import DiffuserExpert
from nano_think.files import atomic_write, write_json
from nano_think.model import ExpertLM
from nano_think.nn.block import Block
from nano_think.optim.muon import MuonWithAdamW
from nano_think.phases import memory
from nano_think.phases.data import shards_maker
from nano_think.phases.expert import expert_maker
from nano_think.phases.fit import Fit
from nano_think.phases.mla import SPLIT, STAGES, last_stage, stage_numbers
from nano_think.phases.parameters import mixture_spec
from nano_think.phases.probe import PROBE_TOKENS, Probe
from nano_think.phases.run import Run
from nano_think.tasks.base import FitTask

WAYS = ("ddp", "zero1", "zero2", "fsdp2")
FP32, FP64 = 4, 8


@dataclass(frozen=True)
class Sizes:
    """What a fit holds. parameters, trained, outside, block: P, T, W and B of the module's docstring.

    moments: numbers of optimizer state in all. fixed, a_row: bytes of activations. number: bytes
    that one of the others takes.
    """

    parameters: int
    trained: int
    moments: int
    outside: int
    block: int
    fixed: float
    a_row: float
    number: int = FP32

    def bytes_of(self, way: str, world: int, rows: int) -> dict[str, float]:
        """Bytes of one rank of `world` by cause, with `rows` rows a batch."""
        divided = {"ddp": (), "zero1": ("moments",), "zero2": ("moments", "gradients")}.get(way)
        share = {
            name: world if divided is None or name in divided else 1 for name in ("gradients", "moments")
        }
        parameters: float = self.number * self.parameters
        if divided is None:
            parameters = parameters / world + (self.number * (self.outside + self.block) if world > 1 else 0)
        return {
            "parameters": parameters,
            "gradients": self.number * self.trained / share["gradients"],
            "optimizer": self.number * self.moments / share["moments"],
            "activations": self.fixed + self.a_row * rows,
        }


@dataclass(frozen=True)
class Planned:
    """A fit: its name, what it holds, rows of a batch, batches of a step, steps (None: unknown), FLOPs of one."""

    name: str
    sizes: Sizes
    rows: int
    accumulate: int
    steps: int | None
    flops: float


@dataclass(frozen=True)
class Plan:
    """What the training fits of a run would take, printed instead of done.

    devices: numbers of devices. peak_flops: FLOP/s of one. mfu: the share of the peak that is reached, the same
    for any number of devices. Raises UserError for values that are none.
    """

    devices: Sequence[int] = (1, 2, 4, 8)
    peak_flops: float = 3.1e14
    mfu: float = 0.3

    def __post_init__(self) -> None:
        if not self.devices or min(self.devices) < 1:
            raise UserError(f"strategy.devices={list(self.devices)} must be numbers of at least 1")
        if not self.peak_flops > 0 or not 0 < self.mfu <= 1:
            raise UserError("strategy.peak_flops must be above 0, and strategy.mfu above 0 and at most 1")

    def __call__(self, run: Run) -> dict[str, Any]:
        """Tables to the screen, to plan.md and to plan.json."""
        fits = list(planned(run))
        rows = {fit.name: list(self.rows(fit)) for fit in fits}
        tables = [self._table(fit, rows[fit.name]) for fit in fits]
        for table in tables:
            render_table(table, run.console)
        atomic_write(run.dir / "plan.md", "\n\n".join(table.markdown() for table in tables) + "\n")
        write_json(run.dir / "plan.json", rows)
        return {"report": str(run.dir / "plan.md")}

    def rows(self, fit: Planned) -> Iterator[dict[str, Any]]:
        """A line for each way and number of devices that the batch can be divided among."""
        for world in self.devices:
            if fit.rows % world:
                continue
            for way in WAYS if world > 1 else WAYS[:1]:
                held = fit.sizes.bytes_of(way, world, fit.rows // world)
                yield {
                    "devices": world,
                    "way": way if world > 1 else "none",
                    **held,
                    "total": sum(held.values()),
                    "seconds_a_step": fit.flops / (world * self.peak_flops * self.mfu),
                }

    def _table(self, fit: Planned, rows: list[dict[str, Any]]) -> Table:
        causes = ("parameters", "gradients", "optimizer", "activations", "total")
        lines = []
        for row in rows:
            hours = None if fit.steps is None else fit.steps * row["seconds_a_step"] / 3600
            held = [row[cause] / memory.GB for cause in causes]
            lines.append([row["devices"], row["way"], *held, 1000 * row["seconds_a_step"], hours])
        headers = ["devices", "strategy", *(f"{cause}, GB" for cause in causes), "ms a step", "hours"]
        steps = "an unknown number of" if fit.steps is None else f"{fit.steps:,}"
        title = f"{fit.name}: {steps} steps of {fit.rows} x {fit.accumulate} rows, {fit.flops:.3g} FLOPs each"
        formats = ["", "", *[".3f"] * 5, ".3g", ".3g"]
        return Table(headers, lines, formats=formats, title=title)


def planned(run: Run) -> Iterator[Planned]:
    """The fits of a run in their order; of `mla`, `finetune` and `pipeline` those of its experts first."""
    names = list(run.cfg.expert.names)
    if run.cfg.phase.name == "expert":
        for name in names:
            yield _expert(run, name)
        return
    for name in names:
        yield _expert(run.sub("expert", name), name)
    last = STAGES.index(last_stage(run))
    for stage in STAGES[1 : last + 1]:
        if len(names) > 1 or stage != "7b":
            yield _stage(run, stage)


def _expert(run: Run, name: str) -> Planned:
    """An expert with numbers that nobody trained."""
    maker = expert_maker(run, name)
    training = run.plain(run.cfg.training[name])
    fit = Fit(run, maker.needs["shards"], training, name, train_split="expert_train", key=f"training.{name}")
    size = run.cfg.size
    network = ExpertLM((size.vocab_size, size.d_model), build_network(maker.spec["network"]))
    objective, arguments = get_object(maker.spec["objective"][0]), dict(maker.spec["objective"][1])
    if _without_targets(network):
        spec = run.plain(run.cfg.experts.transformer)
        arguments["teacher"] = ExpertLM((size.vocab_size, size.d_model), build_network(spec))
    if not maker.spec["own_table"]:
        network.embedding.requires_grad_(False)
    task = objective(network, **_told(run, fit), **arguments)
    return _planned(run, fit, task)


def _stage(run: Run, stage: str) -> Planned:
    """A stage of phase 7 over untrained experts; that of 7d without the slots it reads."""
    from nano_think.tasks.route import RouteTask  # here, so that naming a stage does not import Lightning

    numbers = stage_numbers(run, stage)
    fit = Fit(run, shards_maker(run), numbers, f"mla_{stage}", train_split=SPLIT, key="training.mla")
    network = build_network(mixture_spec(run, run.cfg.expert.names))
    _without_targets(network)
    unfreeze = run.cfg.training.mla.unfreeze
    return _planned(run, fit, RouteTask(network, stage=stage, unfreeze=unfreeze, **_told(run, fit)))


def _without_targets(network: nn.Module) -> bool:
    """Let a diffuser in a network work without ever having seen its targets; whether there was one."""
    found = [module for module in network.modules() if isinstance(module, DiffuserExpert)]
    for module in found:
        module.stats_ready.fill_(True)
    return bool(found)


def _told(run: Run, fit: Fit) -> dict[str, Any]:
    return {"domains": ["text"], "byte_lengths": torch.ones(run.cfg.size.vocab_size), **fit.factories()}


def _planned(run: Run, fit: Fit, task: FitTask) -> Planned:
    rows, length = fit.training["batch_size"], run.cfg.size.seq_len
    flops_options = {**task.flops_options, "tokens": rows * length}
    if fit.label == "mla_7b":
        flops_options["cached"] = run.cfg.training.mla.cache.mode == "auto"
    try:
        a_token = training_flops(task.network, length, **flops_options)
        if flops_options.get("cached"):  # rows are new, as they are in a first epoch
            a_token += filling_flops(task.network, length, tokens=length)
    except ValueError as error:
        raise UserError(f"the FLOPs of {fit.label} cannot be counted: {error}") from error
    a_step = a_token * rows * length * fit.accumulate + optimizer_flops(task.make_optimizer(task.network))
    steps = fit.training["max_steps"]
    if fit.training["max_flops"] is not None:
        steps = int(fit.training["max_flops"] // a_step)
    elif steps is None and fit.shards.recipe.exists(run.artifacts):
        steps, _ = fit.steps(fit.data())
    return Planned(fit.label, sizes(run, task, rows), rows, fit.accumulate, steps, a_step)


def sizes(run: Run, task: FitTask, rows: int) -> Sizes:
    """What a task holds, counted, and what a pass of it keeps, measured."""
    precision = "bf16-mixed" if run.cfg.precision == "auto" else run.cfg.precision
    few = min(rows, max(1, PROBE_TOKENS // run.cfg.size.seq_len))
    expected = memory.estimate(
        Probe(task, _rows(few, run.cfg.size.seq_len, run.cfg.size.vocab_size)), precision, rows
    )
    network = task.network
    blocks = [module for module in network.modules() if isinstance(module, Block | ModulatedBlock)]
    counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
    total = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return Sizes(
        parameters=total,
        trained=trained,
        moments=moments(task.make_optimizer(network)),
        outside=total - sum(counts),
        block=max(counts, default=0),
        fixed=expected.fixed,
        a_row=expected.a_row,
        number=FP64 if precision == "64-true" else FP32,
    )


def moments(optimizer: torch.optim.Optimizer) -> int:
    """Numbers of state: two a parameter of AdamW, one a parameter of Muon."""
    matrices = optimizer.num_matrix_groups if isinstance(optimizer, MuonWithAdamW) else 0
    return sum(
        (1 if number < matrices else 2) * parameter.numel()
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    )


def _rows(rows: int, length: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """A batch of documents as long as a row, of tokens drawn at random."""
    stream = torch.randint(0, vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    whole = torch.zeros(rows, length, dtype=torch.int64)
    batch = {
        "tokens": stream[:, :-1],
        "labels": stream[:, 1:],
        "positions": torch.arange(length).expand(rows, -1),
    }
    batch |= {"segments": whole, "doc_uid": whole, "cluster": whole}
    return batch | {"domain": whole[:, 0], "row": torch.arange(rows)}
