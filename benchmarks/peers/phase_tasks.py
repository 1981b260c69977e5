"""The tasks of the phases that no other library has: denoising (6b), routing from kept outputs (7b), and 7c."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.peers import language_models
from benchmarks.peers.fused_models import Given, Size, batch, diffuser, fused, route, stir
from nano_think.evals.flops import training_flops
from nano_think.experts.diffuser import DiffuserExpert
from nano_think.model import ExpertLM, NanoThink
from nano_think.optim.anchor import AnchoredDecay
from nano_think.optim.groups import adamw
from nano_think.optim.schedule import constant
from nano_think.tasks.base import FitTask
from nano_think.tasks.denoise import DenoiseTask, fit_target_statistics


@dataclass(frozen=True)
class Phase:
    """A task with the rows it is trained on."""

    task: FitTask
    rows: dict[str, Tensor]

    def to(self, device: str) -> Phase:
        """Task and rows on a device; a teacher follows the rows."""
        return Phase(self.task.to(device), {name: part.to(device) for name, part in self.rows.items()})

    def loss(self) -> Tensor:
        """The mean over positions, of which a step takes the gradient."""
        return self.task.batch_loss(self.rows)["loss"] / self.rows["labels"].numel()

    def draw_on_cpu(self) -> None:
        """A generator of a GPU draws other noise, which is no fault."""
        if isinstance(self.task, DenoiseTask):
            self.task._generator = lambda epoch, number: torch.Generator().manual_seed(7)  # type: ignore[method-assign]

    def optimizer(self) -> torch.optim.Optimizer:
        """The task's own, the table of 7c anchored to where it starts."""
        optimizer, network = self.task.make_optimizer(self.task.network), self.task.network
        table = network.embedding.weight
        if isinstance(network, NanoThink) and table.requires_grad:
            AnchoredDecay(table, table.detach().clone(), 1e-3).attach(optimizer)
        return optimizer

    @property
    def flops(self) -> float:
        """Of both passes over the rows by the project's formula, without what is computed again."""
        tokens = self.rows["tokens"].numel()
        # of equal documents whose tokens see as many keys as these
        length = 2 * float((self.rows["positions"] + 1).double().mean()) - 1
        options = {"tokens": tokens, **self.task.flops_options}
        return tokens * training_flops(self.task.network, length, recompute=False, **options)

    def compile(self) -> None:
        """The experts in place, as a fit does; a diffuser is left out there too."""
        for expert in self.task.network.experts.values():
            if not isinstance(expert, DiffuserExpert):
                expert.compile()


def denoising(size: Size) -> Phase:
    """6b: the diffuser restores what a frozen Transformer of the same size says, and is judged by its tokens."""
    teacher = language_models.ours(
        language_models.Size(size.layers, size.d_model, size.heads, size.ffn, size.vocab)
    ).network
    assert isinstance(teacher, ExpertLM)
    table = nn.Embedding.from_pretrained(teacher.embedding.weight.detach().clone(), freeze=True)
    network = ExpertLM(table, diffuser(size).requires_grad_(True))
    fit_target_statistics(network, teacher.eval(), [batch(replace(size, rows=1))])
    task = DenoiseTask(
        network.train(),
        optimizer=partial(adamw, lr=1e-4, weight_decay=0.1),
        schedule=partial(constant, warmup_steps=0),
        domains=["one", "two"],
        byte_lengths=torch.ones(size.vocab),
        teacher=teacher,
    )
    return Phase(task, batch(size))


def kept(size: Size) -> Phase:
    """7b: the router alone, from hidden states of experts that were computed before."""
    size = replace(size, cached_tokens=size.tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        experts: dict[str, nn.Module] = {name: Given() for name in ("transformer", "diffuser", "state_space")}
        network = NanoThink(experts, size.vocab, size.d_model)
        stir(network)
    return Phase(route(network.train(), size, "7b", cached=True), batch(size))


def context(size: Size) -> Phase:
    """7c: router, table and MLA through all frozen experts."""
    # not the one that is kept: this one goes to a device
    network = fused.__wrapped__(size, "7c")
    return Phase(route(network, size, "7c"), batch(size))


PHASES: dict[str, Callable[[Size], Phase]] = {
    "nano_think diffuser": denoising,
    "nano_think 7b kept": kept,
    "nano_think 7c": context,
}
