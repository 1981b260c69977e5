from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nano_think.cache import AppendState, Cache, RingState

BATCH, WINDOW, MAX_LEN, MAX_ROLLBACK = 3, 2, 12, 4


class Tracker:
    """A cache whose content is known: appended tokens, their running sum, and a window of the last two."""

    def __init__(self) -> None:
        self.append = AppendState.empty(MAX_LEN, torch.zeros(1, dtype=torch.float64), token=(BATCH, 1))
        self.ring = RingState(
            MAX_ROLLBACK,
            total=torch.zeros(BATCH, dtype=torch.float64),
            window=torch.zeros(BATCH, WINDOW, dtype=torch.float64),
        )
        self.cache = Cache(append=self.append, inner=Cache.stack([self.ring]))

    def read(self, tokens: Tensor) -> None:
        """tokens (B, n)."""
        self.append.append(token=tokens.unsqueeze(-1))
        for piece in self.ring.pieces(tokens.shape[1]):
            new = tokens[:, piece]
            window = torch.cat((self.ring["window"], new), dim=1)[:, -WINDOW:]
            self.ring.advance(new.shape[1], total=self.ring["total"] + new.sum(dim=1), window=window)

    def check(self, rows: list[list[float]]) -> None:
        tokens = torch.tensor(rows, dtype=torch.float64).reshape(BATCH, -1)
        length = tokens.shape[1]
        assert self.cache.length == self.append.length == self.ring.length == length
        assert torch.equal(self.append.buffers["token"][:, :length, 0], tokens)
        assert torch.equal(self.ring["total"], tokens.sum(dim=1))
        padded = torch.cat((torch.zeros(BATCH, WINDOW, dtype=torch.float64), tokens), dim=1)
        assert torch.equal(self.ring["window"], padded[:, -WINDOW:])


operations = st.one_of(
    st.tuples(st.just("read"), st.integers(1, 6)),
    st.tuples(st.just("rollback"), st.integers(0, MAX_ROLLBACK)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH)),
)


@given(program=st.lists(operations, max_size=14))
def test_random_programs_equal_plain_lists(program) -> None:
    tracker = Tracker()
    rows: list[list[float]] = [[] for _ in range(BATCH)]
    reach, counter = 0, 0
    for name, value in program:
        if name == "read" and len(rows[0]) + value <= MAX_LEN:
            new = [[float(counter + 10 * row + i) for i in range(value)] for row in range(BATCH)]
            counter += 100
            tracker.read(torch.tensor(new, dtype=torch.float64))
            rows = [row + more for row, more in zip(rows, new, strict=True)]
            reach = min(MAX_ROLLBACK, reach + value)
        elif name == "rollback" and value <= reach:
            tracker.cache.rollback(value)
            rows = [row[: len(row) - value] for row in rows]
            reach -= value
        elif name == "reorder":
            tracker.cache.reorder(torch.tensor(value))
            rows = [list(rows[i]) for i in value]
        tracker.check(rows)


def test_append_returns_everything_so_far_in_the_order_given() -> None:
    state = AppendState.empty(5, torch.zeros(1), key=(2, 3, 4), value=(2, 3, 6))
    first = {"value": torch.rand(2, 3, 2, 6), "key": torch.rand(2, 3, 2, 4)}
    second = {"value": torch.rand(2, 3, 1, 6), "key": torch.rand(2, 3, 1, 4)}
    state.append(**first)
    value, key = state.append(**second)
    assert torch.equal(value, torch.cat((first["value"], second["value"]), dim=-2))
    assert torch.equal(key, torch.cat((first["key"], second["key"]), dim=-2))


def test_overflow_names_both_numbers_and_changes_nothing() -> None:
    state = AppendState.empty(4, torch.zeros(1), x=(1, 2))
    state.append(x=torch.ones(1, 3, 2))
    with pytest.raises(ValueError, match="holds 4 positions, 5 were needed"):
        state.append(x=torch.zeros(1, 2, 2))
    assert state.length == 3
    (content,) = state.append(x=torch.ones(1, 1, 2))
    assert torch.equal(content, torch.ones(1, 4, 2))


def test_forgetting_more_than_was_read_is_refused() -> None:
    state = AppendState.empty(4, torch.zeros(1), x=(1, 2))
    state.append(x=torch.ones(1, 3, 2))
    with pytest.raises(ValueError, match="cannot forget 4 of 3"):
        state.rollback(4)
    assert state.length == 3


def test_ring_refuses_what_was_not_asked_for_and_stays_as_it_was() -> None:
    state = RingState(2, x=torch.zeros(1))
    for i in range(1, 6):
        state.advance(1, x=torch.full((1,), float(i)))
    with pytest.raises(ValueError, match="no snapshot 3 positions back"):
        state.rollback(3)
    assert state.length == 5
    state.rollback(2)
    assert (state.length, state["x"].item()) == (3, 3.0)
    with pytest.raises(ValueError, match="max_rollback"):
        state.rollback(1)


def test_ring_without_rollback_keeps_no_snapshot() -> None:
    state = RingState(x=torch.zeros(1))
    assert list(state.pieces(5)) == [slice(0, 5)]
    state.advance(5, x=torch.ones(1))
    state.rollback(0)
    assert state.length == 5
    assert not state.snapshots


@pytest.mark.parametrize(("n", "max_rollback"), [(1, 3), (3, 3), (7, 3), (4, 0)])
def test_pieces_cover_the_positions_and_end_in_single_steps(n, max_rollback) -> None:
    pieces = list(RingState(max_rollback).pieces(n))
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(n))
    singles = min(n, max_rollback)
    assert all(piece.stop - piece.start == 1 for piece in pieces[len(pieces) - singles :])
    assert len(pieces) == singles + (n > singles)


def test_a_snapshot_is_safe_from_later_values() -> None:
    """`advance` replaces tensors, so a snapshot costs no copy and cannot change afterwards."""
    state = RingState(1, x=torch.zeros(2), y=torch.ones(2))
    state.advance(1, x=state["x"] + 5)
    assert torch.equal(state["y"], torch.ones(2))
    state.rollback(1)
    assert torch.equal(state["x"], torch.zeros(2))


def test_bytes_follow_the_positions_read() -> None:
    state = AppendState.empty(100, torch.zeros(1, dtype=torch.bfloat16), key=(2, 3, 8), value=(2, 3, 4))
    assert state.num_bytes == 0
    state.append(
        key=torch.zeros(2, 3, 7, 8, dtype=torch.bfloat16), value=torch.zeros(2, 3, 7, 4, dtype=torch.bfloat16)
    )
    assert state.num_bytes == 2 * 3 * 7 * (8 + 4) * 2
    ring = RingState(5, x=torch.zeros(2, 9), y=torch.zeros(2, dtype=torch.int64))
    ring.advance(1, x=torch.zeros(2, 9))
    assert ring.num_bytes == 2 * 9 * 4 + 2 * 8
    assert Cache(a=state, b=Cache.stack([ring, ring])).num_bytes == state.num_bytes + 2 * ring.num_bytes


def test_states_that_disagree_are_a_bug() -> None:
    one, two = RingState(x=torch.zeros(1)), RingState(x=torch.zeros(1))
    cache = Cache.stack([one, two])
    assert cache["1"] is cache[1] is two
    one.advance(1)
    with pytest.raises(RuntimeError, match=r"\[0, 1\]"):
        _ = cache.length
    assert Cache().length == 0


def test_a_refused_rollback_changes_no_part() -> None:
    like = torch.zeros(1)
    kept = AppendState.empty(9, like, a=(1, 2))
    ring = RingState(max_rollback=1, b=torch.zeros(1, 2))
    for t in range(3):
        kept.append(a=torch.full((1, 1, 2), float(t)))
        ring.advance(1, b=torch.full((1, 2), float(t)))
    cache = Cache(kept=kept, ring=ring)
    for n in (2, 4, -1):
        with pytest.raises(ValueError, match=r"snapshot|forget"):
            cache.rollback(n)
        assert cache.length == 3
    cache.rollback(1)
    assert (kept.length, ring.length) == (2, 2)
