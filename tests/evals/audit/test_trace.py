"""Blame on toy modules whose fault is known, the measures it rests on, and what findings amount to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nano_think.evals.audit.finding import Audit, Finding
from nano_think.evals.audit.trace import Trace, distance, first_difference, join, recording, unequal

B, L, D = 2, 7, 4
T = 5


def shifted(x: Tensor) -> Tensor:
    """Every position with the one after it added."""
    return x + torch.cat((x[:, 1:], x[:, :1]), dim=1)


class Leak(nn.Module):
    """A fault in a module of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return shifted(x)


class Between(nn.Module):
    """A fault in the code between two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(shifted(self.first(x)))


class Behind(Between):
    """A fault behind the last module."""

    def forward(self, x: Tensor) -> Tensor:
        return shifted(self.second(self.first(x)))


class Stack(nn.Module):
    """A fault between the layers of a list, which computes nothing itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"linear": nn.Linear(D, D)}) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer["linear"](shifted(x) if i == 2 else x)
        return x


class Twice(nn.Module):
    """A fault in front of the second call of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(shifted(self.linear(x)))


class Heads(nn.Module):
    """(B, L, D) to (B, H, L, D / H) and through a leak that has the positions on the third axis."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.mix = nn.Linear(D, D), MixHeads()

    def forward(self, x: Tensor) -> Tensor:
        heads = self.linear(x).unflatten(-1, (2, D // 2)).transpose(1, 2)
        return self.mix(heads).transpose(1, 2).flatten(2)


class MixHeads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.roll(-1, dims=2)


class InPlace(nn.Module):
    """Writes into what a healthy module returned."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y += y.roll(-1, dims=1)
        return y


class Numbered(nn.Module):
    """Hands numbers of documents on, which may be chosen freely."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Ignoring()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner({"values": [x], "numbers": x.sum(-1).round().long()})


class Ignoring(nn.Module):
    def forward(self, inputs: dict[str, list[Tensor]]) -> Tensor:
        return inputs["values"][0]


def texts(t: int = T) -> tuple[Tensor, Tensor]:
    """Two inputs that differ at position t alone."""
    x = torch.randn(B, L, D, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, t] += 1
    return x, changed


def trace(model: nn.Module, x: Tensor, like: Trace | None = None) -> Trace:
    with torch.no_grad(), recording(model, x.shape[:2], like) as passed:
        model(x)
    return passed


def blamed(model: nn.Module) -> str | None:
    """Where a change at T first shows before T."""
    return first_difference(
        *(trace(model, x) for x in texts()), lambda one, other: bool(unequal(one, other)[:, :T].any())
    )


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (Leak, ""),
        (Between, ""),
        (Behind, ""),
        (Stack, ""),
        (Twice, ""),
        (lambda: nn.Sequential(nn.Linear(D, D), Leak(), nn.Linear(D, D)), "1"),
        (lambda: nn.Sequential(nn.Linear(D, D), Between(), Leak()), "1"),
        (lambda: nn.Sequential(nn.Linear(D, D), Behind()), "1"),
        (lambda: nn.Sequential(nn.Linear(D, D), nn.Sequential(nn.SiLU(), Stack()), Leak()), "1.1"),
        (lambda: nn.Sequential(nn.Sequential(nn.Sequential(nn.SiLU(), Leak()), nn.SiLU())), "0.0.1"),
        (lambda: nn.Sequential(nn.Linear(D, D), Heads()), "1.mix"),
        (lambda: nn.Sequential(nn.Linear(D, D), InPlace()), "1"),
        (lambda: nn.Sequential(Numbered(), Leak()), "1"),
        (lambda: nn.Sequential(nn.Linear(D, D), nn.SiLU()), None),
    ],
)
def test_the_innermost_module_that_holds_the_fault_is_blamed(model: Callable[[], nn.Module], path):
    torch.manual_seed(0)
    assert blamed(model()) == path


def test_hooks_are_gone_afterwards_even_after_an_error():
    model = nn.Sequential(nn.Linear(D, D), nn.SiLU())
    with pytest.raises(RuntimeError), recording(model, (B, L)):
        model(torch.zeros(B, L, D + 1))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_positions_of_a_short_text_are_found_where_a_long_one_had_them():
    # two positions look like two heads; on the axis of the heads every position would differ
    model, (x, _) = nn.Sequential(nn.Linear(D, D), Heads()), texts()
    whole = trace(model, x)
    key = ("1.mix", "input", 0, 0)
    assert whole.tensors[key].shape == (B, L, D)
    own = (slice(None), slice(2))
    alone = trace(model, x[own], like=whole)
    torch.testing.assert_close(alone.tensors[key], whole.part(*own).tensors[key])
    assert first_difference(whole.part(*own), alone, lambda a, b: not torch.allclose(a, b)) == "1.mix"
    by_size = trace(model, x[own])
    assert not torch.allclose(by_size.tensors[key], whole.part(*own).tensors[key])


def test_modules_called_more_often_in_one_trace_are_passed_over():
    class Decoding(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x) + 1 if len(calls) else x)

    calls: list[int] = []
    model = nn.Sequential(Decoding(), nn.SiLU())
    (x, _), traces = texts(), []
    for _ in range(2):
        traces.append(trace(model, x))
        calls.append(1)
    assert first_difference(*traces, lambda one, other: bool((one != other).any())) == "0"


def test_pieces_are_joined_as_far_as_all_have_them():
    a, b = torch.zeros(B, 2, 3), torch.ones(B, 1, 3)
    joined = join([{"x": a, "narrow": a[..., :1], "once": a}, {"x": b, "narrow": b}])
    assert list(joined) == ["x"]
    assert joined["x"][0, :, 0].tolist() == [0, 0, 1]
    assert join([]) == {}


class TestMeasures:
    NAN, INF = math.nan, math.inf

    @pytest.mark.parametrize(
        ("one", "other", "differs", "far"),
        [
            (1.0, 1.0, False, 0.0),
            (1.0, 1.5, True, 0.5),
            (-INF, -INF, False, 0.0),
            (INF, -INF, True, INF),
            (NAN, NAN, False, 0.0),
        ],
    )
    def test_single_values(self, one, other, differs, far):
        # the value stands among ones, so that the root mean square is 1
        both = torch.ones(2, 1, 1, 8)
        both[0, 0, 0, 0], both[1, 0, 0, 0] = one, other
        assert unequal(*both).tolist() == [[differs]]
        assert distance(*both).tolist() == [[far]]

    def test_a_number_in_place_of_none_is_no_small_distance(self):
        one, other = torch.ones(1, 1, 2), torch.tensor([[[1.0, self.NAN]]])
        assert unequal(one, other).all()
        assert not (distance(one, other) <= 1e9).any()
        assert not (distance(other, one) <= 1e9).any()

    def test_distance_is_relative_to_the_root_mean_square_and_seen_at_its_position(self):
        one = torch.full((1, 3, 2), 200.0)
        other = one.clone()
        other[0, 1, 1] += 1
        assert distance(one, other)[0].tolist() == pytest.approx([0, 1 / 200, 0])

    def test_names_are_the_same_or_are_not(self):
        one = torch.tensor([[[1_000_000, 5], [7, 8]]])
        other = torch.tensor([[[1_000_001, 5], [7, 8]]])
        assert distance(one, other).tolist() == [[math.inf, 0.0]]


class TestFindings:
    def finding(self, verdict: str, **more: object) -> Finding:
        return Finding("A1", "title", verdict, **more)

    @pytest.mark.parametrize(
        ("verdict", "passed"),
        [("pass", True), ("not applicable", True), ("fail", False), ("vacuous", False)],
    )
    def test_only_what_was_shown_passes(self, verdict, passed):
        finding = self.finding(verdict)
        assert finding.passed is passed
        healthy = Finding("A2", "title", "pass", 0.0)
        for findings in ((finding, healthy), (healthy, finding)):
            audit = Audit("model", findings)
            assert audit.passed is passed
            assert audit.failures() == ([] if passed else [finding])
            assert audit["A1"] is finding

    def test_data_is_json_and_says_everything(self):
        failure = self.finding("fail", violation=math.inf, position=3, component="router", note="why")
        audit = Audit("model", (failure,), ("router.bias",), {"rows": 2})
        data = json.loads(json.dumps(audit.data(), allow_nan=False))
        assert data["passed"] is False
        assert data["subject"] == "model"
        assert data["replaced"] == ["router.bias"]
        assert data["setting"] == {"rows": 2}
        expected = {"check": "A1", "verdict": "fail", "position": 3, "component": "router", "note": "why"}
        assert expected.items() <= data["findings"][0].items()

    def test_the_table_shows_every_finding(self):
        audit = Audit("a model", (self.finding("fail", position=3, component="router"),))
        text = str(audit)
        for part in ("a model", "A1", "fail", "3", "router"):
            assert part in text
