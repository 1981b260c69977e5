"""Training step at seed size: forward, loss, backward, fused AdamW; ours, Hugging Face Llama, litgpt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness import Case, Group, Missing, Options, close
from benchmarks.harness.case import GateError, Peak, installed
from benchmarks.peers.language_models import BUILDERS, LanguageModel, Size
from nano_think.optim.groups import adamw

OURS = "nano_think"
MODULES = {"HF Llama": "transformers", "litgpt": "litgpt"}
PRECISIONS: dict[Peak, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
QUICK = Size(num_layers=1, d_model=32, num_heads=2, ffn_dim=64, vocab_size=128, batch=2, length=16)
GATE_SHAPE = (2, 64)
NOTES = (
    "FLOPs: 6 a token and matmul parameter (tied head included), 6 L d T a token for visible attention.",
    "bf16 is autocast over fp32 master weights, for all.",
)


def group(options: Options) -> Group:
    """One optimizer step on random tokens; peak memory is taken at 32 rows."""
    size = QUICK if options.quick else Size(batch=32) if options.large else Size()
    names = [name for name in BUILDERS if name not in MODULES or installed(MODULES[name])]
    missing = [
        Missing(f"{name} {precision}", f"pip install {module}")
        for name, module in MODULES.items()
        if name not in names
        for precision in PRECISIONS
    ]
    endings = [*PRECISIONS, *(f"{p} compiled" for p in PRECISIONS if options.compiled)]
    cases = [_case(size, name, names, ending) for ending in endings for name in names]
    title = f"training step, {size.num_layers} layers, d {size.d_model}, {size.batch} x {size.length} tokens"
    return Group(title, cases, missing, NOTES)


def _case(size: Size, name: str, names: list[str], ending: str) -> Case:
    precision: Peak = "fp32" if ending.startswith("fp32") else "bf16"
    peers = tuple(f"{peer} {ending}" for peer in names if peer != name)
    if ending.endswith("compiled"):
        peers = (f"{name} {precision}", *peers)
    return Case(
        f"{name} {ending}",
        setup=partial(training_step, size, name, PRECISIONS[precision], compiled=ending.endswith("compiled")),
        tokens=size.tokens,
        flops=size.flops,
        peak=precision,
        peers=peers if name == OURS else (),
        check=partial(same_function, size, name, PRECISIONS[precision]),
    )


def training_step(size: Size, name: str, dtype: torch.dtype, compiled: bool = False) -> Callable[[], object]:
    """A model in training, ready to be stepped; compiled on its first call."""
    model = BUILDERS[name](size).train()
    optimizer = adamw(model, lr=1e-4, weight_decay=0.1, fused=True)
    tokens, labels = size.draw()
    if compiled:
        model.parts[0].compile()

    def step() -> None:
        loss_of(model, tokens, labels, dtype).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if compiled:
        step()
    return step


def loss_of(
    model: LanguageModel, tokens: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Mean loss in nats, under autocast where `dtype` is not fp32."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return model(tokens, labels)


def same_function(size: Size, name: str, dtype: torch.dtype) -> None:
    """Loss and a gradient equal ours in fp32: to 1e-4 and 1e-3 in fp32, to 2e-2 and 1e-1 in bf16.

    The gradient is that of the first block's norm, in parts of its largest value.
    For our own cases the other side is the plain loss over all logits.
    """
    loss_bound, gradient_bound = (1e-4, 1e-3) if dtype == torch.float32 else (2e-2, 1e-1)
    tokens, labels = size.draw(GATE_SHAPE[0], min(GATE_SHAPE[1], size.length))
    wanted = BUILDERS[OURS](size)
    if name == OURS:
        logits = wanted.network(tokens).logits
        want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    else:
        want = wanted(tokens, labels)
    model = BUILDERS[name](size).train()
    got = loss_of(model, tokens, labels, dtype)
    if not abs(got.item() - want.item()) <= loss_bound:
        raise GateError(f"loss {got.item():.6f} instead of {want.item():.6f} nats")
    (want_grad,) = torch.autograd.grad(want, wanted.gain)
    (got_grad,) = torch.autograd.grad(got, model.gain)
    close("the gradient of the first block's norm", got_grad, want_grad, gradient_bound)
