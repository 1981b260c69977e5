from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from nano_think.ops.attention import document_mask
from nano_think.ops.layout import Layout
from nano_think.ops.rope import rope_angles


@st.composite
def packed_rows(draw) -> list[list[int]]:
    """Rows of segment ids: documents 0, 1, 2 .. one after the other, then perhaps pads."""
    length = draw(st.integers(1, 12))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row: list[int] = []
        while len(row) < length:
            row += [max(row, default=-1) + 1] * draw(st.integers(1, 6))
        pads = draw(st.integers(0, length))
        rows.append(row[: length - pads] + [-1] * pads)
    return rows


def layout_of(rows: list[list[int]]) -> Layout:
    positions = [[row[:i].count(segment) for i, segment in enumerate(row)] for row in rows]
    return Layout(torch.tensor(positions), torch.tensor(rows))


@given(rows=packed_rows())
def test_mask_equals_brute_force(rows) -> None:
    mask = layout_of(rows).mask
    length = len(rows[0])
    assert mask.shape == (len(rows), 1, length, length)
    for b, row in enumerate(rows):
        for query in range(length):
            for key in range(length):
                same = row[query] == row[key] != -1 and key <= query
                assert mask[b, 0, query, key].item() == (same or query == key)


@given(rows=packed_rows())
def test_starts_and_pads_equal_brute_force(rows) -> None:
    layout = layout_of(rows)
    assert layout.pads.tolist() == [[segment == -1 for segment in row] for row in rows]
    assert layout.starts.tolist() == [
        [i == 0 or row[i] != row[i - 1] for i in range(len(row))] for row in rows
    ]


@given(rows=packed_rows())
def test_first_says_the_same_as_the_mask_and_never_falls(rows) -> None:
    layout = layout_of(rows)
    assert torch.equal(document_mask(layout.first), layout.mask)
    assert (layout.first.diff(dim=1) >= 0).all()


@given(rows=packed_rows())
def test_no_query_is_without_a_key(rows) -> None:
    assert layout_of(rows).mask.any(dim=-1).all()


def test_span_is_one_document_from_any_position() -> None:
    layout = Layout.span(7, 3)
    assert layout.plain
    assert layout.positions.tolist() == [[7, 8, 9]]
    assert layout.starts.tolist() == [[True, False, False]]
    assert not layout.pads.any()
    assert torch.equal(layout.mask[0, 0], torch.ones(3, 3).tril().bool())


def test_of_fills_in_the_plain_layout_and_keeps_a_given_one() -> None:
    x = torch.zeros(2, 5, 4)
    plain = Layout.of(x, None)
    assert plain.plain
    assert plain.positions.tolist() == [[0, 1, 2, 3, 4]]
    given_layout = layout_of([[0, 0, 1, -1, -1]])
    assert Layout.of(x, given_layout) is given_layout
    assert not given_layout.plain


def test_angles_follow_the_positions_and_are_computed_once() -> None:
    layout = layout_of([[0, 0, 1, 1, 1], [0, 1, 1, -1, -1]])
    cos, sin = layout.angles(8, 100.0)
    assert cos.shape == sin.shape == (2, 1, 5, 4)
    expected = rope_angles(layout.positions, 8, 100.0)
    assert torch.equal(cos[:, 0], expected[0])
    assert torch.equal(sin[:, 0], expected[1])
    assert layout.angles(8, 100.0)[0] is cos
    assert layout.angles(8, 200.0)[0] is not cos


@given(rows=packed_rows())
def test_off_the_cpu_the_mask_is_handed_on_once_made(rows) -> None:
    here = layout_of(rows)
    assert here.sight[0] is None
    assert here.sight[1] is here.first
    there = Layout(here.positions.to("meta"), here.segments.to("meta"))
    mask, first = there.sight
    assert first is None
    assert mask is there.sight[0]
    assert mask is there.mask
