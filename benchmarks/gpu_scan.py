"""On a GPU: the selective scan alone by its backends, and the state-space stack beside Hugging Face's.

`--quick` runs the same code at toy sizes on the CPU, with the kernel of the CPU in the place of Triton's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Group, Missing, Options, close
from benchmarks.harness.case import Work, installed
from benchmarks.harness.gpu import Gpu
from benchmarks.peers import state_space_models
from benchmarks.peers.state_space_models import NORM_EPS
from benchmarks.scan import D_STATE as STATES
from benchmarks.scan import draw as draw_rows
from nano_think.ops.selective_scan import Backend, problem_of, selective_scan

BATCH, CHANNELS = 8, 768
LENGTHS, QUICK_LENGTHS = (512, 2048, 4096), (8, 16)
GATE_BATCH, GATE_LENGTH = 2, 200
# of the largest value; in bf16 the inputs are rounded alike, the results and what is summed up of them once
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
ENDINGS = {torch.float32: "", torch.bfloat16: " bf16"}
STACK_ROWS, LARGE_ROWS = 32, 64
STACK = state_space_models.Size()
# What a peer must compute the same as, what has to be installed for it, and rows where not as many as ours.
TWINS = {"HF Mamba": "nano_think", "HF Mamba with mambapy": "nano_think", "HF Mamba2": "nano_think SSD"}
NEEDS = {"HF Mamba": ("transformers",), "HF Mamba2": ("transformers",)}
NEEDS["HF Mamba with mambapy"] = ("transformers", "mambapy")
FEWER_ROWS = {"HF Mamba": 8, "HF Mamba with mambapy": 16, "HF Mamba2": 16}
NOTES = (
    "The scan: one layer, forward and the gradients of all its inputs. Its share is of the read bandwidth: each "
    "input read once forward and once backward, output and gradients moved once.",
    "bf16: sequences and output; inside, all of it is computed in fp32.",
    "The stack: bf16 autocast, gradients of all weights and of the input. Mamba-2 claims no FLOPs.",
    f"Fewer rows a step, to fit into memory and time: {', '.join(f'{n} {r}' for n, r in FEWER_ROWS.items())}.",
    "HF Mamba takes its own kernels where they are installed, its loop over positions otherwise.",
)
Scan = Callable[..., Tensor]


def group(options: Options) -> Group:
    """Empty, with the reason, where there is no GPU."""
    gpu, title = Gpu(options), "selective scan and state-space stack, fwd + bwd"
    if not gpu.usable:
        return gpu.empty(title)
    job = _Job(2, 16, QUICK_LENGTHS) if options.quick else _Job(BATCH, CHANNELS, LENGTHS)
    scans, missing = _Scans(gpu, job), []
    kernel: Backend = "triton" if gpu.device == "cuda" else "cpp"
    backends: list[Backend] = ["torch"]
    if problem := problem_of(kernel):
        missing.append(Missing(f"nano_think {kernel}", problem))
    else:
        backends.insert(0, kernel)
    if not installed("mambapy"):
        missing.append(Missing("mambapy", "pip install mambapy"))
    rows = 2 if options.quick else LARGE_ROWS if options.large else STACK_ROWS
    stack = replace(state_space_models.QUICK if options.quick else STACK, batch=rows)
    stacks = _Stacks(gpu, stack)
    names = [
        n for n in state_space_models.BUILDERS if n != "mambapy" and all(map(installed, NEEDS.get(n, ())))
    ]
    missing += [
        Missing(f"{name} stack", f"pip install {' '.join(NEEDS[name])}")
        for name in NEEDS
        if name not in names
    ]
    cases = scans.cases(backends) + [stacks.case(name, names) for name in names]
    if options.compiled:
        cases.append(stacks.case("nano_think", names, compiled=True))
    sizes = f"{job.batch} rows, {job.channels} channels, N {STATES}; stack of {stack.num_layers}, {rows} rows"
    return gpu.group(f"{title}, {sizes},", cases, missing, NOTES)


@dataclass(frozen=True)
class _Job:
    """What the scans read."""

    batch: int
    channels: int
    lengths: tuple[int, ...]

    def bytes(self, length: int, width: int) -> float:
        """That must be moved at least: x, dt, B, C twice, the gradient of y once, y and four gradients written.

        What does not grow with the length is left out.
        """
        return float(width * self.batch * length * (8 * self.channels + 6 * STATES))


def draw(batch: int, channels: int, length: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Those of `scan.draw` on a device, the sequences in `dtype`."""
    drawn = [tensor.detach() for tensor in draw_rows(channels, length, batch)]
    drawn = [tensor.to(dtype) if tensor.ndim == 3 else tensor for tensor in drawn]
    return [tensor.to(device).requires_grad_() for tensor in drawn]


def ours(backend: Backend, *inputs: Tensor) -> Tensor:
    """The output alone."""
    return selective_scan(*inputs, backend=backend)[0]


class _Scans:
    """One layer's scan by every backend."""

    def __init__(self, gpu: Gpu, job: _Job) -> None:
        self.gpu, self.job = gpu, job

    def cases(self, backends: list[Backend]) -> list[Case]:
        shortest = self.job.lengths[0]
        cases = []
        for backend in backends:
            for dtype in ENDINGS if backend != "torch" else (torch.float32,):
                scan, check = partial(ours, backend), self.gpu.exact(partial(self._same, backend, dtype))
                name = f"nano_think {backend}{ENDINGS[dtype]}"
                cases += [self._case(name, scan, dtype, length, check) for length in self.job.lengths]
        reference = partial(ours, "ref")
        cases.append(self._case("nano_think ref", reference, torch.float32, shortest, None, 1))
        if installed("mambapy"):
            from mambapy.mamba import MambaBlock

            peer = partial(MambaBlock.selective_scan, None)
            check = self.gpu.exact(partial(self._same_peer, peer))
            cases += [
                self._case("mambapy", peer, torch.float32, length, check) for length in self.job.lengths
            ]
        return cases

    def _case(
        self,
        name: str,
        scan: Scan,
        dtype: torch.dtype,
        length: int,
        check: Callable[[], object] | None,
        max_rounds: int | None = None,
    ) -> Case:
        peers = []
        if name.startswith("nano_think") and name != "nano_think ref":
            peers += [f"mambapy {length}"] if installed("mambapy") else []
            peers += [f"nano_think ref {length}"] if length == self.job.lengths[0] else []
            peers += [f"nano_think torch {length}"] if name != "nano_think torch" else []
        return self.gpu.case(
            f"{name} {length}",
            partial(self._work, scan, dtype, length),
            tokens=self.job.batch * length,
            bytes=self.job.bytes(length, torch.finfo(dtype).bits // 8),
            peak="read",
            peers=tuple(peers),
            check=check,
            max_rounds=max_rounds,
        )

    def _work(self, scan: Scan, dtype: torch.dtype, length: int) -> Work:
        inputs = draw(self.job.batch, self.job.channels, length, self.gpu.device, dtype)
        upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
        upstream = upstream.to(self.gpu.device, dtype)
        return lambda: torch.autograd.grad(scan(*inputs), inputs, upstream)

    def _same(self, backend: Backend, dtype: torch.dtype) -> None:
        """Outputs, last state and all gradients as the recurrence's, with step bias, gate, starts and a state.

        The recurrence reads the same rounded inputs in fp32, on the same device.
        """
        length = min(GATE_LENGTH, 8 * self.job.lengths[-1])
        leaves = self._everything(length, dtype)
        generator = torch.Generator().manual_seed(2)
        starts = (torch.rand(GATE_BATCH, length, generator=generator) < 3 / length).to(self.gpu.device)
        results = []
        ways: tuple[Backend, Backend] = (backend, "ref")
        for name in ways:
            read = {key: part if name == backend else part.float() for key, part in leaves.items()}
            y, last = selective_scan(**read, starts=starts, backend=name)
            upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
            loss = (y * upstream).float().sum() + last.sum()
            results.append([y, last, *torch.autograd.grad(loss, list(leaves.values()))])
        for key, got, want in zip(("y", "last", *leaves), *results, strict=True):
            what = f"the gradient of {key}" if key in leaves else key
            close(f"{what} of {backend} in {dtype}", got, want, TOLERANCE[dtype])

    def _everything(self, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """All arguments of a scan with a gradient, in its order."""
        device = self.gpu.device
        x, dt, A, B, C, D = draw(GATE_BATCH, self.job.channels, length, device, dtype)
        generator = torch.Generator().manual_seed(4)
        drawn = {
            "dt_bias": torch.randn(self.job.channels, generator=generator) - 3,
            "z": torch.randn(x.shape, generator=generator).to(dtype),
            "state": torch.randn(GATE_BATCH, self.job.channels, STATES, generator=generator),
        }
        more = {key: part.to(device).requires_grad_() for key, part in drawn.items()}
        return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, **more}

    def _same_peer(self, scan: Scan) -> None:
        """Output and gradients of another library's as the recurrence's."""
        length = min(GATE_LENGTH, self.job.lengths[0])
        inputs = draw(GATE_BATCH, self.job.channels, length, self.gpu.device, torch.float32)
        results = []
        for out in (scan(*inputs), ours("ref", *inputs)):
            results.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
        for key, got, want in zip(("y", "x", "dt", "A", "B", "C", "D"), *results, strict=True):
            close(key, got, want, TOLERANCE[torch.float32])


class _Stacks:
    """The layers of the expert, without embedding and head."""

    def __init__(self, gpu: Gpu, size: state_space_models.Size) -> None:
        self.gpu, self.base = gpu, size
        self.gates = {name: gpu.exact(partial(self._same, name)) for name in state_space_models.BUILDERS}

    def case(self, name: str, names: list[str], compiled: bool = False) -> Case:
        size = self._size(name)
        peers = [f"{peer} stack" for peer, twin in TWINS.items() if twin == name and peer in names]
        return self.gpu.case(
            f"{name} stack{' compiled' if compiled else ''}",
            partial(self._work, name, compiled),
            tokens=size.tokens,
            flops=size.flops if TWINS.get(name, name) == "nano_think" else 0.0,
            peak="bf16",
            peers=tuple(peers),
            check=self.gates[name],
            max_rounds=1 if name == "HF Mamba" else None,
        )

    def _size(self, name: str) -> state_space_models.Size:
        return replace(self.base, batch=min(self.base.batch, FEWER_ROWS.get(name, self.base.batch)))

    def _work(self, name: str, compiled: bool) -> Work:
        size = self._size(name)
        model, stack = state_space_models.BUILDERS[name](size)
        model.to(self.gpu.device).train()
        if compiled:
            model.compile()
        x = size.draw().detach().to(self.gpu.device).requires_grad_()
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(self.gpu.device)

        def step() -> None:
            x.grad = None
            model.zero_grad(set_to_none=True)
            with self.gpu.autocast():
                out = stack(x)
            out.backward(upstream.to(out.dtype))

        step()
        return step

    def _same(self, name: str) -> None:
        """Output and input gradient in fp32 as ours on the CPU, to 1e-3 and 5e-3.

        Our entry's norm, the identity for these inputs but not for their gradients, is put before another stack.
        """
        size = replace(self.base, batch=2, length=min(64, self.base.length))
        x = size.draw()
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        want = state_space_models.BUILDERS[TWINS.get(name, name)](size)[1](x)
        (want_grad,) = torch.autograd.grad(want, x, upstream)
        model, stack = state_space_models.BUILDERS[name](size)
        model.to(self.gpu.device).train()
        there = x.detach().to(self.gpu.device).requires_grad_()
        read = F.rms_norm(there, (size.d_model,), eps=NORM_EPS) if name in TWINS else there
        got = stack(read)
        (grad,) = torch.autograd.grad(got, there, upstream.to(self.gpu.device))
        close("the output", got.cpu(), want, 1e-3)
        close("the gradient of the input", grad.cpu(), want_grad, 5e-3)
