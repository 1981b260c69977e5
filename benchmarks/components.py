"""Where a training step goes: the parts of each expert timed apart, as shares of the whole step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Group, Measured, Options, close
from benchmarks.harness.case import Peak, Work
from benchmarks.peers.language_models import Size, ours
from nano_think.experts.diffuser import DiffuserExpert
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.model import ExpertLM
from nano_think.ops.cross_entropy import linear_cross_entropy
from nano_think.ops.layout import Layout
from nano_think.optim.groups import adamw

QUICK = Size(num_layers=1, d_model=32, num_heads=2, ffn_dim=64, vocab_size=128, batch=2, length=16)
PRECISIONS: dict[Peak, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
DIFFUSER_LAYERS, DIFFUSER_FFN = 4, 512
Part = Callable[[Tensor], Tensor]
NOTES = (
    "A part is run once for each place it has in the network, forward and backward, on inputs of its own.",
    "bf16 is autocast over fp32 weights: timed apart, a part casts its weights as it does inside the step.",
    "What the parts leave of the whole are residual sums, the table's lookup and gradients added up.",
)


@dataclass(frozen=True)
class Network:
    """A language model and its parts by name: the functions of vectors that a step runs one after another."""

    model: ExpertLM
    parts: dict[str, list[Part]]


def group(options: Options) -> Group:
    """Every expert in both precisions."""
    size = QUICK if options.quick else Size(batch=4)
    cases: list[Case] = []
    derived: dict[str, Callable[[Measured], float]] = {}
    for precision in PRECISIONS:
        for name in BUILDERS:
            cases += _cases(size, name, precision, derived)
    shape = f"{size.num_layers} layers, d {size.d_model}, {size.batch} x {size.length} tokens"
    title = f"parts of a training step, {shape}"
    return Group(title, cases, (), NOTES, derived)


def _cases(
    size: Size, name: str, precision: Peak, derived: dict[str, Callable[[Measured], float]]
) -> list[Case]:
    dtype, whole = PRECISIONS[precision], f"{name} {precision}: whole step"
    works: dict[str, Callable[[], Work]] = {whole: partial(whole_step, size, name, dtype)}
    for part in BUILDERS[name](size).parts:
        works[f"{name} {precision}: {part}"] = partial(part_step, size, name, part, dtype)
    works[f"{name} {precision}: head and loss"] = partial(head_step, size, name, dtype)
    works[f"{name} {precision}: optimizer"] = partial(optimizer_step, size, name)
    for case in works:
        if case != whole:
            derived[f"{case}, share of the step"] = partial(share, case, whole)
    check = _gate(size, name)
    return [Case(case, setup=setup, tokens=size.tokens, check=check) for case, setup in works.items()]


def share(part: str, whole: str, measured: Measured) -> float:
    """Of the whole step's time in the same round, median over the rounds."""
    return measured.over_rounds(lambda seconds: seconds[part] / seconds[whole])


@cache
def _gate(size: Size, name: str) -> Callable[[], object]:
    return partial(parts_make_the_whole, size, name)


def transformer(size: Size) -> Network:
    """Its norms, attention and feed-forward networks."""
    model: Any = ours(size).network
    blocks, layout = list(model.expert.blocks), _layout(size)
    norms = [norm for block in blocks for norm in (block.mixer_norm, block.ffn_norm)]
    parts = _edges(model, norms)
    parts["attention"] = [partial(_at, block.mixer, layout) for block in blocks]
    parts["feed-forward"] = [block.ffn for block in blocks]
    return Network(model, parts)


def state_space(size: Size) -> Network:
    """Its norms and S6 mixers."""
    model = _language_model(
        size, StateSpaceExpert(size.d_model, size.num_layers, 2 * size.d_model, dropout=0.0)
    )
    blocks, layout = list(model.expert.blocks), _layout(size)
    parts = _edges(model, [block.mixer_norm for block in blocks])
    parts["S6"] = [partial(_at, block.mixer, layout) for block in blocks]
    return Network(model, parts)


def diffuser(size: Size) -> Network:
    """Its clean stream and one noisy pass: what it does inside the mixture."""
    layers, ffn_dim = (1, size.ffn_dim) if size.num_layers == 1 else (DIFFUSER_LAYERS, DIFFUSER_FFN)
    expert = DiffuserExpert(size.d_model, layers, size.num_heads, ffn_dim, dropout=0.0)
    with torch.no_grad():
        expert.fit_statistics(torch.randn(64, size.d_model, generator=torch.Generator().manual_seed(3)))
        for parameter in expert.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    model, layout = _language_model(size, expert), _layout(size)
    denoiser = expert.denoiser

    def clean(x: Tensor) -> Tensor:
        return torch.stack([sum(pair) for pair in denoiser.clean_stream(x, layout)])

    def noisy(x: Tensor) -> Tensor:
        queries = x.unflatten(-1, (size.num_heads, -1)).transpose(1, 2)
        return denoiser(torch.zeros_like(x), denoiser.train_T, x, [(queries, queries)] * layers, layout)

    parts: dict[str, list[Part]] = {"entry": [expert.entry], "clean stream": [clean], "noisy pass": [noisy]}
    return Network(model, parts)


BUILDERS: dict[str, Callable[[Size], Network]] = {
    "Transformer": transformer,
    "state space": state_space,
    "diffuser": diffuser,
}


def _language_model(size: Size, expert: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ExpertLM((size.vocab_size, size.d_model), expert)


def _layout(size: Size) -> Layout:
    return Layout.span(0, size.length)


def _at(mixer: Any, layout: Layout, x: Tensor) -> Tensor:
    return mixer(x, layout)


def _edges(model: Any, norms: Iterable[Part]) -> dict[str, list[Part]]:
    return {"norms": [*norms, model.expert.norm], "entry": [model.expert.entry]}


def _draw(size: Size) -> Tensor:
    return torch.randn(size.batch, size.length, size.d_model, generator=torch.Generator().manual_seed(1))


def whole_step(size: Size, name: str, dtype: torch.dtype) -> Work:
    """Forward, loss, backward and optimizer."""
    model = BUILDERS[name](size).model.train()
    optimizer = adamw(model, lr=1e-4, weight_decay=0.1, fused=True)
    tokens, labels = size.draw()

    def work() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model.token_nll(tokens, labels).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def part_step(size: Size, name: str, part: str, dtype: torch.dtype) -> Work:
    """Forward and backward of every place of a part; gradients are kept and added to, as in a step."""
    network = BUILDERS[name](size)
    # the residual stream that norms read is fp32
    x = _draw(size).to(torch.float32 if part in ("norms", "entry") else dtype).requires_grad_()

    def work() -> None:
        network.model.zero_grad(set_to_none=True)
        for module in network.parts[part]:
            x.grad = None
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                out = module(x)
            out.backward(torch.ones_like(out))

    return work


def head_step(size: Size, name: str, dtype: torch.dtype) -> Work:
    """The tied head with its loss, on the expert's own outputs: larger ones would make denormal probabilities."""
    model, (tokens, labels) = BUILDERS[name](size).model, size.draw()
    table = model.embedding.weight
    with torch.no_grad():
        hidden = model(tokens, with_logits=False).hidden
    hidden = hidden.clone().requires_grad_()

    def work() -> None:
        hidden.grad = table.grad = None
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = linear_cross_entropy(hidden, table, labels).mean()
        loss.backward()

    return work


def optimizer_step(size: Size, name: str) -> Work:
    """Fused AdamW over all parameters."""
    model = BUILDERS[name](size).model
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    return adamw(model, lr=1e-4, weight_decay=0.1, fused=True).step


@torch.no_grad()
def parts_make_the_whole(size: Size, name: str) -> None:
    """The parts, put together here from what they are, compute what the network computes."""
    network = BUILDERS[name](size)
    tokens = size.draw()[0]
    expert, x = network.model.expert, network.model.embedding(tokens)
    want = expert(x)
    x, *_ = (part(x) for part in network.parts["entry"])
    if name == "diffuser":
        return _same_diffuser(size, expert, x, want)
    mixers = network.parts.get("attention") or network.parts["S6"]
    feeds, norms = network.parts.get("feed-forward"), iter(network.parts["norms"])
    for i, mixer in enumerate(mixers):
        x = x + mixer(next(norms)(x))
        if feeds is not None:
            x = x + feeds[i](next(norms)(x))
    close(f"the {name} put together from its parts", next(norms)(x), want, 1e-5)


def _same_diffuser(size: Size, expert: Any, entered: Tensor, want: Tensor) -> None:
    context, layout, top = expert.denoiser.context_in(entered), _layout(size), expert.denoiser.train_T
    noise = expert.noise[layout.positions].expand_as(context)
    kv = expert.denoiser.clean_stream(context, layout)
    prediction = expert.denoiser(noise, top, context, kv, layout)
    got = expert.readout(expert.to_x0(prediction, noise, top))
    close("the diffuser put together from its streams", got, want, 1e-5)
