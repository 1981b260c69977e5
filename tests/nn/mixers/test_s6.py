from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nano_think.nn.block import init_blocks
from nano_think.nn.mixers.s6 import S6, Selection
from nano_think.ops.layout import Layout
from nano_think.ops.scan_kernel import CHUNK

D_MODEL = 12


@pytest.fixture(scope="module")
def mixer(randomise: Callable[..., nn.Module]) -> S6:
    return randomise(S6(D_MODEL, d_state=5)).eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(x: Tensor) -> Layout:
    return Layout.of(x, None)


def layout_of(segments: list[list[int]]) -> Layout:
    positions = [[row[:i].count(segment) for i, segment in enumerate(row)] for row in segments]
    return Layout(torch.tensor(positions), torch.tensor(segments))


def copy_into_hf(mixer: S6, hf: nn.Module) -> None:
    """Our weights in the module of the same mixer in transformers."""
    with torch.no_grad():
        hf.conv1d.weight.copy_(mixer.conv_weight.unsqueeze(1))
        hf.conv1d.bias.copy_(mixer.conv_bias)
        hf.dt_proj.weight.copy_(mixer.dt_weight)
        hf.dt_proj.bias.copy_(mixer.dt_bias)
        for name in ("in_proj", "x_proj", "out_proj"):
            getattr(hf, name).weight.copy_(getattr(mixer, name).weight)
        hf.A_log.copy_(mixer.A_log)
        hf.D.copy_(mixer.D)


@pytest.mark.parametrize("backend", ["ref", "torch", "auto"])
@pytest.mark.parametrize("length", [1, 3, 4, CHUNK, 50])
def test_equals_mamba_of_transformers(backend: str, length: int, randomise: Callable[..., nn.Module]) -> None:
    """fp32: values to 1e-5, gradients of the input and every parameter to 1e-4."""
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = mamba.MambaConfig(
        hidden_size=24, state_size=16, conv_kernel=4, expand=2, time_step_rank=2, num_hidden_layers=1
    )
    ours = randomise(S6(24, backend=backend))
    theirs = mamba.MambaMixer(config, layer_idx=0).eval()
    copy_into_hf(ours, theirs)
    x = normal(2, length, 24).requires_grad_()
    actual, expected = ours(x, plain(x)), theirs(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    upstream = normal(2, length, 24, seed=1)
    own = ["A_log", "D", "in_proj.weight", "x_proj.weight", "out_proj.weight"]
    own += ["dt_weight", "dt_bias", "conv_weight", "conv_bias"]
    other = [*own[:5], "dt_proj.weight", "dt_proj.bias", "conv1d.weight", "conv1d.bias"]
    assert sorted(own) == sorted(name for name, _ in ours.named_parameters())
    for name, a, b in zip(
        ["x", *own],
        torch.autograd.grad(actual, [x, *map(ours.get_parameter, own)], upstream),
        torch.autograd.grad(expected, [x, *map(theirs.get_parameter, other)], upstream),
        strict=True,
    ):
        torch.testing.assert_close(
            a, b.view_as(a), rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_initial_values() -> None:
    mixer = S6(384)
    assert (mixer.d_inner, mixer.d_state, mixer.d_conv, mixer.dt_rank) == (768, 16, 4, 24)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17.0).expand(768, 16))
    assert torch.equal(mixer.D, torch.ones(768))
    steps = nn.functional.softplus(mixer.dt_bias)
    assert 0.99e-3 <= steps.min() < 2e-3 < 5e-2 < steps.max() <= 1.01e-1
    middle = math.exp(0.5 * (math.log(1e-3) + math.log(1e-1)))
    assert 0.4 < (steps < middle).float().mean() < 0.6  # log-uniform, not uniform
    assert 0.95 * 24**-0.5 < mixer.dt_weight.abs().max() <= 24**-0.5


def test_step_sizes_survive_the_init_of_a_stack() -> None:
    stack = nn.ModuleList([S6(32)])
    before = copy.deepcopy(stack[0])
    init_blocks(stack, num_layers=6)
    for name in ("dt_weight", "dt_bias", "A_log", "D", "conv_weight", "conv_bias"):
        assert torch.equal(getattr(stack[0], name), getattr(before, name)), name
    assert not torch.equal(stack[0].in_proj.weight, before.in_proj.weight)


def test_decay_spares_rates_skips_and_steps() -> None:
    marked = [n for n, p in S6(16).named_parameters() if getattr(p, "_no_weight_decay", False)]
    assert sorted(marked) == ["A_log", "D", "dt_bias"]


def test_without_gate() -> None:
    gated, bare = S6(16), S6(16, gate=False)
    assert gated.in_proj.out_features == 2 * bare.in_proj.out_features == 64
    x = normal(1, 9, 16)
    state = bare.init_state(1, 9)
    torch.testing.assert_close(bare.extend(x, state), bare(x, plain(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("position", [0, 1, 7, CHUNK - 1, CHUNK, 39])
def test_a_token_changes_nothing_before_it_and_everything_after(mixer: S6, position: int) -> None:
    x = normal(2, 40, D_MODEL)
    changed = x.clone()
    changed[:, position] += 1
    with torch.no_grad():
        before, after = mixer(x, plain(x)), mixer(changed, plain(x))
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before[:, position:] != after[:, position:]).any(-1).all()


def test_selection_depends_on_the_input(mixer: S6) -> None:
    """A time-invariant system is linear in its input; this one is not, because it chooses steps, B and C."""
    u = normal(1, 20, mixer.d_inner)
    selection = mixer._select(u)
    once, _ = mixer._scan(u, selection, None)
    fixed, _ = mixer._scan(2 * u, selection, None)
    torch.testing.assert_close(fixed, 2 * once, rtol=1e-5, atol=1e-5)
    selective, _ = mixer._scan(2 * u, mixer._select(2 * u), None)
    assert not torch.allclose(selective, 2 * once, rtol=0.05)


def test_every_parameter_gets_a_gradient(mixer: S6) -> None:
    mixer.zero_grad()
    x = normal(2, 30, D_MODEL)
    mixer(x, plain(x)).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_gradients_of_a_long_sequence_are_finite() -> None:
    mixer, x = S6(D_MODEL), normal(1, 2000, D_MODEL)
    mixer(x, plain(x)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in mixer.parameters())


def test_packed_documents_equal_their_own_runs(mixer: S6) -> None:
    segments = [[0] * 1 + [1] * 7 + [2] * 2 + [3] * 30, [0] * 20 + [1] * 20]
    x = normal(2, 40, D_MODEL).requires_grad_()
    packed = mixer(x, layout_of(segments))
    upstream = normal(2, 40, D_MODEL, seed=1)
    (packed_grad,) = torch.autograd.grad(packed, x, upstream)
    for row, ids in enumerate(segments):
        for document in sorted(set(ids)):
            where = [i for i, segment in enumerate(ids) if segment == document]
            own = x[row : row + 1, where].detach().requires_grad_()
            alone = mixer(own, plain(own))
            torch.testing.assert_close(packed[row : row + 1, where], alone, rtol=1e-5, atol=1e-5)
            (grad,) = torch.autograd.grad(alone, own, upstream[row : row + 1, where])
            torch.testing.assert_close(packed_grad[row : row + 1, where], grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("left", [0, 1, 3, 20])
def test_pads_on_either_side_change_nothing(mixer: S6, left: int) -> None:
    x = normal(1, 40, D_MODEL)
    segments = [[-1] * left + [0] * 15 + [-1] * (25 - left)]
    with torch.no_grad():
        padded = mixer(x, layout_of(segments))
        own = x[:, left : left + 15]
        alone = mixer(own, plain(own))
    torch.testing.assert_close(padded[:, left : left + 15], alone, rtol=1e-5, atol=1e-6)
    assert padded.isfinite().all()


def test_step_sizes_are_zero_at_pads_alone(mixer: S6, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    inner = S6._scan

    def watch(self: S6, u: Tensor, selection: Selection, *rest: Any) -> tuple[Tensor, Tensor]:
        seen.append(nn.functional.softplus(selection.dt + self.dt_bias))
        return inner(self, u, selection, *rest)

    monkeypatch.setattr(S6, "_scan", watch)
    layout = layout_of([[-1, -1, 0, 0, 0, 1, 1, -1]])
    mixer(normal(1, 8, D_MODEL), layout)
    assert torch.equal((seen[0] == 0).all(-1), layout.pads)
    assert (seen[0][~layout.pads] > 0).all()


@pytest.mark.parametrize("pieces", [[1] * 20, [20], [3, 1, 1, 15], [CHUNK, 4], [1, CHUNK + 1, 2]])
@pytest.mark.parametrize("max_rollback", [0, 4])
def test_cached_equals_full(mixer: S6, pieces: list[int], max_rollback: int) -> None:
    x = normal(2, 20, D_MODEL)
    state = mixer.init_state(2, 20, max_rollback)
    with torch.no_grad():
        outputs = [mixer.extend(part, state) for part in x.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(outputs, 1), mixer(x, plain(x)), rtol=1e-5, atol=1e-5)
    assert state.length == 20


def test_state_is_small_fp32_and_independent_of_length(mixer: S6) -> None:
    expected = 3 * mixer.d_inner * (mixer.d_conv - 1 + mixer.d_state) * 4
    short, long = mixer.init_state(3, 10), mixer.init_state(3, 10_000)
    assert short.num_bytes == long.num_bytes == expected
    assert short["window"].shape == (3, mixer.d_inner, mixer.d_conv - 1)
    assert short["scan"].shape == (3, mixer.d_inner, mixer.d_state)
    with torch.no_grad():
        mixer.extend(normal(3, 7, D_MODEL), short)
    assert short.num_bytes == expected
    assert short["scan"].dtype == torch.float32


steps = st.one_of(
    st.tuples(st.just("read"), st.integers(1, 6)),
    st.tuples(st.just("rollback"), st.integers(0, 3)),
    st.tuples(st.just("reorder"), st.permutations(range(2))),
)


@given(program=st.lists(steps, min_size=1, max_size=8))
def test_any_program_of_reads_rollbacks_and_reorders_equals_recomputation(
    mixer: S6, program: list[tuple[str, int | list[int]]]
) -> None:
    stream = normal(2, 64, D_MODEL)
    state, seen, used, allowed = mixer.init_state(2, 64, max_rollback=3), stream[:, :0], 0, 0
    with torch.no_grad():
        for action, argument in program:
            if action == "read":
                new = stream[:, used : used + argument]
                out = mixer.extend(new, state)
                seen, used = torch.cat((seen, new), 1), used + argument
                allowed = min(3, allowed + argument)
                torch.testing.assert_close(out, mixer(seen, plain(seen))[:, -argument:], rtol=1e-5, atol=1e-5)
            elif action == "reorder":
                state.reorder(torch.tensor(argument))
                seen = seen[argument]
            elif argument <= allowed:
                state.rollback(argument)
                seen, allowed = seen[:, : seen.shape[1] - argument], allowed - argument
            assert state.length == seen.shape[1]


def test_autocast_keeps_the_scan_in_fp32(mixer: S6, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    inner = S6._scan

    def watch(self: S6, u: Tensor, selection: Selection, *rest: Any) -> tuple[Tensor, Tensor]:
        y, last = inner(self, u, selection, *rest)
        seen.append((u.dtype, selection.dt.dtype, y.dtype, last.dtype))
        return y, last

    monkeypatch.setattr(S6, "_scan", watch)
    x = normal(2, 30, D_MODEL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = mixer(x, plain(x))
    assert seen == [(torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32)]
    full = mixer(x, plain(x))
    assert (half.float() - full).norm() < 0.03 * full.norm()
