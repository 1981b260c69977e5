"""On a GPU: one training step of every phase at seed size beside Hugging Face's Llama, Mamba and Mamba2.

`--quick` runs the same code at toy sizes on the CPU, so that it is tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Group, Missing, Options, close
from benchmarks.harness.case import Work, installed
from benchmarks.harness.gpu import Gpu, same_nats
from benchmarks.peers import fused_models, language_models, phase_tasks, state_space_models
from benchmarks.peers import state_space_language_models as state_space
from benchmarks.peers.language_models import LanguageModel
from nano_think.evals.flops import training_flops
from nano_think.optim.groups import adamw

ROWS, LARGE_ROWS, QUICK_ROWS = 64, 128, 2
TRANSFORMER, MAMBA, SSD = "nano_think transformer", "nano_think state space", "nano_think SSD"
BUILDERS: dict[str, Callable[[Any], LanguageModel]] = {
    TRANSFORMER: language_models.ours,
    "HF Llama": language_models.llama,
    **state_space.BUILDERS,
}
# What a peer must compute the same as, what has to be installed for it, and its rows where not as many as ours.
TWINS = {"HF Llama": TRANSFORMER, "HF Mamba": MAMBA, "HF Mamba with mambapy": MAMBA, "HF Mamba2": SSD}
NEEDS = dict.fromkeys(TWINS, ("transformers",))
NEEDS["HF Mamba with mambapy"] = ("transformers", "mambapy")
FEWER_ROWS = {"HF Mamba": 8, "HF Mamba with mambapy": 32, "HF Mamba2": 16}
SLOW = {"HF Mamba": 1}  # rounds: a loop over positions, quadratic in the length backwards
COMPILED = (TRANSFORMER, "HF Llama", MAMBA, "nano_think 7c")
GATE_ROWS, GATE_LENGTH = 2, 64
QUICK_TRANSFORMER = language_models.Size(1, 32, 2, 48, 64, QUICK_ROWS, 16)
NOTES = (
    "A step: forward, loss, backward, fused AdamW, gradients dropped; bf16 autocast over fp32 weights.",
    "Share of the peak is MFU: useful FLOPs by the project's formula, without optimizer and without what is "
    "computed again; a peer is given those of ours, whose adaptor at the entry is not counted.",
    "Rows of one document for language models and their peers; of about three for diffuser, 7b and 7c.",
    "7b kept: outputs of experts come from memory of the CPU.",
    f"Fewer rows a step, to fit into memory and time: {', '.join(f'{n} {r}' for n, r in FEWER_ROWS.items())}.",
    "HF Mamba takes its own kernels where they are installed, its loop over positions otherwise.",
    "Memory: weights, optimizer state, and the most that a step adds.",
)


def group(options: Options) -> Group:
    """Empty, with the reason, where there is no GPU."""
    gpu, title = Gpu(options), "training steps of all phases"
    if not gpu.usable:
        return gpu.empty(title)
    rows = QUICK_ROWS if options.quick else LARGE_ROWS if options.large else ROWS
    present = [name for name in BUILDERS if all(installed(module) for module in NEEDS.get(name, ()))]
    missing = [
        Missing(name, f"pip install {' '.join(NEEDS[name])}") for name in BUILDERS if name not in present
    ]
    models, phases = _Models(gpu, rows, options.quick, present), _Phases(gpu, rows, options.quick)
    cases = [models.case(name) for name in present] + [phases.case(name) for name in phase_tasks.PHASES]
    if options.compiled:
        cases += [models.case(name, compiled=True) for name in COMPILED if name in present]
        cases += [phases.case(name, compiled=True) for name in COMPILED if name in phase_tasks.PHASES]
    return gpu.group(
        f"{title}, {rows} rows of {models.size(TRANSFORMER).length} tokens", cases, missing, NOTES
    )


def training_step(gpu: Gpu, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Work:
    """One unit of work, done once: optimizer state is made, kernels are compiled."""

    def step() -> None:
        with gpu.autocast():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    return step


class _Models:
    """Language models that other libraries have too."""

    def __init__(self, gpu: Gpu, rows: int, quick: bool, present: list[str]) -> None:
        self.gpu, self.rows, self.quick, self.present = gpu, rows, quick, present
        self.gates = {name: gpu.exact(partial(self._same, name)) for name in present}
        self.per_token = {name: self._flops(name) for name in (TRANSFORMER, MAMBA, SSD)}

    def size(self, name: str, rows: int | None = None, length: int | None = None) -> Any:
        """Dimensions and batch of a model's step."""
        rows = rows or min(self.rows, FEWER_ROWS.get(name, self.rows))
        if name in (TRANSFORMER, "HF Llama"):
            size = QUICK_TRANSFORMER if self.quick else language_models.Size()
            return replace(size, batch=rows, length=length or size.length)
        stack = state_space_models.QUICK if self.quick else state_space_models.Size()
        stack = replace(stack, batch=rows, length=length or stack.length)
        return state_space.Size(stack, 64 if self.quick else 32_000)

    def case(self, name: str, compiled: bool = False) -> Case:
        size, ending = self.size(name), " compiled" if compiled else ""
        family = TWINS.get(name, name)
        peers = [peer for peer, twin in TWINS.items() if twin == name and peer in self.present]
        both = [f"{peer} compiled" for peer in peers if compiled and peer in COMPILED]
        return self.gpu.case(
            name + ending,
            partial(self._step, name, compiled),
            tokens=size.tokens,
            flops=size.tokens * self.per_token[family],
            peak="bf16",
            peers=(*peers, *both),
            check=self.gates[name],
            max_rounds=SLOW.get(name),
        )

    def _step(self, name: str, compiled: bool) -> Work:
        size = self.size(name)
        model = BUILDERS[name](size).to(self.gpu.device).train()
        optimizer = adamw(model, lr=1e-4, weight_decay=0.1)
        tokens, labels = (part.to(self.gpu.device) for part in size.draw())
        if compiled:
            model.parts[0].compile()
        return training_step(self.gpu, lambda: model(tokens, labels), optimizer)

    def _flops(self, name: str) -> float:
        """Useful FLOPs a token of both passes, without our adaptor."""
        size = self.size(name, 1)
        network = BUILDERS[name](size).network
        per_token = training_flops(network, size.length, recompute=False, tokens=self.rows * size.length)
        return per_token - 6.0 * network.get_submodule("embedding").get_parameter("weight").shape[1] ** 2

    def _same(self, name: str) -> None:
        """Loss on the device as ours in fp32 on the CPU, in fp32 and under autocast, and a gradient in fp32."""
        size = self.size(name, GATE_ROWS, min(GATE_LENGTH, self.size(name).length))
        tokens, labels = size.draw()
        own = BUILDERS[TWINS.get(name, name)](size).train()
        want = own(tokens, labels)
        (want_grad,) = torch.autograd.grad(want, own.gain)
        model = BUILDERS[name](size).to(self.gpu.device).train()
        gain: Tensor = model.gain.to(self.gpu.device)
        tokens, labels = tokens.to(self.gpu.device), labels.to(self.gpu.device)
        for autocast in (False, True):
            with self.gpu.autocast(autocast):
                got = model(tokens, labels)
            same_nats(got, want, autocast)
            if not autocast:
                (grad,) = torch.autograd.grad(got, gain)
                close("the gradient of the first gain in fp32", grad.cpu(), want_grad, 1e-2)


class _Phases:
    """Tasks that are ours alone."""

    def __init__(self, gpu: Gpu, rows: int, quick: bool) -> None:
        self.gpu = gpu
        base = fused_models.QUICK if quick else fused_models.Size()
        self.size = replace(base, rows=rows)
        self.gates = {name: gpu.exact(partial(self._same, name)) for name in phase_tasks.PHASES}
        self.flops = {name: phase_tasks.PHASES[name](self.size).flops for name in phase_tasks.PHASES}

    def case(self, name: str, compiled: bool = False) -> Case:
        return self.gpu.case(
            f"{name} compiled" if compiled else name,
            partial(self._step, name, compiled),
            tokens=self.size.tokens,
            flops=self.flops[name],
            peak="bf16",
            check=self.gates[name],
        )

    def _step(self, name: str, compiled: bool) -> Work:
        phase = phase_tasks.PHASES[name](self.size).to(self.gpu.device)
        if compiled:
            phase.compile()
        return training_step(self.gpu, phase.loss, phase.optimizer())

    @torch.no_grad()
    def _same(self, name: str) -> None:
        """Loss on the device as in fp32 on the CPU, without dropout, in fp32 and under autocast."""
        phase = phase_tasks.PHASES[name](
            replace(self.size, rows=GATE_ROWS, length=min(GATE_LENGTH, self.size.length))
        )
        phase.task.eval()
        phase.draw_on_cpu()
        want = phase.loss()
        phase = phase.to(self.gpu.device)
        for autocast in (False, True):
            with self.gpu.autocast(autocast):
                same_nats(phase.loss(), want, autocast)
