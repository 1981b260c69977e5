"""Planted faults, each of which a certain check must catch, with the component named in which it lies.

A fault patches the code of a healthy model at run time; the audit knows nothing of any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_think.cache import AppendState, RingState
from nano_think.evals.audit.finding import Finding
from nano_think.evals.audit.plan import Plan
from nano_think.evals.audit.run import audit
from nano_think.evals.audit.trained import Training, incompressible
from nano_think.experts.denoiser_block import TwoStreamDenoiser
from nano_think.experts.diffuser import DiffuserExpert
from nano_think.mla import ExpertRouter
from nano_think.model import ExpertLM, NanoThink
from nano_think.nn import pools
from nano_think.nn.mixers import attention as self_attention
from nano_think.nn.mixers import latent_attention, s6, ssd
from nano_think.nn.mixers.latent_attention import LatentAttention
from nano_think.nn.mixers.s6 import S6
from nano_think.ops import attention as attention_ops
from nano_think.ops.attention import attention
from nano_think.ops.causal_sum import causal_sum
from nano_think.ops.conv import causal_conv
from nano_think.ops.layout import Layout
from nano_think.ops.selective_scan import selective_scan
from nano_think.ops.ssd import ssd_scan
from nano_think.retrieval import Granularity, MemorySlots, RetrievalState, Retriever
from nano_think.vector_records import Reader
from nano_think.vector_store import VectorStore

Fault = Callable[[], AbstractContextManager[None]]


@contextmanager
def patched(target: Any, **changes: Any) -> Iterator[None]:
    """Attributes of a module or class replaced for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setattr(target, name, value)
        yield


# Later tokens in sight


def both_sided_convolution() -> AbstractContextManager[None]:
    def conv(x: Tensor, weight: Tensor, bias: Tensor, *_: Any, silu: bool) -> Tensor:
        both_sides = F.pad(x.transpose(1, 2), (1, weight.shape[1] - 2))
        out = F.conv1d(both_sides, weight.unsqueeze(1), bias, groups=len(weight)).transpose(1, 2)
        return F.silu(out) if silu else out

    return patched(s6, causal_conv=conv)


def attend_one_too_far(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, causal: bool = False, first: Any = None
) -> Tensor:
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2] + 1)
    if first is not None:
        mask = one_too_far(first)
    return attention(q, k, v, mask)


def one_too_far(first: Tensor) -> Tensor:
    order = torch.arange(first.shape[1])
    return ((order >= first.unsqueeze(2)) & (order <= order.unsqueeze(1) + 1)).unsqueeze(1)


def off_by_one_attention() -> AbstractContextManager[None]:
    return patched(self_attention, attention=attend_one_too_far)


def off_by_one_shared_attention() -> AbstractContextManager[None]:
    return patched(latent_attention, attention=attend_one_too_far)


def off_by_one_document_mask() -> AbstractContextManager[None]:
    return patched(attention_ops, document_mask=one_too_far)


def off_by_one_layout_sight() -> AbstractContextManager[None]:
    def sight(layout: Layout) -> tuple[Tensor, None]:
        length = layout.segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril(1)
        same = layout.segments.unsqueeze(2) == layout.segments.unsqueeze(1)
        visible = causal & same & ~layout.pads.unsqueeze(1)
        return (visible | torch.eye(length, dtype=torch.bool)).unsqueeze(1), None

    return patched(Layout, sight=property(sight))


def noisy_stream_sees_later_keys() -> AbstractContextManager[None]:
    original = TwoStreamDenoiser.forward

    def forward(
        self: Any, x: Tensor, tau: Any, context: Tensor, clean: Any, layout: Layout, *rest: Any
    ) -> Tensor:
        everything = torch.ones(1, 1, x.shape[1], clean[0][0].shape[2], dtype=torch.bool)
        with patched(Layout, sight=property(lambda _: (everything, None))):
            return original(self, x, tau, context, clean, layout, *rest)

    return patched(TwoStreamDenoiser, forward=forward)


def query_of_the_chunk_itself() -> AbstractContextManager[None]:
    def named(name: str, chunk: int, prompt_len: int | None = None) -> Granularity:
        return Granularity(chunk, lambda p: p // chunk, lambda g: (g * chunk, (g + 1) * chunk))

    return patched(Granularity, named=named)


# Documents that are not kept apart


def convolution_without_reset(module: Any) -> Fault:
    def conv(
        x: Tensor, weight: Tensor, bias: Any = None, segments: Any = None, window: Any = None, **how: Any
    ) -> Tensor:
        return causal_conv(x, weight, bias, None, window, **how)

    return lambda: patched(module, causal_conv=conv)


def scan_without_reset() -> AbstractContextManager[None]:
    def scan(*inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, _, state, backend = inputs
        return selective_scan(*tensors, None, state, backend)

    return patched(s6, selective_scan=scan)


def scan_without_memory() -> AbstractContextManager[None]:
    """Every piece that is decoded begins with an empty state."""

    def scan(*inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, _, backend = inputs
        return selective_scan(*tensors, None, backend)

    return patched(s6, selective_scan=scan)


def ssd_scan_without_reset() -> AbstractContextManager[None]:
    def scan(*inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, _, state = inputs
        return ssd_scan(*tensors, None, state)

    return patched(ssd, ssd_scan=scan)


def ssd_scan_without_memory() -> AbstractContextManager[None]:
    return patched(ssd, ssd_scan=lambda *inputs: ssd_scan(*inputs[:-1], None))


def convolution_without_memory() -> AbstractContextManager[None]:
    def conv(
        x: Tensor, weight: Tensor, bias: Any = None, segments: Any = None, window: Any = None, **how: Any
    ) -> Tensor:
        return causal_conv(x, weight, bias, segments, None, **how)

    return patched(s6, causal_conv=conv)


def pads_in_sight() -> AbstractContextManager[None]:
    def mask(layout: Layout) -> Tensor:
        length = layout.segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same = layout.segments.unsqueeze(2) == layout.segments.unsqueeze(1)
        return (causal & (same | layout.pads.unsqueeze(1))).unsqueeze(1)

    def first(layout: Layout) -> Tensor:
        seen = mask(layout).squeeze(1)
        return seen.to(torch.uint8).argmax(dim=-1)

    return patched(Layout, mask=property(mask), first=property(first))


def attention_without_reset() -> AbstractContextManager[None]:
    def mask(layout: Layout) -> Tensor:
        length = layout.segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        return ((causal & ~layout.pads.unsqueeze(1)) | torch.eye(length, dtype=torch.bool)).unsqueeze(1)

    def first(layout: Layout) -> Tensor:
        return torch.zeros_like(layout.segments)

    return patched(Layout, mask=property(mask), first=property(first))


def router_without_reset() -> AbstractContextManager[None]:
    def total(x: Tensor, positions: Tensor, decay: float = 1.0) -> Tensor:
        return causal_sum(x, torch.arange(x.shape[1]).unsqueeze(0), decay)

    return patched(pools, causal_sum=total)


def mix_of_neighbours() -> AbstractContextManager[None]:
    original = NanoThink.mix

    def mix(self: Any, expert_hidden: Any, weights: Tensor) -> Tensor:
        return original(self, expert_hidden, (weights + weights.roll(-1, dims=1)) / 2)

    return patched(NanoThink, mix=mix)


# Memory that moves what it must not


def rotation_shifted_by_slots() -> AbstractContextManager[None]:
    original = LatentAttention._attend

    def attend(self: Any, x: Tensor, layout: Layout, entries: Any, memory: Any, *rest: Any) -> Tensor:
        slots = 0 if memory is None else memory.valid.shape[-1]
        later = Layout(layout.positions + slots, layout.segments, layout.plain)
        return original(self, x, later, entries, memory, *rest)

    return patched(LatentAttention, _attend=attend)


def slots_lengthen_the_output() -> AbstractContextManager[None]:
    original = NanoThink._output

    def output(self: Any, *arguments: Any) -> Any:
        made = original(self, *arguments)
        return replace(made, logits=F.pad(made.logits, (0, 0, 1, 0)))

    return patched(NanoThink, _output=output)


def own_text_in_sight(column: str) -> Fault:
    original = Reader.own

    def own(self: Reader, count: int) -> dict[str, np.ndarray]:
        return original(self, count) | {column: np.full(count, -1, np.int64)}

    return lambda: patched(Reader, own=own)


def later_generations_in_sight() -> AbstractContextManager[None]:
    original = Reader.readable
    return patched(Reader, readable=lambda self, columns: original(replace(self, generation=None), columns))


def everything_in_sight() -> AbstractContextManager[None]:
    original = VectorStore._visible

    def visible(self: Any, asked: Any, fetch: int, k: int, readable: np.ndarray, own: Any) -> Any:
        return original(self, asked, fetch, k, np.ones_like(readable), own)

    return patched(VectorStore, _visible=visible)


# Caches that do not remember what was read


def append_state_forgets_too_little() -> AbstractContextManager[None]:
    def rollback(self: AppendState, n: int) -> None:
        self.length -= n - 1

    return patched(AppendState, rollback=rollback)


def ring_state_forgets_the_length_alone() -> AbstractContextManager[None]:
    def rollback(self: RingState, n: int) -> None:
        self.length -= n

    return patched(RingState, rollback=rollback)


def ring_state_goes_back_one_too_far() -> AbstractContextManager[None]:
    def rollback(self: RingState, n: int) -> None:
        target = self.length - n
        while self.length != target:
            self.length, values = self.snapshots.pop()
        self.values = self.snapshots.pop()[1] if self.snapshots else values

    return patched(RingState, rollback=rollback)


def no_reorder(state: type) -> Fault:
    return lambda: patched(state, reorder=lambda self, index: None)


def snapshots_not_reordered() -> AbstractContextManager[None]:
    def reorder(self: RingState, index: Tensor) -> None:
        self.values = {name: value.index_select(0, index) for name, value in self.values.items()}

    return patched(RingState, reorder=reorder)


def retrieval_keeps_its_answers() -> AbstractContextManager[None]:
    def rollback(self: RetrievalState, n: int) -> None:
        self.tokens = self.tokens[:, : self.length - n]

    return patched(RetrievalState, rollback=rollback)


# Numbers that depend on more than the text


def bf16_sums() -> AbstractContextManager[None]:
    def total(x: Tensor, positions: Tensor, decay: float = 1.0) -> Tensor:
        return causal_sum(x.bfloat16(), positions, decay).float()

    return patched(pools, causal_sum=total)


def bf16_sum_in_the_cache() -> AbstractContextManager[None]:
    original = pools.RunningMean.extend

    def extend(self: Any, u: Tensor, values: dict[str, Tensor], start: int) -> Any:
        rounded = {name: value.bfloat16().float() for name, value in values.items()}
        return original(self, u, rounded, start)

    return patched(pools.RunningMean, extend=extend)


def dropout_left_on() -> AbstractContextManager[None]:
    return patched(nn.Dropout, forward=lambda self, x: F.dropout(x, self.p, training=True))


def noise_of_the_global_generator() -> AbstractContextManager[None]:
    def start(self: Any, context: Tensor, *rest: Any) -> Tensor:
        return torch.randn(context.shape)

    return patched(DiffuserExpert, _start=start)


def statistics_of_the_batch() -> AbstractContextManager[None]:
    def unstandardise(self: Any, x0: Tensor) -> Tensor:
        return (x0 - x0.mean(0)) * self.target_std + self.target_mean

    return patched(DiffuserExpert, unstandardise=unstandardise)


def router_normed_over_the_batch() -> AbstractContextManager[None]:
    original = ExpertRouter._weights

    def weights(self: Any, *arguments: Any) -> Tensor:
        logits = original(self, *arguments).log()
        return (logits - logits.mean(0)).softmax(-1)

    return patched(ExpertRouter, _weights=weights)


def writes(module: type, write: Callable[[Any], Any]) -> Fault:
    """Every forward pass of such modules does this before."""
    original = module.forward

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        write(self)
        return original(self, *arguments, **options)

    return lambda: patched(module, forward=forward)


@dataclass(frozen=True)
class Control:
    """A fault in a model, the checks that must catch it and the component they must name.

    blamed: a path, or with a star at its end the beginning of one.
    """

    name: str
    fault: Fault
    model: str
    checks: str
    blamed: str


T, S, SSD, D = "transformer", "state_space", "ssd", "diffuser"
MIXER, MLA, NOISY = "expert.blocks.0.mixer", "mla.attention", "expert.denoiser.blocks.0.mixer"
CONTROLS = [
    Control("both-sided convolution", both_sided_convolution, S, "A1 A2 A3", MIXER),
    Control("off-by-one mask", off_by_one_attention, T, "A1 A2 A3", MIXER),
    Control("off-by-one mask, MLA", off_by_one_shared_attention, "mixture", "A1 A2 A3", MLA),
    Control("off-by-one document mask", off_by_one_document_mask, T, "A1", MIXER),
    Control("off-by-one layout sight, MLA", off_by_one_layout_sight, "mixture", "A1", MLA),
    Control("noisy stream sees later keys", noisy_stream_sees_later_keys, D, "A1 A2 A3", NOISY),
    Control(
        "noisy stream, fused", noisy_stream_sees_later_keys, "fused", "A1", "experts.diffuser.denoiser.*"
    ),
    Control("query of the chunk itself", query_of_the_chunk_itself, "reader", "A1 A3", "retrieval"),
    Control("mix of neighbours", mix_of_neighbours, "mixture", "A1 A2 A3", "model"),
    Control("convolution without reset", convolution_without_reset(s6), S, "A1 A6", MIXER),
    Control("convolution without reset, SSD", convolution_without_reset(ssd), SSD, "A1 A6", MIXER),
    Control(
        "convolution without reset, fused",
        convolution_without_reset(s6),
        "fused",
        "A6",
        "experts.state_space.blocks.0.mixer",
    ),
    Control("scan without reset", scan_without_reset, S, "A1 A6", MIXER),
    Control("scan without reset, SSD", ssd_scan_without_reset, SSD, "A1 A6", MIXER),
    Control("attention without reset", attention_without_reset, T, "A1 A6", MIXER),
    Control("attention without reset, MLA", attention_without_reset, "mixture", "A1 A6", MLA),
    Control("router without reset", router_without_reset, "mixture", "A1 A6", "router"),
    Control("rotation shifted by slots", rotation_shifted_by_slots, "reader", "A9", "mla.attention*"),
    Control("slots lengthen the output", slots_lengthen_the_output, "reader", "A9", "model"),
    Control("own document in sight", own_text_in_sight("doc_uid"), T, "A8", "vector_store"),
    Control("near-duplicate in sight", own_text_in_sight("cluster"), T, "A8", "vector_store"),
    Control("later generations in sight", later_generations_in_sight, T, "A8", "vector_store"),
    Control("everything in sight", everything_in_sight, T, "A8", "vector_store"),
    Control("rollback, AppendState", append_state_forgets_too_little, T, "A4", MIXER),
    Control("rollback, AppendState, MLA", append_state_forgets_too_little, "mixture", "A4", "mla.attention*"),
    Control("rollback, RingState", ring_state_forgets_the_length_alone, S, "A4", MIXER),
    Control("rollback, RingState, router", ring_state_forgets_the_length_alone, "appending", "A4", "router"),
    Control("rollback too far, RingState", ring_state_goes_back_one_too_far, S, "A4", MIXER),
    Control("rollback, retrieval", retrieval_keeps_its_answers, "reader", "A4", "retrieval"),
    Control("no reorder, AppendState", no_reorder(AppendState), T, "A4", MIXER),
    Control("no reorder, RingState", no_reorder(RingState), S, "A4", MIXER),
    Control("no reorder of snapshots", snapshots_not_reordered, S, "A4", MIXER),
    Control("no reorder, retrieval", no_reorder(RetrievalState), "reader", "A4", "retrieval"),
    Control("scan without memory", scan_without_memory, S, "A4", MIXER),
    Control("scan without memory, SSD", ssd_scan_without_memory, SSD, "A4", MIXER),
    Control("convolution without memory", convolution_without_memory, S, "A4", MIXER),
    Control("bf16 sums", bf16_sums, "mixture", "A4", "router"),
    Control("bf16 sum in the cache", bf16_sum_in_the_cache, "mixture", "A4", "router"),
    Control("pads in sight", pads_in_sight, T, "A5", MIXER),
    Control("statistics of the batch", statistics_of_the_batch, D, "A5", "expert"),
    Control("statistics of the batch, fused", statistics_of_the_batch, "fused", "A5", "experts.diffuser"),
    Control("router normed over the batch", router_normed_over_the_batch, "mixture", "A5", "router"),
    Control("dropout left on", dropout_left_on, T, "A10", "expert.blocks.0.dropout"),
    Control("noise of the global generator", noise_of_the_global_generator, D, "A10", "expert"),
    Control("global noise, fused", noise_of_the_global_generator, "fused", "A10", "experts.diffuser"),
    Control("unused noise drawn", writes(S6, lambda self: torch.rand(1)), S, "A10", "model"),
    Control("parameter written", writes(S6, lambda self: self.D.mul_(0.5)), S, "A10", MIXER),
    Control(
        "buffer written", writes(DiffuserExpert, lambda self: self.variance.mul_(0.5)), D, "A10", "expert"
    ),
    Control(
        "table written", writes(DiffuserExpert, lambda self: self.noise[-1].mul_(0.5)), D, "A10", "expert"
    ),
    # options of the product that leak on purpose, for analysis
    Control("router.pool=sequence", nullcontext, "sequence pool", "A1 A2 A3", "router"),
    Control("diffuser.x_T=rng", nullcontext, "rng", "A10", "expert"),
]
# Short, because nothing depends on the length.
PLAN = Plan(vocab_size=61, length=37, border=8)
# What stands in for a model that leaks by an option, when the same check has to pass.
HEALTHY = {"sequence pool": "mixture", "rng": "diffuser"}


@pytest.fixture(scope="module")
def found(lone, mixture) -> Callable[[str, str], Finding]:
    """`found(model, check)`: what a check finds in one of the models below, anew with every call."""
    models: dict[str, Callable[[], ExpertLM | NanoThink]] = {
        **{kind: partial(lone, kind) for kind in (T, S, SSD, D)},
        "rng": partial(lone, D, x_T="rng"),
        "mixture": mixture,
        "appending": partial(mixture, "transformer diffuser"),
        "reader": partial(mixture, "transformer", memory=True),
        "fused": partial(mixture, "transformer diffuser state_space", memory=True),
        "sequence pool": partial(mixture, router=partial(ExpertRouter, pool="sequence")),
    }
    return lambda name, check: audit(models[name](), plan=PLAN, checks=(check,))[check]


@pytest.fixture(scope="module")
def healthy(found) -> Callable[[str, str], Finding]:
    """`healthy(model, check)`: the same without a fault, found out once."""
    return cache(found)


@pytest.mark.parametrize(
    ("control", "check"),
    [
        pytest.param(control, check, id=f"{check} {control.name}")
        for control in CONTROLS
        for check in control.checks.split()
    ],
)
def test_a_planted_fault_is_caught_and_its_component_named(control, check, found, healthy):
    before = healthy(HEALTHY.get(control.model, control.model), check)
    assert before.verdict == "pass", before
    with control.fault():
        finding = found(control.model, check)
    assert finding.verdict == "fail", finding
    assert fnmatch(finding.component or "", control.blamed), finding


@pytest.mark.parametrize(("fault", "kind"), [(off_by_one_attention, T), (noisy_stream_sees_later_keys, D)])
def test_a_twin_that_sees_the_next_token_learns_to_copy_it(fault, kind, lone):
    def twin(vocab_size: int) -> ExpertLM:
        return lone(kind, vocab_size, num_layers=1)

    with fault():
        finding = incompressible(twin, Training(steps=60))
    assert (finding.verdict, finding.component) == ("fail", "expert"), finding


def test_a_retriever_that_forgets_who_reads_shows_them_their_own_text(mixture):
    original, model = Retriever.search, mixture("transformer", memory=True)
    with patched(Retriever, search=lambda self, blocks, reader: original(self, blocks, Reader())):
        finding = audit(model, checks=("A8",))["A8"]
    assert (finding.verdict, finding.component) == ("fail", "retrieval"), finding
    assert finding.violation > 0.5


def test_a_store_that_finds_nothing_cannot_show_a_leak(mixture):
    with patched(Retriever, lay_out=lambda self, found, rows, groups, index: MemorySlots.none(index, 2, 32)):
        finding = audit(mixture("transformer", memory=True), checks=("A8",))["A8"]
    assert finding.verdict in ("vacuous", "fail"), finding
