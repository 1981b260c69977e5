"""On a GPU: training steps, state-space stack and decoding beside Hugging Face's, by the wall clock.

`--quick` runs the same code at toy sizes on the CPU, so that it is tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.harness import Case, Group, Measured, Missing, Options, close
from benchmarks.harness.case import GateError, Work, installed
from benchmarks.peers import language_models, state_space_models
from nano_think.engine.generate import generate
from nano_think.engine.sampling import SamplingConfig
from nano_think.optim.groups import adamw

OURS, LLAMA = "nano_think", "HF Llama"
STACKS = {"nano_think": "transformers", "HF Mamba": "transformers", "HF Mamba2": "transformers"}
TRAIN = language_models.Size(batch=32)
STACK = state_space_models.Size(batch=32)
QUICK_TRAIN = language_models.Size(
    num_layers=1, d_model=32, num_heads=2, ffn_dim=48, vocab_size=64, batch=2, length=16
)
QUICK_STACK = state_space_models.Size(num_layers=1, d_model=16, d_state=4, length=16)
DECODE_ROWS, QUICK_ROWS = (1, 16, 128), (1, 2)
PROMPT, NEW, QUICK_TOKENS = 128, 128, 8
NOTES = (
    "Training in bf16 autocast over fp32 weights; the state-space stack in bf16 autocast too, its scan in fp32.",
    "HF Mamba takes its own kernels where they are installed, its loop over positions otherwise.",
)


def group(options: Options) -> Group:
    """Empty, with the reason, where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    missing = [Missing(LLAMA, "pip install transformers")] if not installed("transformers") else []
    if device == "cpu" and not options.quick:
        missing = [Missing("every case", "torch finds no CUDA device")]
        return Group("training and decoding on a GPU", [], missing, NOTES, device=device)
    names = [OURS] if missing else [OURS, LLAMA]
    train, stack = (QUICK_TRAIN, QUICK_STACK) if options.quick else (TRAIN, STACK)
    bench = _Bench(
        device, PROMPT if not options.quick else QUICK_TOKENS, NEW if not options.quick else QUICK_TOKENS
    )
    cases = [
        bench.training(train, name, names, compiled)
        for compiled in ((False, True) if options.compiled else (False,))
        for name in names
    ]
    stacks = [name for name in STACKS if name == OURS or installed(STACKS[name])]
    cases += [bench.stack(stack, name, stacks) for name in stacks]
    rows = QUICK_ROWS if options.quick else DECODE_ROWS
    cases += [
        bench.decoding(replace(train, length=bench.prompt), count, name, names)
        for count in rows
        for name in names
    ]
    derived = {f"peak memory of {case.name}, GB": partial(bench.peak_memory, case.name) for case in cases}
    where = torch.cuda.get_device_name() if device == "cuda" else "toy sizes on the CPU"
    title = f"training ({train.batch} x {train.length}), state space and decoding on {where}"
    return Group(title, cases, missing, NOTES, derived if device == "cuda" else {}, device)


class _Bench:
    """The cases of one device; remembers the most memory that each of them held."""

    def __init__(self, device: str, prompt: int, new: int) -> None:
        self.device, self.prompt, self.new = device, prompt, new
        self.peaks: dict[str, float] = {}

    def training(self, size: language_models.Size, name: str, names: list[str], compiled: bool) -> Case:
        ending = "compiled" if compiled else "eager"
        return self._case(
            f"{name} training {ending}",
            partial(self._training_step, size, name, compiled),
            tokens=size.tokens,
            flops=size.flops,
            peak="bf16",
            peers=tuple(f"{peer} training {ending}" for peer in names if peer != name)
            if name == OURS
            else (),
            check=partial(self._same_loss, size, name),
        )

    def stack(self, size: state_space_models.Size, name: str, names: list[str]) -> Case:
        return self._case(
            f"{name} state space",
            partial(self._stack_step, size, name),
            tokens=size.tokens,
            flops=size.flops if name != "HF Mamba2" else 0.0,
            peak="bf16",
            peers=tuple(f"{peer} state space" for peer in names if peer != name) if name == OURS else (),
            check=partial(self._same_stack, size, name) if name != "HF Mamba2" else None,
        )

    def decoding(self, size: language_models.Size, rows: int, name: str, names: list[str]) -> Case:
        return self._case(
            f"{name} decoding {rows}",
            partial(self._decoding, size, rows, name),
            tokens=rows * self.new,
            peers=tuple(f"{peer} decoding {rows}" for peer in names if peer != name) if name == OURS else (),
            check=partial(self._same_tokens, size, name),
        )

    def peak_memory(self, name: str, measured: Measured) -> float:
        """Gigabytes that torch had allocated at most while the case ran."""
        return self.peaks[name] / 1e9

    def _case(self, name: str, setup: Callable[[], Work], **more: Any) -> Case:
        return Case(name, setup=partial(self._remembering, name, setup), **more)

    def _remembering(self, name: str, setup: Callable[[], Work]) -> Work:
        work = setup()
        if self.device == "cpu":
            return work

        def remembered() -> None:
            torch.cuda.reset_peak_memory_stats()
            work()
            self.peaks[name] = max(self.peaks.get(name, 0.0), torch.cuda.max_memory_allocated())

        return remembered

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16)

    def _model(self, size: language_models.Size, name: str) -> language_models.LanguageModel:
        return language_models.BUILDERS[name](size).to(self.device)

    def _training_step(self, size: language_models.Size, name: str, compiled: bool) -> Work:
        model = self._model(size, name).train()
        optimizer = adamw(model, lr=1e-4, weight_decay=0.1, fused=True)
        tokens, labels = (tensor.to(self.device) for tensor in size.draw())
        if compiled:
            model.parts[0].compile()

        def step() -> None:
            with self._autocast():
                loss = model(tokens, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        return step

    def _stack_step(self, size: state_space_models.Size, name: str) -> Work:
        model, stack = state_space_models.BUILDERS[name](size)
        model.to(self.device)
        x = size.draw().detach().to(self.device).requires_grad_()
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(self.device)

        def step() -> None:
            x.grad = None
            model.zero_grad(set_to_none=True)
            with self._autocast():
                out = stack(x)
            out.backward(upstream.to(out.dtype))

        return step

    def _decoding(self, size: language_models.Size, rows: int, name: str) -> Work:
        model = self._model(size, name).eval().to(torch.bfloat16)
        prompt = size.draw(rows, self.prompt)[0].to(self.device)
        return lambda: self._continue(model, name, prompt)

    @torch.no_grad()
    def _continue(
        self, model: language_models.LanguageModel, name: str, prompt: torch.Tensor
    ) -> list[list[int]]:
        """Greedy tokens after each prompt."""
        network: Any = model.network
        if name == OURS:
            return generate(network, prompt, self.new, SamplingConfig(temperature=0.0)).tokens
        length = {
            "max_new_tokens": self.new,
            "min_new_tokens": self.new,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        out = network.generate(prompt, do_sample=False, use_cache=True, **length)
        return out[:, prompt.shape[1] :].tolist()

    def _same_loss(self, size: language_models.Size, name: str) -> None:
        """Loss under bf16 autocast on the device against ours in fp32 on the CPU, to 2e-2 nats."""
        tokens, labels = size.draw(2, min(64, size.length))
        with torch.no_grad():
            want = language_models.ours(size)(tokens, labels).item()
            with self._autocast():
                got = self._model(size, name)(tokens.to(self.device), labels.to(self.device)).item()
        if not abs(got - want) <= 2e-2:
            raise GateError(f"loss {got:.4f} instead of {want:.4f} nats")

    @torch.no_grad()
    def _same_stack(self, size: state_space_models.Size, name: str) -> None:
        """Output in fp32 on the device against ours on the CPU, to 1e-3; ours normalises its input."""
        x = size.draw(min(64, size.length)).detach()
        want = state_space_models.s6(size)[1](x)
        model, stack = state_space_models.BUILDERS[name](size)
        model.to(self.device)
        normed = torch.nn.functional.rms_norm(x, (size.d_model,), eps=state_space_models.NORM_EPS)
        close("the output", stack((x if name == OURS else normed).to(self.device)).cpu(), want, 1e-3)

    def _same_tokens(self, size: language_models.Size, name: str) -> None:
        """The first greedy token in fp32 on the device is ours on the CPU, for every row."""
        prompt = size.draw(4, self.prompt)[0]
        with torch.no_grad():
            logits = language_models.ours(size).eval().network(prompt).logits[:, -1]
        model = self._model(size, name).eval()
        got = [tokens[0] for tokens in self._continue(model, name, prompt.to(self.device))]
        if got != logits.argmax(dim=-1).tolist():
            raise GateError(f"the first tokens are {got}, not {logits.argmax(dim=-1).tolist()}")
