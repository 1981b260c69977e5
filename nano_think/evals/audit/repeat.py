"""A4 to A6: the same text gives the same result, however it is fed.

In pieces through the cache, beside other rows or pads, or packed behind other documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from nano_think.evals.audit.compare import Comparison, blame_part, further_than, traced
from nano_think.evals.audit.finding import Finding
from nano_think.evals.audit.plan import Plan
from nano_think.evals.audit.subject import CannotDecodeError, Decoding, Subject
from nano_think.evals.audit.trace import Trace, first_difference
from nano_think.ops.layout import Layout

# Positions that are taken back, and how many might have been.
ROLLBACKS, MAX_ROLLBACK = (1, 3), 4


@dataclass(frozen=True)
class Program:
    """A way to read through the caches, at the end of which they hold `text` (B, L)."""

    name: str
    text: Tensor
    run: Callable[[Decoding], None]
    max_rollback: int = 0

    def decode(self, subject: Subject, like: Trace | None = None) -> Decoding:
        """A reader that has gone through it."""
        rows, length = self.text.shape
        reader = Decoding(subject, rows, length + self.max_rollback, self.max_rollback, like)
        self.run(reader)
        return reader


def cached(subject: Subject, plan: Plan) -> Finding:
    """A4: reading in any pieces, after rollbacks and reorderings, equals reading at once."""
    title = "decoding through the cache equals one pass over everything"
    if not subject.can_decode:
        return Finding("A4", title, "not applicable", note="the model has no init_state and extend")
    compare = Comparison("A4", title, plan)
    for program in _programs(plan):
        blame = partial(_blame_program, subject, plan, program)
        try:
            compare(subject.observe(program.text), program.decode(subject).said, program.name, blame)
        except CannotDecodeError as error:
            return Finding("A4", title, "fail", component=error.component, note=f"{program.name}: {error}")
        if compare.failure is not None:
            break
    return compare.finding(f"5 ways to split, rollback of {' and '.join(map(str, ROLLBACKS))}, reordering")


def batch(subject: Subject, plan: Plan) -> Finding:
    """A5: a row does not notice the other rows, how many they are, or how wide the padding is."""
    title = "a row does not depend on its neighbours in the batch, nor on padding"
    compare, row, others = Comparison("A5", title, plan), plan.tokens(6, rows=1), plan.tokens(7, rows=2)
    cases: list[tuple[str, int, Tensor, Layout | None]] = [
        (f"beside {n} other row{'s' * (n > 1)}", 0, torch.cat((row, others[:n])), None) for n in (1, 2)
    ]
    if subject.can_pack:
        cases.append(("with 5 pads behind", 0, *_padded(plan, row, 0, 5)))
        cases.append(("with 7 pads in front", 7, *_padded(plan, row, 7, 0)))
    alone = subject.observe(row)
    for note, begin, tokens, layout in cases:
        own = (slice(0, 1), slice(begin, begin + plan.length))
        found = {name: value[own] for name, value in subject.observe(tokens, layout).items()}
        compare(alone, found, note, partial(blame_part, subject, plan, row, tokens, layout, own))
    return compare.finding(", ".join(note for note, *_ in cases))


def packing(subject: Subject, plan: Plan) -> Finding:
    """A6: documents packed into one row give what each gives alone."""
    title = "packed documents give their own results"
    if not subject.can_pack:
        return Finding("A6", title, "not applicable", note="the model takes no layout of documents")
    tokens, layout, compare = plan.tokens(9), plan.packed(), Comparison("A6", title, plan)
    together = subject.observe(tokens, layout)
    documents = list(plan.spans())
    for row, begin, end in documents:
        own = (slice(row, row + 1), slice(begin, end))
        compare(
            subject.observe(tokens[own]),
            {name: value[own] for name, value in together.items()},
            f"document of {end - begin} tokens that begins at {begin}",
            partial(blame_part, subject, plan, tokens[own], tokens, layout, own),
        )
    return compare.finding(f"{len(documents)} documents in {plan.rows} rows")


def _programs(plan: Plan) -> Iterator[Program]:
    """In pieces of all kinds; with wrong tokens taken back; with rows exchanged."""
    tokens = plan.tokens(5)
    yield Program("in one piece", tokens, lambda reader: reader.read(tokens))
    yield Program("token by token", tokens, partial(_read, tokens, [1] * plan.length))
    for i in range(3):
        split = _random_split(plan, i)
        yield Program(f"in {len(split)} pieces", tokens, partial(_read, tokens, split))
    # wrong tokens end one chunk of memory and begin the next, so that they ask for neighbours
    before, inside = max(1, 2 * plan.border - 3), plan.border + 1
    for n in ROLLBACKS:
        run = partial(_rolled_back, tokens, plan.tokens(11, length=n), before)
        yield Program(f"after a rollback of {n}", tokens, run, MAX_ROLLBACK)
    order = torch.arange(len(tokens)).roll(1)
    run = partial(_reordered, tokens, order, None, inside)
    yield Program("after a reordering of rows", tokens[order], run)
    run = partial(_reordered, tokens, order, plan.tokens(11, length=1), inside)
    yield Program("after a reordering of rows and a rollback", tokens[order], run, MAX_ROLLBACK)


def _read(tokens: Tensor, pieces: Sequence[int], reader: Decoding) -> None:
    for piece in tokens.split(list(pieces), dim=1):
        reader.read(piece)


def _rolled_back(tokens: Tensor, wrong: Tensor, at: int, reader: Decoding) -> None:
    """Read two right and some wrong tokens together at `at`, take the wrong ones back and go on."""
    reader.read(tokens[:, :at])
    reader.read(torch.cat((tokens[:, at : at + 2], wrong), dim=1))
    reader.rollback(wrong.shape[1])
    _read(tokens[:, at + 2 :], _fives(tokens.shape[1] - at - 2), reader)


def _reordered(tokens: Tensor, order: Tensor, wrong: Tensor | None, at: int, reader: Decoding) -> None:
    """Exchange rows at `at`, and only then take `wrong` tokens back that were read before."""
    reader.read(tokens[:, :at])
    if wrong is not None:
        reader.read(wrong)
    reader.reorder(order)
    if wrong is not None:
        reader.rollback(wrong.shape[1])
    _read(tokens[order, at:], _fives(tokens.shape[1] - at), reader)


def _fives(length: int) -> list[int]:
    return [5] * (length // 5) + [length % 5] * bool(length % 5)


def _random_split(plan: Plan, salt: int) -> list[int]:
    cuts = torch.randperm(plan.length - 1, generator=plan.generator(10, salt))[: 2 + 2 * salt] + 1
    edges = [0, *sorted(cuts.tolist()), plan.length]
    return [end - begin for begin, end in pairwise(edges)]


def _padded(plan: Plan, row: Tensor, left: int, right: int) -> tuple[Tensor, Layout]:
    """The row (1, L) between pads, above another one that fills the width."""
    length = plan.length + left + right
    positions = torch.zeros(2, length, dtype=torch.int64)
    segments = torch.full_like(positions, -1)
    own = slice(left, left + plan.length)
    positions[0, own], segments[0, own] = torch.arange(plan.length), 0
    positions[1], segments[1] = torch.arange(length), 0
    filled = plan.tokens(8, rows=2, length=length)
    filled[0, own] = row[0]
    return filled, Layout(positions, segments)


def _blame_program(subject: Subject, plan: Plan, program: Program) -> str | None:
    """Where one pass and a pass through the caches part."""
    if subject.module is None:
        return None
    whole = traced(subject.module, program.text, lambda: subject.observe(program.text))
    found = program.decode(subject, like=whole).trace
    return first_difference(whole, found, differs=further_than(plan.tolerance))
