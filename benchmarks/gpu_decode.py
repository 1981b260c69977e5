"""On a GPU: decoding by the Transformer, beside Hugging Face's, by the state-space expert and the fused model.

`--quick` runs the same code at toy sizes on the CPU, so that it is tested where there is no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Group, Missing, Options
from benchmarks.harness.case import GateError, Work, installed
from benchmarks.harness.gpu import Gpu
from benchmarks.peers import fused_models, language_models, state_space_models
from benchmarks.peers import state_space_language_models as state_space
from nano_think.engine.generate import generate
from nano_think.engine.sampling import SamplingConfig

TRANSFORMER, LLAMA, STATIC = "nano_think transformer", "HF Llama", "HF Llama static cache"
ROWS, QUICK_ROWS = (1, 16, 128), (1, 2)
NEW, QUICK_NEW = 128, 8
GATE_ROWS = 4
NOTES = (
    "As many new tokens as the prompt has, greedy, bf16 weights; the prompt is read in the time too.",
    "HF Llama static cache: its forward pass compiled by itself, only with --compile.",
    "Memory: weights, and the most that decoding adds.",
)


def group(options: Options) -> Group:
    """Empty, with the reason, where there is no GPU."""
    gpu, title = Gpu(options), "decoding"
    if not gpu.usable:
        return gpu.empty(title)
    here = installed("transformers")
    missing = [] if here else [Missing(LLAMA, "pip install transformers")]
    peers = [] if not here else [LLAMA, STATIC] if options.compiled else [LLAMA]
    bench = _Decoding(gpu, _Job.of(options.quick), peers)
    rows = QUICK_ROWS if options.quick else ROWS
    cases = [bench.case(name, count) for count in rows for name in bench.gates]
    return gpu.group(f"{title}, prompt {bench.job.new} + {bench.job.new} new", cases, missing, NOTES)


@dataclass(frozen=True)
class _Job:
    """Dimensions of the three models, and how many tokens are read and made."""

    transformer: language_models.Size
    state_space: state_space.Size
    fused: fused_models.Size
    new: int

    @classmethod
    def of(cls, quick: bool) -> _Job:
        """At seed size, or at that of a test."""
        if not quick:
            size = language_models.Size(length=2 * NEW)
            return cls(size, state_space.Size(state_space_models.Size()), fused_models.Size(rows=1), NEW)
        return cls(
            language_models.Size(1, 32, 2, 48, 64, 2, 2 * QUICK_NEW),
            state_space.Size(state_space_models.QUICK, 64),
            fused_models.QUICK,
            QUICK_NEW,
        )

    def network(self, name: str) -> nn.Module:
        """A fresh one; our Transformer and Hugging Face's have the same weights."""
        if name == TRANSFORMER:
            return language_models.ours(self.transformer).network
        if name in (LLAMA, STATIC):
            return language_models.llama(self.transformer).network
        if name == "nano_think state space":
            return state_space.ours(self.state_space).network
        # not the one that is kept: this one goes to a device
        return fused_models.fused.__wrapped__(self.fused, "7c")

    def prompt(self, rows: int) -> Tensor:
        """(rows, new) at random."""
        return self.transformer.draw(rows, self.new)[0]


class _Decoding:
    """The cases; every model has one gate."""

    def __init__(self, gpu: Gpu, job: _Job, peers: list[str]) -> None:
        self.gpu, self.job, self.peers = gpu, job, peers
        names = [TRANSFORMER, *peers, "nano_think state space", "nano_think fused"]
        self.gates = {name: gpu.exact(partial(self._same_tokens, name)) for name in names}

    def case(self, name: str, rows: int) -> Case:
        return self.gpu.case(
            f"{name} {rows}",
            partial(self._work, name, rows),
            tokens=rows * self.job.new,
            peers=tuple(f"{peer} {rows}" for peer in self.peers) if name == TRANSFORMER else (),
            check=self.gates[name],
        )

    def _work(self, name: str, rows: int) -> Work:
        network = self.job.network(name).eval().to(self.gpu.device, torch.bfloat16)
        prompt = self.job.prompt(rows).to(self.gpu.device)
        return lambda: self._continue(name, network, prompt, self.job.new)

    @torch.no_grad()
    def _continue(self, name: str, network: Any, prompt: Tensor, new: int) -> list[list[int]]:
        """Greedy tokens after each prompt."""
        if name not in self.peers:
            return generate(network, prompt, new, SamplingConfig(temperature=0.0)).tokens
        options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new}
        options |= {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, "use_cache": True}
        if name == STATIC:
            options["cache_implementation"] = "static"
        out = network.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        return out[:, prompt.shape[1] :].tolist()

    def _same_tokens(self, name: str) -> None:
        """The first greedy token in fp32 on the device is ours on the CPU, for every row."""
        prompt = self.job.prompt(GATE_ROWS)
        own: Any = self.job.network(TRANSFORMER if name in self.peers else name).eval()
        with torch.no_grad():
            want = own(prompt).logits[:, -1].argmax(dim=-1).tolist()
        network = self.job.network(name).eval().to(self.gpu.device)
        got = [tokens[0] for tokens in self._continue(name, network, prompt.to(self.gpu.device), 1)]
        if got != want:
            raise GateError(f"the first tokens are {got}, not {want}")
