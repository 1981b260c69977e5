"""`audit(model, vocab_size)`: all checks on one model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from nano_think.evals.audit.compare import rounding
from nano_think.evals.audit.finding import Audit, Finding
from nano_think.evals.audit.future import embedding_of, jacobian, perturb_future, prefix
from nano_think.evals.audit.hygiene import lengths, purity
from nano_think.evals.audit.live import filled_memory, live_copy, strengthened
from nano_think.evals.audit.plan import Plan
from nano_think.evals.audit.repeat import batch, cached, packing
from nano_think.evals.audit.store import store_leak
from nano_think.evals.audit.subject import Subject
from nano_think.evals.audit.trained import Twin, incompressible
from nano_think.retrieval import Retriever

CHECKS = ("A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8", "A9", "A10")
# Those that train nothing.
UNTRAINED = tuple(check for check in CHECKS if check not in ("A7", "A8"))

# How a model says that it will not read something.
REFUSALS = (ValueError, RuntimeError, IndexError)


def audit(
    model: Callable[..., Any],
    vocab_size: int | None = None,
    *,
    name: str = "",
    plan: Plan | None = None,
    retriever: Retriever | None = None,
    twin: Twin | None = None,
    checks: Sequence[str] = CHECKS,
    on_finding: Callable[[Finding], None] | None = None,
) -> Audit:
    """Whether a language model keeps the future to itself, and what of it does not.

    model: any callable from tokens (B, L) int64 to logits (B, L, V), or to an object with `logits`; see
        `subject.Subject` for what else is used where it is there. It is copied, never changed.
    vocab_size: tokens to draw from; not needed where the model has an attribute of that name.
    plan: lengths and the least tolerance, see `compare.rounding`.
    retriever: the memory to read; by default a filled one, where the model has a `memory` argument and parameters
        to read slots with.
    twin: makes a tiny untrained network of the same kind from a vocabulary size; A7 trains it.
    on_finding: called with each finding as it is made.
    Raises ValueError for an unknown check, and without any vocabulary size.
    """
    vocab_size = vocab_size or getattr(model, "vocab_size", None)
    if vocab_size is None:
        raise ValueError("say how many tokens the model knows: audit(model, vocab_size=...)")
    if unknown := set(checks) - set(CHECKS):
        raise ValueError(f"unknown checks {sorted(unknown)}: choose from {', '.join(CHECKS)}")
    plan = plan or Plan(vocab_size)
    copied, replaced = live_copy(model) if isinstance(model, nn.Module) else (model, ())
    if isinstance(copied, nn.Module):
        strengthened(copied)
    # reading must not write, but whether it does is one of the questions
    subject = Subject(copied, vocab_size, copy.deepcopy(retriever))
    if retriever is None:
        subject = subject.with_retriever(_own_memory(subject, plan))
    with contextlib.suppress(*REFUSALS):  # which every check will report
        plan = replace(plan, tolerance=rounding(subject, plan))
    made: dict[str, Callable[[], Finding]] = {
        "A1": lambda: perturb_future(subject, plan),
        "A2": lambda: jacobian(subject, plan),
        "A3": lambda: prefix(subject, plan),
        "A4": lambda: cached(subject, plan),
        "A5": lambda: batch(subject, plan),
        "A6": lambda: packing(subject, plan),
        "A7": lambda: incompressible(twin),
        "A8": lambda: store_leak(_table(subject), plan.seed),
        "A9": lambda: lengths(subject, plan),
        "A10": lambda: purity(subject, plan),
    }
    findings = []
    for check in checks:
        findings.append(_made(check, made[check]))
        if on_finding is not None:
            on_finding(findings[-1])
    setting = {"rows": plan.rows, "length": plan.length, "border": plan.border, "tolerance": plan.tolerance}
    return Audit(name or type(model).__name__, tuple(findings), replaced, setting)


def _made(check: str, make: Callable[[], Finding]) -> Finding:
    """A finding, also where the model refuses what every language model must be able to read."""
    try:
        return make()
    except REFUSALS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Finding(check, "the model reads what it is given", "fail", component="model", note=reason)


def _table(subject: Subject) -> Tensor | None:
    """The embedding that the queries of a subject with memory are made of."""
    table = None if subject.retriever is None else embedding_of(subject)
    return None if table is None else table.weight


def _own_memory(subject: Subject, plan: Plan) -> Retriever | None:
    """A filled memory for a model that can read one."""
    attention = getattr(getattr(subject.model, "mla", None), "attention", None)
    table = embedding_of(subject)
    if getattr(attention, "slots", None) is None or table is None:
        return None
    return filled_memory(table.weight, plan.border)
