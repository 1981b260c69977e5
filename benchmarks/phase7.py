"""Phase 7: a 7c step beside its parts, 7b from kept expert outputs, the diffuser by steps and gradient mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Group, Measured, Options, close
from benchmarks.peers.fused_models import (
    CACHED_TOKENS,
    QUICK,
    Given,
    Size,
    batch,
    diffuser,
    fused,
    layout,
    plain,
    route,
    stir,
)
from nano_think.experts.diffuser import GradMode
from nano_think.model import Fusion, NanoThink
from nano_think.ops.cross_entropy import linear_cross_entropy
from nano_think.tasks.route import RouteTask

PRECISIONS = ("fp32", "bf16")
PARTS = ("transformer", "diffuser", "state_space", "MLA and head")
# forward of the experts and the head: the widest tolerance is that of sums in another order
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
GRADS: tuple[GradMode, ...] = ("none", "last", "all")
STEPS, MODE_STEPS = (1, 4, 10), 4
NOTES = (
    "Packed rows of about three documents. Experts are frozen: forward and the gradient of their input.",
    "Parts of a step are measured apart. MLA and head: embedding, MLA, router, mixing of given expert outputs, "
    "loss and all their gradients.",
    "7b kept: what the task does with batches whose rows were met before, optimizer step included; 100,000 tokens "
    "where probabilities are mixed, else one batch, beside the tied head alone on as many mixed vectors.",
    "Cosine of the gradient that reaches the diffuser's input with the one of grad=all: of random weights.",
)


def group(options: Options) -> Group:
    """The three questions in both precisions; 16 rows where memory is measured."""
    size = QUICK if options.quick else Size(rows=16) if options.large else Size()
    cases, derived = [], {}
    for precision in PRECISIONS:
        names = [f"{part} {precision}" for part in PARTS]
        check = partial(step_is_plain, replace(QUICK, rows=1), precision)
        cases.append(_case(f"7c step {precision}", step, size, precision, check))
        works = [*(partial(expert_alone, name=name) for name in PARTS[:3]), mla_and_head]
        cases += [_case(name, work, size, precision) for name, work in zip(names, works, strict=True)]
        derived[f"7c step over its parts {precision}"] = partial(over_sum, f"7c step {precision}", names)
    cases += _routing(size, options.quick) + _diffuser(size)
    derived |= {
        "7b prob: CPU seconds an epoch of 100,000 kept tokens": partial(epoch, size),
        "7b hidden over its head products": partial(over_sum, "7b kept hidden", ["head of 7b"]),
        "7b computed every time over kept, hidden": partial(
            over_sum, "7b uncached hidden", ["7b kept hidden"]
        ),
    }
    for mode in GRADS:
        derived[f"diffuser, 4 steps, grad={mode}: MB kept for the backward pass"] = partial(
            kept_mb, size, mode
        )
        derived[f"diffuser, 4 steps, grad={mode}: cosine of its gradient with all"] = partial(agreement, mode)
    title = (
        f"phase 7 at seed size, {size.rows} x {size.length} tokens" if not options.quick else "phase 7, tiny"
    )
    return Group(title, cases, notes=NOTES, derived=derived)


def over_sum(case: str, parts: list[str], measured: Measured) -> float:
    """Time of a case over the sum of others, median of the rounds."""
    return measured.over_rounds(lambda seconds: seconds[case] / sum(seconds[part] for part in parts))


def epoch(size: Size, measured: Measured) -> float:
    """CPU seconds for 100,000 tokens."""
    return measured.over_rounds(lambda s: s["7b kept prob"] * CACHED_TOKENS / size.cached_tokens)


def _case(
    name: str, work: Callable[..., Any], size: Size, precision: str, check: Callable[[], object] | None = None
) -> Case:
    return Case(name, setup=partial(work, size, precision), tokens=size.tokens, check=check)


def _routing(size: Size, quick: bool) -> list[Case]:
    # the vocabulary has no part in what is left to do with probabilities, so that filling need not take minutes
    kept = replace(size, rows=16 if not quick else 2, vocab=min(size.vocab, 512))
    return [
        Case(
            "7b kept prob",
            partial(kept_epoch, kept, "prob"),
            tokens=kept.cached_tokens,
            check=kept_is_uncached,
        ),
        Case(
            "7b kept hidden",
            partial(kept_epoch, replace(size, cached_tokens=size.tokens), "hidden"),
            size.tokens,
        ),
        Case("head of 7b", partial(head_alone, size), tokens=size.tokens),
        Case("7b uncached hidden", partial(uncached_epoch, size), tokens=size.tokens),
    ]


def _diffuser(size: Size) -> list[Case]:
    cases = [
        Case(f"diffuser, {steps} steps, last", partial(denoise, size, steps, "last"), tokens=size.tokens)
        for steps in STEPS
    ]
    more = [mode for mode in GRADS if mode != "last"]
    return cases + [
        Case(
            f"diffuser, {MODE_STEPS} steps, {mode}",
            partial(denoise, size, MODE_STEPS, mode),
            tokens=size.tokens,
        )
        for mode in more
    ]


@contextmanager
def _in(precision: str) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        yield


def step(size: Size, precision: str) -> Callable[[], object]:
    """Forward, mean loss, all gradients of stage 7c."""
    model, rows = fused(size, "7c"), batch(size)

    def work() -> None:
        with _in(precision):
            nll = model.token_nll(rows["tokens"], rows["labels"], layout(rows))
        (nll.sum() / nll.numel()).backward()
        model.zero_grad(set_to_none=True)

    return work


def expert_alone(size: Size, precision: str, name: str) -> Callable[[], object]:
    """A frozen expert's forward pass and the gradient of its input."""
    expert = fused(size, "7c").experts[name]
    return _forward_backward(expert, size, precision)


def _forward_backward(expert: nn.Module, size: Size, precision: str = "fp32") -> Callable[[], object]:
    x, upstream, rows = *_vectors(size), batch(size)

    def work() -> Tensor | None:
        x.grad = None
        with _in(precision):
            out = expert(x, layout(rows))
        if out.requires_grad:
            out.backward(upstream.to(out.dtype))
        return x.grad

    return work


def _vectors(size: Size) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (size.rows, size.length, size.d_model)
    x, upstream = (torch.randn(shape, generator=generator) for _ in range(2))
    return x.requires_grad_(), upstream / upstream.numel()


def mla_and_head(size: Size, precision: str) -> Callable[[], object]:
    """All of a step but the experts, whose outputs are given and receive their gradients."""
    model, rows = fused(size, "7c"), batch(size)
    given = {
        name: torch.randn(size.rows, size.length, size.d_model, requires_grad=True) for name in model.experts
    }
    _, upstream = _vectors(size)

    def work() -> None:
        with _in(precision):
            e = model.embedding(rows["tokens"])
            context = model.mla(e, layout(rows))
            hidden = model.mix(given, model.router(context, layout(rows)))
            nll = linear_cross_entropy(hidden, model.embedding.weight, rows["labels"])
        torch.autograd.backward([nll.sum() / nll.numel(), context], [torch.ones(()), upstream])
        model.zero_grad(set_to_none=True)
        for tensor in given.values():
            tensor.grad = None

    return work


def _train(task: RouteTask, batches: list[dict[str, Tensor]]) -> Callable[[], object]:
    optimizer = task.make_optimizer(task.network.train())

    def work() -> None:
        for rows in batches:
            loss = task.batch_loss(rows)["loss"] / rows["labels"].numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return work


def kept_epoch(size: Size, fusion: Fusion) -> Callable[[], object]:
    """Stage 7b over `cached_tokens` tokens whose rows were all met before."""
    torch.manual_seed(0)
    experts: dict[str, nn.Module] = {name: Given() for name in PARTS[:3]}
    model = NanoThink(experts, size.vocab, size.d_model, fusion=fusion)
    stir(model)
    task = route(model, size, cached=True)
    batches = [batch(size, seed) for seed in range(-(-size.cached_tokens // size.tokens))]
    batches[-1] = {name: part[: _rest(size)] for name, part in batches[-1].items()}
    return _train(task, batches)


def _rest(size: Size) -> int:
    """Rows of the last batch of an epoch."""
    rows = round(size.cached_tokens / size.length)
    return rows - (-(-rows // size.rows) - 1) * size.rows


def uncached_epoch(size: Size) -> Callable[[], object]:
    """A batch of 7b that computes the experts."""
    return _train(route(fused(size, "7b"), size), [batch(size)])


def head_alone(size: Size) -> Callable[[], object]:
    """The tied head over mixed vectors, forward and backward, as 7b needs it: no gradient of the table."""
    torch.manual_seed(0)
    table, labels = torch.randn(size.vocab, size.d_model) * 0.02, batch(size)["labels"]
    hidden = torch.randn(size.rows, size.length, size.d_model, requires_grad=True)

    def work() -> None:
        hidden.grad = None
        linear_cross_entropy(hidden, table, labels).mean().backward()

    return work


def denoise(size: Size, steps: int, grad: GradMode) -> Callable[[], object]:
    """The frozen diffuser, forward and the gradient of its input."""
    return _forward_backward(diffuser(size, steps, grad), size)


def kept_mb(size: Size, mode: GradMode, measured: Measured) -> float:
    """Megabytes that a forward pass keeps for the backward pass, parameters left out."""
    expert, (x, _), rows = diffuser(size, MODE_STEPS, mode), _vectors(size), batch(size)
    own = {p.untyped_storage().data_ptr() for p in (*expert.parameters(), *expert.buffers())}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = expert(x, layout(rows))
    del out
    return sum(size for address, size in held.items() if address not in own) / 1e6


def agreement(mode: GradMode, measured: Measured) -> float:
    """Cosine between the gradients that reach the input with `mode` and with grad=all; 0 where none does."""
    size = replace(Size(), rows=1, length=256) if "seed" in measured.group.title else QUICK
    one, other = (_forward_backward(diffuser(size, MODE_STEPS, m), size)() for m in (mode, "all"))
    return 0.0 if one is None else float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0))


def step_is_plain(size: Size, precision: str) -> None:
    """Loss and gradients of a step equal those with dense masks, all logits and norms and head by autograd."""
    model, rows = fused(size, "7c"), batch(size)
    results = []
    for way in (_in(precision), plain()):
        with way:
            nll = model.token_nll(rows["tokens"], rows["labels"], layout(rows)).sum()
        nll.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((nll, grads))
        model.zero_grad(set_to_none=True)
    (loss, grads), (want, want_grads) = results
    close("the loss", loss, want, TOLERANCE[precision])
    if grads.keys() != want_grads.keys() or any(name.startswith("experts.") for name in grads):
        raise AssertionError("gradients of other parameters than those of the stage")
    # the router's own gradients are small differences of large terms and are judged beside the gains'
    others = [(name,) for name in want_grads if name not in _ROUTING]
    for names in [_ROUTING, *others]:
        got, plain_grad = (
            torch.cat([found[name].flatten() for name in names]) for found in (grads, want_grads)
        )
        close(f"the gradient of {', '.join(names)}", got, plain_grad, TOLERANCE[precision])


_ROUTING = ("expert_gain", "router.weight", "router.bias")


def kept_is_uncached() -> None:
    """Sums and gradients of 7b from kept outputs equal those of the model, for both ways of mixing, twice."""
    size = replace(QUICK, cached_tokens=QUICK.tokens)
    fusions: tuple[Fusion, ...] = ("hidden", "prob")
    for fusion in fusions:
        model, rows = fused(size, "7b", fusion), batch(size)
        plain, kept = (route(model, size, cached=cached) for cached in (False, True))
        want, want_grads = _sums(plain, rows)
        for _ in range(2):
            got, grads = _sums(kept, rows)
            close("the loss", got, want, 1e-5)
            for name, grad in want_grads.items():
                close(f"the gradient of {name}", grads[name], grad, 1e-4)


def _sums(task: RouteTask, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    task.network.train().zero_grad(set_to_none=True)
    loss = task.batch_loss(rows)["loss"]
    loss.backward()
    grads = {name: p.grad for name, p in task.network.named_parameters() if p.grad is not None}
    return loss, grads
