"""A9 and A10: lengths stay what they are, and reading leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nano_think.evals.audit.compare import Comparison, answerable, first_position, further_than, traced
from nano_think.evals.audit.finding import Finding
from nano_think.evals.audit.plan import Plan
from nano_think.evals.audit.subject import Said, Subject, named_tensors
from nano_think.evals.audit.trace import distance, first_difference, unequal
from nano_think.files import hash_bytes
from nano_think.nn.slots import OwnSlotReader, SlotReader
from nano_think.retrieval import MemorySlots, Retriever

SLOT_COUNTS = (0, 1, 4)
# exp(-1e4) is 0 in every precision
NO_ATTENTION = -1e4

Observe = Callable[[], Said]
# Name and shape of a tensor, and a hash of what is in it.
State = dict[str, tuple[torch.Size, str]]


def lengths(subject: Subject, plan: Plan) -> Finding:
    """A9: one answer a token for any number of slots, and slots that get no attention change nothing."""
    title = "memory slots lengthen nothing and move no position"
    for length in (1, 2, plan.length):
        tokens = plan.tokens(12, length=length)
        for k in SLOT_COUNTS if subject.retriever is not None else (None,):
            reader = subject if k is None else subject.with_retriever(_with_k(subject.retriever, k))
            with torch.no_grad():
                shape = named_tensors(reader.read(tokens)[0])["logits"].shape[:2]
            if shape != tokens.shape:
                note = f"logits {tuple(shape)} for tokens {tuple(tokens.shape)}, k = {k}"
                return Finding("A9", title, "fail", float(shape[1] - length), None, "model", note)
    if subject.retriever is None or subject.module is None:
        return Finding("A9", title, "pass", 0.0, note="no memory")
    return _slots(subject, plan, title)


def _slots(subject: Subject, plan: Plan, title: str) -> Finding:
    """Slots matter to those who see them alone; none at all and none with attention are the same."""
    tokens = plan.tokens(13)
    slots = subject.retriever.retrieve(tokens)  # type: ignore[union-attr]
    subject, sees = subject.with_retriever(None), slots.index >= 0
    if not bool(sees.any()):
        return Finding("A9", title, "vacuous", note="no token sees a slot: the store found nothing")

    def given(memory: MemorySlots | None) -> Observe:
        return partial(subject.observe, tokens, memory=memory)

    other = replace(slots, values=slots.values + 1)
    moved = unequal(given(slots)()["logits"], given(other)()["logits"])
    if not bool(moved[sees].any()):
        return Finding("A9", title, "vacuous", component="mla", note="slots do not change the logits")
    empty = MemorySlots.none(slots.index, slots.valid.shape[-1], slots.values.shape[-1])
    everywhere = torch.ones_like(sees)
    for note, one, two, where in (
        ("a token changes with slots that it does not see", slots, other, ~sees),
        ("an empty memory is not the same as none", None, empty, everywhere),
    ):
        failure = _bitwise("A9", title, subject, tokens, (given(one), given(two)), where)
        if failure is not None:
            return replace(failure, note=f"{failure.note}: {note}")
    return _muted(subject, plan, tokens, slots, title)


def _muted(subject: Subject, plan: Plan, tokens: Tensor, slots: MemorySlots, title: str) -> Finding:
    """Slots whose attention is forced to nothing must leave what the model says without memory."""
    model = copy.deepcopy(subject.module)
    assert model is not None
    readers = [part for part in model.modules() if isinstance(part, SlotReader | OwnSlotReader)]
    for reader in readers:
        reader.bias.data.fill_(NO_ATTENTION)
    # a router that pools slots reads them without attention
    if not readers or getattr(getattr(model, "router", None), "pool_includes_memory", False):
        return Finding("A9", title, "pass", 0.0, note="no attention to be forced to nothing")
    muted, compare = subject.with_model(model), Comparison("A9", title, plan)
    none, some = partial(muted.observe, tokens), partial(muted.observe, tokens, memory=slots)

    def blame() -> str | None:
        one, two = (traced(model, tokens, observe) for observe in (none, some))
        return first_difference(one, two, differs=further_than(plan.tolerance))

    expected, found = none(), some()
    compare(expected, {name: found[name] for name in expected}, "slots that get no attention", blame)
    return compare.finding(f"k = {', '.join(map(str, SLOT_COUNTS))}")


def purity(subject: Subject, plan: Plan) -> Finding:
    """A10: reading twice gives the same bits, draws no random number and changes no state."""
    title = "reading is repeatable and changes nothing"
    tokens = plan.tokens(14)

    def seeded(seed: int) -> Said:
        torch.manual_seed(seed)
        return subject.observe(tokens)

    state = _state(subject)
    with torch.random.fork_rng():
        seeded(plan.seed)
        drawn = not torch.equal(torch.get_rng_state(), torch.manual_seed(plan.seed).get_state())
        readings = (partial(seeded, plan.seed), partial(seeded, plan.seed + 1))
        failure = _bitwise("A10", title, subject, tokens, readings, torch.ones_like(tokens, dtype=torch.bool))
    # what was written explains why readings differ, so it comes first
    after = _state(subject, state)
    if written := [name for name in state if state[name] != after.get(name)]:
        to_blame = "vector_store" if "store" in written else written[0].rpartition(".")[0] or "model"
        return Finding("A10", title, "fail", None, None, to_blame, f"reading changed {', '.join(written)}")
    if failure is not None:
        return replace(failure, note=f"{failure.note}: a second reading differs")
    if drawn:
        return Finding("A10", title, "fail", None, None, "model", "the global random generator was used")
    return Finding("A10", title, "pass", 0.0, note="bit for bit; parameters, buffers and store untouched")


def _bitwise(
    check: str, title: str, subject: Subject, tokens: Tensor, both: tuple[Observe, Observe], where: Tensor
) -> Finding | None:
    """A failure if two readings of tokens (B, L) differ at all at the positions `where` (B, L) bool."""
    one, two = (observe() for observe in both)

    def blame() -> str | None:
        if subject.module is None:
            return None
        first, second = (traced(subject.module, tokens, observe) for observe in both)
        return first_difference(first, second, differs=lambda a, b: bool((unequal(a, b) & where).any()))

    for name in one:
        changed = unequal(one[name], two[name]) & where
        if bool(changed.any()):
            size = float(distance(one[name], two[name])[changed].max())
            to_blame = answerable(name, blame)
            return Finding(check, title, "fail", size, first_position(changed), to_blame, name)
    return None


def _with_k(retriever: Retriever | None, k: int) -> Retriever:
    other = copy.copy(retriever)
    assert other is not None
    other.k = k
    return other


def _state(subject: Subject, before: State | None = None) -> State:
    """All that a forward pass could write to.

    before: an earlier state. Of what is no part of a checkpoint only the entries that were there then count: a
    table of positions may grow.
    """
    found: State = {}
    if subject.module is not None:
        saved = subject.module.state_dict()
        for name, value in {**saved, **dict(subject.module.named_buffers())}.items():
            if name not in saved and before and name in before:
                value = value[tuple(slice(n) for n in before[name][0])]
            found[name] = (value.shape, _hash(value))
    if subject.retriever is not None:
        store = subject.retriever.store
        found["store"] = (torch.Size([len(store)]), f"generation {store.generation}")
    return found


def _hash(value: Tensor) -> str:
    value = value.detach().cpu()
    return hash_bytes((value.float() if value.is_floating_point() else value).numpy().tobytes())
