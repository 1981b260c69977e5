"""`exact_top_k` against all products in double precision: ids equal, ties and copies included."""

from __future__ import annotations

import pytest
import torch

from nano_think.ops import top_k
from nano_think.ops.top_k import exact_top_k, top_k_ref


def unit(count: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)


def clustered(count: int, width: int) -> torch.Tensor:
    """Neighbours lie side by side, as the chunks of one document do."""
    centres = unit(max(1, count // 100), width, 1).repeat_interleave(100, 0)[:count]
    return torch.nn.functional.normalize(centres + 0.02 * unit(len(centres), width, 2), dim=1)


def longest(keys: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(keys, dim=1).max())


def compare(queries: torch.Tensor, keys: torch.Tensor, k: int) -> None:
    scores, ids = exact_top_k(queries, keys, k, longest(keys))
    want_scores, want_ids = top_k_ref(queries, keys, k)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(scores, want_scores, rtol=0, atol=1e-7 * longest(keys))


@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000, 3000])
@pytest.mark.parametrize("k", [1, 4, 40])
@pytest.mark.parametrize("make", [unit, clustered])
def test_ids_are_those_of_double_precision(make, count: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = make(count, 24)
    queries = torch.cat((unit(9, 24, 3), keys[:: max(1, len(keys) // 9)]))
    compare(queries, keys, min(k, len(keys)))
    # blocks that end inside a group, and fewer queries at a time
    monkeypatch.setattr(top_k, "BLOCK", 900)
    monkeypatch.setattr(top_k, "_MOST_PRODUCTS", 4000)
    monkeypatch.setattr(top_k, "_MOST_GATHERED", 7)
    compare(queries, keys, min(k, len(keys)))


def test_copies_come_in_the_order_of_their_ids_also_at_the_border_of_k() -> None:
    keys = unit(700, 24).repeat(3, 1)[torch.randperm(2100, generator=torch.Generator().manual_seed(0))]
    for k in (1, 2, 4, 5):
        compare(keys[:50], keys, k)


def test_neighbours_closer_than_single_precision_can_tell_are_put_in_order() -> None:
    """Scores that differ by less than the rounding of a product; a plain product and topk gets many wrong."""
    base = unit(1, 384)
    keys = torch.cat((base + 3e-8 * unit(600, 384, 4), unit(1500, 384, 5)))
    queries = base + 1e-3 * unit(8, 384, 6)
    _, plain = (queries @ keys.T).topk(16, dim=1)
    assert not torch.equal(plain, top_k_ref(queries, keys, 16)[1])
    compare(queries, keys, 16)


def test_the_margin_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above fails without it: the rounding that it bounds is real."""
    monkeypatch.setattr(top_k, "_UNIT_ROUNDOFF", 0.0)
    with pytest.raises(AssertionError):
        test_neighbours_closer_than_single_precision_can_tell_are_put_in_order()


def test_vectors_of_any_length() -> None:
    keys = unit(2000, 24) * torch.logspace(-3, 3, 2000)[torch.randperm(2000)].unsqueeze(1)
    compare(50 * unit(20, 24, 3), keys, 6)


def test_thousands_of_copies_are_no_trap(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = []
    monkeypatch.setattr(top_k, "_MOST_GATHERED", 50_000)
    keys = unit(1, 24).repeat(40_000, 1)
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda t, n: gathered.append(len(t)) or split(t, n))
    scores, ids = exact_top_k(keys[:4], keys, 3, 1.1)
    assert max(gathered) <= 4
    torch.testing.assert_close(scores, torch.ones(4, 3))
    assert all(len(set(row)) == 3 for row in ids.tolist())


def test_autocast_changes_nothing() -> None:
    keys, queries = unit(2000, 24), unit(8, 24, 3)
    with torch.autocast("cpu", torch.bfloat16):
        compare(queries, keys, 4)


def test_nothing_asked_for_gives_nothing() -> None:
    keys = unit(100, 8)
    assert exact_top_k(keys[:0], keys, 3, 1.1)[1].shape == (0, 3)
    assert exact_top_k(keys[:2], keys, 0, 1.1)[1].shape == (2, 0)
