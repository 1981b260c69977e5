"""Valid inputs changed at random, and a count of what a reader makes of them.

A reader holds if it takes an input or refuses it in one sentence (`UserError`). Anything else that it raises, a
wait beyond `PATIENCE` and a message of several lines are findings; so is memory that grows with the number of
inputs. Every input is a function of (seed, number), so that a finding can be made again alone.
"""

from __future__ import annotations

import copy
import gc
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nano_think.errors import UserError

# Seconds after which an input counts as one that hangs; a slow machine takes a hundredth of that.
PATIENCE = 60
FINDINGS_KEPT = 20

HOSTILE_TEXT = (
    "", " ", "\x00", "\x07", "\x1b[2J", "\x7f", "\x85", "\u2028", "\ufeff", "\ufffe", "\ud800", "\udfff",
    "\ud83d\ude00", "e\u0301" * 40, "\u0301" * 300, "Z\u0351\u036b\u0343a\u0321\u034el\u034bg\u0337o\u0362",
    "\u202e\u05d0\u0627\u202c", "\ue000\U0010ffff", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u0130\u0131\ufb01\u1e9e", "<|eos|>", "<|endoftext|>", "a" * 5000, " " * 5000, "\n" * 500,
    "${seed}", "${x", "\\", "'", '"', "../..", "%s%n", "\r\n",
)  # fmt: skip
HOSTILE_BYTES = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf8\x88", b"\r", b"\n", b'"', b"\\",
    b"\\ud800", b"\\u0000", b"{", b"}", b"[", b"]", b":", b",", b"NaN", b"-Infinity", b"1e999", b"-0",
    b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"null", b"true", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd",
)  # fmt: skip
HOSTILE_VALUES = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, 5e-324, float("nan"),
    float("inf"), "", "0", "null", "\ud800", [], {}, [[]], [None], {"": 0}, {"_target_": "os.system"}, "a" * 3000,
)  # fmt: skip


class Case(NamedTuple):
    """One input. mutated: made of a valid one by changes, not of nothing."""

    data: Any
    mutated: bool


@dataclass
class Tally:
    """What became of the inputs of one format.

    reached: inputs that were read and judged by what they mean. growth_mb: of the process's largest memory, from
    the first fifth of the inputs to the last. slowest: CPU seconds of one input.
    """

    name: str
    tried: int = 0
    mutated: int = 0
    reached: int = 0
    taken: int = 0
    refused: int = 0
    slowest: float = 0.0
    growth_mb: float = 0.0
    findings: list[str] = field(default_factory=list)

    def line(self) -> str:
        """A row of the table in docs/reliability.md."""
        shares = (f"{part / self.tried:.0%}" for part in (self.mutated, self.reached))
        ends = f"{self.taken:,} | {self.refused:,} | {len(self.findings)}"
        return (
            f"| {self.name} | {self.tried:,} | {' | '.join(shares)} | {ends} "
            f"| {self.slowest:.2g} | {self.growth_mb:.1f} |"
        )


def campaign(
    name: str,
    draw: Callable[[random.Random], Case],
    judge: Callable[[Any, Callable[[], None]], None],
    count: int,
    seed: int = 0,
) -> Tally:
    """Give `count` inputs of `draw` to `judge(data, reached)`, which calls `reached` once one makes sense."""
    tally = Tally(name)
    gc.freeze()  # what was there before need not be looked through again and again
    for number in range(count):
        if number == count // 5:
            gc.collect()
            first = _peak_mb()
        case = draw(random.Random(f"{seed}:{number}"))
        tally.tried += 1
        tally.mutated += case.mutated
        _one(tally, number, case, judge)
    tally.growth_mb = _peak_mb() - first
    gc.unfreeze()
    return tally


def _one(tally: Tally, number: int, case: Case, judge: Callable[[Any, Callable[[], None]], None]) -> None:
    came: list[bool] = []
    started = time.process_time()
    try:
        with patience(PATIENCE):
            judge(case.data, lambda: came.append(True))
        tally.taken += 1
    except UserError as error:
        tally.refused += 1
        if not str(error).strip() or len(str(error).splitlines()) > 1:
            _find(tally, number, case, f"not one sentence: {str(error)!r}")
    except (Exception, SystemExit) as error:
        place = "".join(traceback.format_tb(error.__traceback__)[-2:])
        _find(tally, number, case, f"{type(error).__name__}: {error}\n{place}")
    tally.slowest = max(tally.slowest, time.process_time() - started)
    tally.reached += bool(came)


def _find(tally: Tally, number: int, case: Case, what: str) -> None:
    if len(tally.findings) < FINDINGS_KEPT:
        tally.findings.append(f"{tally.name} input {number}, {repr(case.data)[:400]}: {what[:1500]}")


@contextmanager
def patience(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block once it has taken so many seconds."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four edits: bits, spans cut out, doubled or moved, hostile bytes put in, the end cut off."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        start, stop = sorted(rng.randint(0, len(data)) for _ in range(2))
        stop = min(stop, start + rng.choice((1, 2, 8, 64, 1024)))
        head, span, tail = data[:start], data[start:stop], data[stop:]
        match rng.randrange(7):
            case 0:
                span = bytes(byte ^ (1 << rng.randrange(8)) for byte in span)
            case 1:
                span = b""
            case 2:
                span = span * rng.choice((2, 3, 50))
            case 3:
                span += rng.choice(HOSTILE_BYTES)
            case 4:
                span = rng.choice(HOSTILE_BYTES)
            case 5:
                head, tail = tail, head
            case _:
                tail = b""
        data = head + span + tail
    return data


def change_text(text: str, rng: random.Random) -> str:
    """One to four edits of a text, as `change_bytes`."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        start, stop = sorted(rng.randint(0, len(text)) for _ in range(2))
        doubled = text[start : min(stop, start + 64)] * rng.choice((2, 20))
        middle = rng.choice((rng.choice(HOSTILE_TEXT), "", doubled, chr(rng.randrange(0x110000))))
        text = text[:start] + middle + text[stop if rng.random() < 0.5 else start :]
    return text


def change_json(value: Any, rng: random.Random) -> Any:
    """A copy of a plain value with one or two of its nodes replaced, renamed, removed, doubled or nested."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        holders = [node for node in _nodes(value) if isinstance(node, dict | list) and node]
        if not holders:
            return rng.choice(HOSTILE_VALUES)
        holder = rng.choice(holders)
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        match rng.randrange(6):
            case 0 if isinstance(holder, dict):
                holder[rng.choice((key + "x", key.upper(), "", "\x00", *HOSTILE_TEXT[-8:]))] = holder.pop(key)
            case 1:
                del holder[key]
            case 2:
                holder[key] = [holder[key]]
            case 3:
                holder[key] = copy.deepcopy(rng.choice(list(_nodes(value))))
            case 4 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
                holder[key] = rng.choice(
                    (-holder[key], holder[key] + 1, holder[key] * 1000, str(holder[key]))
                )
            case _:
                holder[key] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
    return value


def _nodes(value: Any) -> Iterator[Any]:
    yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from _nodes(child)
