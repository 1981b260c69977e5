"""A1 to A3: nothing that is said about a token may depend on a later one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nano_think.evals.audit.compare import (
    Comparison,
    answerable,
    blame_part,
    first_position,
    traced,
)
from nano_think.evals.audit.finding import Finding
from nano_think.evals.audit.plan import Plan
from nano_think.evals.audit.subject import (
    COMPONENTS,
    GIVEN,
    CannotDecodeError,
    Said,
    Subject,
    named_tensors,
)
from nano_think.evals.audit.trace import distance, first_difference, unequal
from nano_think.ops.layout import Layout

# A state may forget below the resolution of fp32, so a change must show within this many tokens, not at all.
SOON = 3


@dataclass(frozen=True)
class Path:
    """One way in which a model reads."""

    name: str
    observe: Callable[[Tensor], Said]
    layout: Layout | None = None

    def may_change(self, tokens: Tensor, t: int) -> Tensor:
        """(B, L) bool: positions from t on, in the document of t where there is a layout.

        A pad says nothing that anyone reads, so it may say anything.
        """
        from_here = (torch.arange(tokens.shape[1]) >= t).expand_as(tokens)
        if self.layout is None:
            return from_here
        own = self.layout.segments == self.layout.segments[:, t : t + 1]
        return (from_here & own) | self.layout.pads

    def blame(self, subject: Subject, plan: Plan, tokens: Tensor, t: int) -> str | None:
        """The innermost module through which the change of token t got where it must not."""
        if subject.module is None:
            return None
        allowed = self.may_change(tokens, t)
        one, other = (
            traced(subject.module, some, partial(self.observe, some))
            for some in (tokens, plan.other(tokens, t))
        )
        return first_difference(one, other, differs=lambda a, b: bool((unequal(a, b) & ~allowed).any()))


def perturb_future(subject: Subject, plan: Plan) -> Finding:
    """A1: change a token; whatever is said about earlier tokens and other documents stays bit for bit.

    Through one plain pass, one packed pass and one pass through the cache, whichever the model has.
    """
    title = "a changed token changes nothing said before it or in other documents"
    tokens, dead, taken = plan.tokens(), set[str](), []
    for path in _paths(subject, plan):
        try:
            before, alive = path.observe(tokens), set[str]()
        except CannotDecodeError:
            continue  # which is a failure of A4
        taken.append(path.name)
        for t in plan.positions():
            after, allowed = path.observe(plan.other(tokens, t)), path.may_change(tokens, t)
            for name in before:
                changed = unequal(before[name], after[name])
                if bool((leaked := changed & ~allowed).any()):
                    size = float(distance(before[name], after[name])[leaked].max())
                    to_blame = answerable(name, partial(path.blame, subject, plan, tokens, t))
                    note = f"{name} ({path.name}) after token {t} was changed"
                    return Finding("A1", title, "fail", size, first_position(leaked), to_blame, note)
                if bool(changed[:, _shows(name, t)].any()):
                    alive.add(name)
        dead |= {f"{name} ({path.name})" for name in before if _must_live(name) and name not in alive}
    if dead:
        return Finding("A1", title, "vacuous", note=f"no token changes {', '.join(sorted(dead))}")
    return Finding("A1", title, "pass", 0.0, note=f"bit for bit; {', '.join(taken)}")


def jacobian(subject: Subject, plan: Plan) -> Finding:
    """A2: no gradient flows from what is said about a token to the embedding of a later one."""
    title = "no gradient reaches the embedding of a later token"
    tokens, worst, alive = plan.tokens(2), Finding("A2", title, "pass", 0.0), False
    # the last position has nothing later
    for at in sorted({min(t, plan.length - 2) for t in plan.positions()}):
        size = _reach(subject, plan, tokens, at)
        if size is None:
            return Finding(
                "A2", title, "not applicable", note="no gradient reaches an embedding of the tokens"
            )
        alive |= bool(size[at] > 0) and bool((size[:at] > 0).any())
        later = float(size[at + 1 :].max())
        if later > (worst.violation or 0.0):
            j = at + 1 + int(size[at + 1 :].argmax())
            path = Path("forward", subject.observe)
            to_blame = answerable("logits", partial(path.blame, subject, plan, tokens, j))
            note = f"d logits[{at}] / d embedding[{j}]"
            worst = Finding("A2", title, "fail", later, at, to_blame, note)
    if worst.verdict == "pass" and not alive:
        return Finding("A2", title, "vacuous", note="no gradient reaches the embeddings of earlier tokens")
    return worst


def prefix(subject: Subject, plan: Plan) -> Finding:
    """A3: the first n tokens alone give what they give at the head of a longer text."""
    compare = Comparison("A3", "a prefix alone gives what it gives inside the whole", plan)
    tokens = plan.tokens(3)
    whole = subject.observe(tokens)
    for n in plan.positions():
        own = (slice(None), slice(n))
        head = {name: value[own] for name, value in whole.items()}
        blame = partial(blame_part, subject, plan, tokens[own], tokens, None, own)
        compare(head, subject.observe(tokens[own]), f"prefix of {n}", blame)
    return compare.finding(f"{len(plan.positions())} prefixes")


def embedding_of(subject: Subject) -> Any:
    """The first table of the whole vocabulary, None where there is none."""
    if subject.module is None:
        return None
    return next((t for t in _tables(subject.module) if t.num_embeddings >= subject.vocab_size), None)


def _tables(module: nn.Module) -> list[Any]:
    """Tables, also of a class of their own: one that keeps its rows in another form is no nn.Embedding."""
    return [part for part in module.modules() if isinstance(getattr(part, "num_embeddings", None), int)]


def _paths(subject: Subject, plan: Plan) -> list[Path]:
    paths = [Path("forward", subject.observe)]
    if subject.can_pack:
        layout = plan.packed()
        paths.append(Path("packed", partial(subject.observe, layout=layout), layout))
    if subject.can_decode:
        paths.append(Path("cache", partial(subject.decode, pieces=[plan.length])))
    return paths


def _shows(name: str, t: int) -> slice:
    """Where a change of token t has to show.

    In logits and in what experts say it must reach later tokens: the way from token to token is the one to test.
    """
    later = name.partition(".")[0] in ("logits", "expert_hidden")
    return slice(t + later, t + later + SOON)


def _must_live(name: str) -> bool:
    """Whether every token has to change what is said under this name.

    Records nearby may be the same for two tokens, so ids may show nothing; slots are brought to life by A9. What
    a model of unknown kind says besides its logits may be a constant.
    """
    return name != GIVEN and name.partition(".")[0] in COMPONENTS


def _reach(subject: Subject, plan: Plan, tokens: Tensor, i: int) -> Tensor | None:
    """(L,): largest gradient of a random projection of the logits at i, for the embedding of every token.

    None where nothing is differentiable. Tables are recognised by what they look up, private ones included.
    """
    if subject.module is None:
        return None
    leaves: list[Tensor] = []

    def cut(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not inputs or not torch.equal(inputs[0].cpu(), tokens):
            return output
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1]

    handles = [part.register_forward_hook(cut) for part in _tables(subject.module)]
    try:
        with torch.enable_grad():
            logits = named_tensors(subject.read(tokens)[0])["logits"]
            if not leaves or not logits.requires_grad:
                return None
            direction = torch.randn(logits.shape[-1], generator=plan.generator(4, i)).to(logits)
            found = torch.autograd.grad((logits[:, i] @ direction).sum(), leaves, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    sizes = [gradient.abs().amax(dim=(0, 2)).cpu() for gradient in found if gradient is not None]
    # a gradient that is no number hides what it should show
    return torch.stack(sizes).nan_to_num(nan=torch.inf).amax(0) if sizes else None
