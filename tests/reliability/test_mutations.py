"""The harness itself: a reader that fails in any of the ways it looks for is found out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from nano_think.errors import UserError
from tests.reliability import mutations
from tests.reliability.mutations import Case, campaign, change_bytes, change_json, change_text


def answer(text: str) -> Callable[[Any, Callable[[], None]], None]:
    def judge(data: Any, reached: Callable[[], None]) -> None:
        raise UserError(text)

    return judge


def wrong(data: Any, reached: Callable[[], None]) -> None:
    reached()
    if data % 2:
        raise KeyError("no such thing")


def slow(data: Any, reached: Callable[[], None]) -> None:
    time.sleep(30)


@pytest.mark.parametrize(
    ("judge", "findings", "said"),
    [
        (lambda data, reached: None, 0, ""),
        (answer("do this instead"), 0, ""),
        (answer("two\nlines"), 4, "not one sentence"),
        (answer(""), 4, "not one sentence"),
        (wrong, 2, "KeyError: 'no such thing'"),
        (slow, 4, "TimeoutError"),
    ],
)
def test_a_reader_that_fails_is_found_out(monkeypatch, judge, findings, said):
    monkeypatch.setattr(mutations.signal, "alarm", lambda s: mutations.signal.setitimer(0, s and 0.02))
    numbers = iter(range(4))
    tally = campaign("a reader", lambda rng: Case(next(numbers), True), judge, 4)
    assert (tally.tried, tally.mutated, len(tally.findings)) == (4, 4, findings)
    assert all(said in found for found in tally.findings)
    assert tally.reached == (4 if judge is wrong else 0)
    assert tally.taken + tally.refused + (0 if said == "not one sentence" else findings) == 4


def test_changes_depend_on_the_seed_alone_and_leave_their_input_as_it_was():
    value = {"text": "abc", "n": {"a": [1, 2.5]}, "none": None}
    kept = json.dumps(value)

    def drawn(seed: int) -> list[Any]:
        seen: list[Any] = []

        def draw(rng):
            seen.append(
                (
                    change_bytes(b"some bytes", rng),
                    change_text("some text", rng),
                    repr(change_json(value, rng)),
                )
            )
            return Case(None, True)

        campaign("changes", draw, lambda data, reached: None, 300, seed)
        return seen

    first = drawn(0)
    assert first == drawn(0) != drawn(1)
    assert json.dumps(value) == kept
    for same, of in zip((b"some bytes", "some text", repr(value)), zip(*first, strict=True), strict=True):
        assert sum(one != same for one in of) > 250
        assert len(set(of)) > 150
