from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nano_think.ops import selective_scan as module
from nano_think.ops.scan_cpp import CppScan
from nano_think.ops.scan_kernel import CHUNK
from nano_think.ops.selective_scan import (
    BACKEND_VARIABLE,
    check_kernel,
    choose_backend,
    cpp_problem,
    selective_scan,
    triton_problem,
)

KERNELS = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(cpp_problem() is not None, reason="no compiler")),
]
BACKENDS = ["ref", *KERNELS]
CPU = torch.device("cpu")
LENGTHS = [1, 2, 3, 4, 5, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 2]
NAMES = ("y", "last", "x", "dt", "A", "B", "C", "D", "state")


@pytest.fixture(autouse=True)
def _no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)


def scan_inputs(
    batch: int, length: int, d: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    inputs = {
        "x": normal(batch, length, d),
        "dt": normal(batch, length, d).abs() * 0.5,
        "A": -0.05 - 2 * normal(d, n).abs(),
        "B": normal(batch, length, n),
        "C": normal(batch, length, n),
        "D": normal(d),
        "state": normal(batch, d, n),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def random_starts(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.2


def run(
    inputs: dict[str, Tensor], backend: str, starts: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Outputs and all gradients for fixed random output gradients."""
    inputs = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in inputs.items()}
    y, last = selective_scan(**inputs, starts=starts, backend=backend)
    g = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(dtype) for t in (y, last)]
    grads = torch.autograd.grad([y, last], list(inputs.values()), weights)
    return dict(zip(NAMES, (y.detach(), last.detach(), *grads), strict=True))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).abs().max() / value.abs().max().clamp(min=1e-3)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def unrolled(inputs: dict[str, Tensor]) -> Tensor:
    """y from the solution of the recurrence: every earlier input, decayed by the steps in between."""
    x, dt, A, B, C, D, state = inputs.values()
    y = torch.empty_like(x)
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, : t + 1].sum(1).unsqueeze(-1) * A) * state
        for s in range(t + 1):
            decay = torch.exp(dt[:, s + 1 : t + 1].sum(1).unsqueeze(-1) * A)
            h = h + decay * (dt[:, s] * x[:, s]).unsqueeze(-1) * B[:, s].unsqueeze(1)
        y[:, t] = (h * C[:, t].unsqueeze(1)).sum(-1) + D * x[:, t]
    return y


@pytest.mark.parametrize("backend", ["ref", "torch"])
def test_solves_the_recurrence(backend: str) -> None:
    inputs = {name: tensor.detach() for name, tensor in scan_inputs(2, CHUNK + 5, 3, 4).items()}
    y, _ = selective_scan(**inputs, backend=backend)
    torch.testing.assert_close(y, unrolled(inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients_equal_the_reference(backend: str, with_starts: bool, length: int) -> None:
    inputs = scan_inputs(2, length, 20, 16, seed=length)
    starts = random_starts(2, length) if with_starts else None
    exact = run(inputs, "ref", starts)
    assert_same(run(inputs, backend, starts, torch.float32), exact, 2e-6)
    if backend == "torch":
        assert_same(run(inputs, backend, starts), exact, 1e-12)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("batch", "d", "n"), [(1, 1, 1), (3, 16, 5), (1, 300, 16), (2, 129, 24)])
def test_any_width(backend: str, batch: int, d: int, n: int) -> None:
    inputs, starts = scan_inputs(batch, 19, d, n), random_starts(batch, 19)
    assert_same(run(inputs, backend, starts, torch.float32), run(inputs, "ref", starts), 2e-6)


@pytest.mark.parametrize("backend", ["ref", "torch"])
@pytest.mark.parametrize("with_starts", [False, True])
def test_gradcheck(backend: str, with_starts: bool) -> None:
    inputs = scan_inputs(2, CHUNK + 2, 2, 3)
    starts = random_starts(2, CHUNK + 2) if with_starts else None
    x, dt, A, B, C, D, state = inputs.values()

    def scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(*tensors[:6], starts=starts, state=tensors[6], backend=backend)

    assert torch.autograd.gradcheck(scan, (x, dt, A, B, C, D, state), fast_mode=True)


@pytest.mark.parametrize("backend", KERNELS)
def test_length_2048(backend: str) -> None:
    inputs = scan_inputs(1, 2048, 8, 16)
    assert_same(run(inputs, backend, dtype=torch.float32), run(inputs, "ref"), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_handing_the_state_on_equals_one_run(backend: str) -> None:
    length = CHUNK + 3
    inputs = scan_inputs(2, length, 5, 16, dtype=torch.float32)
    whole = run(inputs, backend, dtype=torch.float32)
    for cut in range(1, length):
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
        shared = {name: leaves[name] for name in ("A", "D")}
        parts = []
        state = leaves["state"]
        for piece in (slice(0, cut), slice(cut, length)):
            varying = {name: leaves[name][:, piece] for name in ("x", "dt", "B", "C")}
            y, state = selective_scan(**varying, **shared, state=state, backend=backend)
            parts.append(y)
        y = torch.cat(parts, dim=1)
        g = torch.Generator().manual_seed(7)
        weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).float() for t in (y, state)]
        grads = torch.autograd.grad([y, state], list(leaves.values()), weights)
        assert_same(dict(zip(NAMES, (y, state, *grads), strict=True)), whole, 5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_in_one_row_equal_separate_runs(backend: str) -> None:
    borders = [0, 1, 7, CHUNK, 2 * CHUNK + 5]
    inputs = scan_inputs(1, borders[-1], 5, 16, dtype=torch.float32)
    starts = torch.zeros(1, borders[-1], dtype=torch.bool)
    starts[:, borders[:-1]] = True
    weight = torch.randn(1, borders[-1], 5, generator=torch.Generator().manual_seed(3))
    x, dt, A, B, C, D, state = inputs.values()

    packed, last = selective_scan(x, dt, A, B, C, D, starts=starts, state=state, backend=backend)
    packed_grads = torch.autograd.grad((packed * weight).sum(), (x, dt, A, B, C, D, state))
    pieces = [slice(*ends) for ends in itertools.pairwise(borders)]
    runs = [selective_scan(x[:, p], dt[:, p], A, B[:, p], C[:, p], D, backend=backend) for p in pieces]
    separate = torch.cat([y for y, _ in runs], dim=1)
    grads = torch.autograd.grad((separate * weight).sum(), (x, dt, A, B, C, D))

    torch.testing.assert_close(packed, separate, rtol=0, atol=2e-6)
    torch.testing.assert_close(last, runs[-1][1], rtol=0, atol=2e-6)
    for actual, expected in zip(packed_grads[:-1], grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not packed_grads[-1].any()  # the first document begins at once: the initial state reaches nothing


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_of_zero_leave_the_state_bit_identical(backend: str) -> None:
    inputs = {k: v.detach() for k, v in scan_inputs(2, 40, 5, 16, dtype=torch.float32).items()}
    pads = torch.rand(40, generator=torch.Generator().manual_seed(2)) < 0.4
    varying = ("x", "dt", "B", "C")
    kept = {k: v[:, ~pads] if k in varying else v for k, v in inputs.items()}
    inputs["dt"] = inputs["dt"].masked_fill(pads[:, None], 0)
    y, last = selective_scan(**inputs, backend=backend)
    y_kept, last_kept = selective_scan(**kept, backend=backend)
    assert torch.equal(last, last_kept)
    torch.testing.assert_close(y[:, ~pads], y_kept, rtol=1e-6, atol=1e-6)

    inputs["dt"] = torch.zeros_like(inputs["dt"])
    _, last = selective_scan(**inputs, backend=backend)
    assert torch.equal(last, inputs["state"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [1e-6, 20.0, 1e4])
def test_extreme_steps_stay_finite(backend: str, step: float) -> None:
    inputs = scan_inputs(1, 3 * CHUNK, 4, 16)
    inputs["A"] = -torch.arange(1.0, 17.0).expand(4, 16)
    inputs["dt"] = torch.full_like(inputs["dt"], step)
    results = run(inputs, backend, dtype=torch.float32)
    assert all(value.isfinite().all() for value in results.values())
    assert_same(results, run(inputs, "ref"), 1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_decaying_states_reach_subnormal_numbers_unharmed(backend: str) -> None:
    inputs = scan_inputs(1, 100, 4, 16)
    inputs["dt"] = torch.full_like(inputs["dt"], 1.0)
    inputs["x"] = torch.zeros_like(inputs["x"])
    results = run(inputs, backend, dtype=torch.float32)
    assert_same(results, run(inputs, "ref"), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_one_by_one_equal_the_scan(backend: str) -> None:
    inputs = {k: v.detach() for k, v in scan_inputs(2, 20, 5, 16, dtype=torch.float32).items()}
    y, last = selective_scan(**inputs, backend=backend)
    state = inputs["state"]
    for t in range(20):
        step = {k: inputs[k][:, t : t + 1] for k in ("x", "dt", "B", "C")}
        y_t, state = selective_scan(**step, A=inputs["A"], D=inputs["D"], state=state, backend=backend)
        torch.testing.assert_close(y_t[:, 0], y[:, t], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_inputs_are_computed_in_fp32(backend: str) -> None:
    inputs = {k: v.detach().bfloat16() for k, v in scan_inputs(2, 33, 5, 16).items()}
    exact, exact_last = selective_scan(**{k: v.float() for k, v in inputs.items()}, backend=backend)
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, last = selective_scan(**leaves, backend=backend)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    assert torch.equal(last, exact_last)
    assert torch.equal(y, exact.bfloat16())
    assert all(leaf.grad.dtype == torch.bfloat16 for leaf in leaves.values())


def gated_inputs(
    batch: int, length: int, d: int, n: int, half: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs with raw step sizes, their bias and a gate, and starts; `half` rounds the sequences to bf16."""
    inputs = scan_inputs(batch, length, d, n, seed=length)
    g = torch.Generator().manual_seed(5)
    inputs["dt"] = 3 * torch.randn(batch, length, d, generator=g, dtype=torch.float64)
    inputs["dt_bias"] = torch.randn(d, generator=g, dtype=torch.float64)
    inputs["z"] = 2 * torch.randn(batch, length, d, generator=g, dtype=torch.float64)
    sequences = ("x", "dt", "B", "C", "z")
    rounded = {k: v.detach().bfloat16() if half and k in sequences else v for k, v in inputs.items()}
    return rounded, random_starts(batch, length)


def run_gated(inputs: dict[str, Tensor], starts: Tensor | None, backend: str) -> dict[str, Tensor]:
    """As `run`, each tensor in the dtype it has."""
    inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    y, last = selective_scan(**inputs, starts=starts, backend=backend)
    g = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).bfloat16() for t in (y, last)]
    grads = torch.autograd.grad(
        [y, last], list(inputs.values()), [w.to(t.dtype) for w, t in zip(weights, (y, last), strict=True)]
    )
    return dict(zip(("y", "last", *inputs), (y.detach(), last.detach(), *grads), strict=True))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("batch", "length", "d", "n"),
    [(2, 1, 20, 16), (1, 40, 32, 16), (2, 19, 129, 5), (3, 2 * CHUNK, 300, 7), (1, 2, 1, 1)],
)
def test_softplus_and_gate_equal_the_reference(backend: str, batch: int, length: int, d: int, n: int) -> None:
    """fp32 against fp64: relative to the largest entry, 2e-6."""
    inputs, starts = gated_inputs(batch, length, d, n)
    single = {name: tensor.float() for name, tensor in inputs.items()}
    for marks in (None, starts):
        assert_same(run_gated(single, marks, backend), run_gated(inputs, marks, "ref"), 2e-6)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("batch", "length", "d", "n"), [(1, 40, 32, 16), (2, 19, 129, 5)])
def test_bf16_sequences_cost_one_rounding(backend: str, batch: int, length: int, d: int, n: int) -> None:
    """Values and gradients against fp64 on the same rounded inputs: half a unit of bf16, 2^-9, of each entry."""
    inputs, starts = gated_inputs(batch, length, d, n, half=True)
    mixed = {k: v if v.dtype == torch.bfloat16 else v.float() for k, v in inputs.items()}
    actual = run_gated(mixed, starts, backend)
    exact = run_gated({k: v.double() for k, v in inputs.items()}, starts, "ref")
    for name, value in exact.items():
        is_sequence = actual[name].dtype == torch.bfloat16
        assert is_sequence == (name in ("y", "x", "dt", "B", "C", "z")), name
        torch.testing.assert_close(
            actual[name].double(),
            value,
            rtol=2**-8 if is_sequence else 1e-5,
            atol=4e-6 * float(value.abs().max()),
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_raw_steps_of_minus_infinity_change_nothing(backend: str) -> None:
    inputs, _ = gated_inputs(2, 40, 5, 16)
    inputs = {name: tensor.detach().float() for name, tensor in inputs.items()}
    pads = torch.rand(40, generator=torch.Generator().manual_seed(2)) < 0.4
    varying = ("x", "dt", "B", "C", "z")
    kept = {k: v[:, ~pads] if k in varying else v for k, v in inputs.items()}
    inputs["dt"] = inputs["dt"].masked_fill(pads[:, None], -torch.inf)
    padded, alone = (run_gated(tensors, None, backend) for tensors in (inputs, kept))
    assert torch.equal(padded["last"], alone["last"])
    torch.testing.assert_close(padded["y"][:, ~pads], alone["y"], rtol=1e-5, atol=1e-6)
    assert all(value.isfinite().all() for value in padded.values())
    assert not padded["dt"][:, pads].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_a_broken_document_reaches_the_next(backend: str) -> None:
    inputs = {k: v.detach() for k, v in scan_inputs(1, 40, 5, 16, dtype=torch.float32).items()}
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[:, [0, 21]] = True
    healthy, _ = selective_scan(**inputs, starts=starts, backend=backend)
    inputs["x"][:, 5] = torch.inf
    broken, _ = selective_scan(**inputs, starts=starts, backend=backend)
    assert torch.equal(broken[:, 21:], healthy[:, 21:])


@pytest.mark.parametrize("backend", KERNELS)
def test_strided_inputs(backend: str) -> None:
    inputs = {k: v.detach() for k, v in scan_inputs(2, 20, 16, 16, dtype=torch.float32).items()}
    spread = {k: torch.stack((v, v), dim=-1)[..., 0] for k, v in inputs.items()}
    assert not any(v.is_contiguous() for v in spread.values())
    for actual, expected in zip(
        selective_scan(**spread, backend=backend), selective_scan(**inputs, backend=backend), strict=True
    ):
        assert torch.equal(actual, expected)


class Elements(TorchDispatchMode):
    """Counts the elements that operations produce."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.total += tensor.numel()
                self.largest = max(self.largest, tensor.numel())
        return result


def backward_elements(backend: str, length: int, d: int = 16) -> tuple[int, int, int]:
    """Elements saved by the forward pass, produced by the backward pass, and in its largest tensor."""
    inputs = scan_inputs(1, length, d, 16, dtype=torch.float32)
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = selective_scan(**inputs, backend=backend)
    with Elements() as elements:
        torch.autograd.grad(y.sum(), list(inputs.values()))
    return saved, elements.total, elements.largest


@pytest.mark.parametrize("backend", KERNELS)
def test_backward_cost_is_linear_in_length(backend: str) -> None:
    counts = [backward_elements(backend, length) for length in (8 * CHUNK, 16 * CHUNK, 32 * CHUNK)]
    for (saved, total, _), (saved_twice, total_twice, _) in itertools.pairwise(counts):
        assert saved_twice <= 2.05 * saved
        assert total_twice <= 2.05 * total


@pytest.mark.parametrize("backend", KERNELS)
def test_slices_of_a_projection(backend: str) -> None:
    """x, dt, B, C as neighbours in one tensor, as a mixer hands them over, values and gradients to the bit."""
    inputs = {k: v.detach() for k, v in scan_inputs(2, 20, 16, 16, dtype=torch.float32).items()}
    names = ("x", "dt", "B", "C")
    together = torch.cat([inputs[name] for name in names], dim=-1)
    sliced = {**inputs, **dict(zip(names, together.chunk(4, dim=-1), strict=True))}
    results = []
    for tensors in (inputs, sliced):
        leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        y, _ = selective_scan(**leaves, backend=backend)
        results.append([y, *torch.autograd.grad(y.sum(), list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_no_tensor_of_length_times_states(backend: str) -> None:
    length, d, n = 32 * CHUNK, 64, 16
    saved, _, largest = backward_elements(backend, length, d)
    assert saved < length * d * n / 4
    assert largest < length * d * n / 8


def test_auto_takes_the_compiled_kernel_for_fp32_on_the_cpu() -> None:
    expected = "torch" if cpp_problem() else "cpp"
    assert choose_backend("auto", CPU, torch.float32) == expected
    assert choose_backend("auto", CPU, torch.float64) == "torch"
    expected = "torch" if triton_problem() else "triton"
    assert choose_backend("auto", torch.device("cuda"), torch.float32) == expected
    assert choose_backend("auto", torch.device("mps"), torch.float32) == "torch"


def test_environment_variable_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "ref")
    assert choose_backend("torch", CPU, torch.float32) == "ref"


def test_impossible_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one of"):
        choose_backend("cuda", CPU, torch.float32)
    with pytest.raises(ValueError, match="fp32 on the CPU"):
        choose_backend("cpp", CPU, torch.float64)
    with pytest.raises(ValueError, match="fp32 on CUDA devices"):
        choose_backend("triton", CPU, torch.float32)


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    module.triton_problem.cache_clear()
    try:
        with pytest.raises(ValueError, match="triton is not installed"):
            choose_backend("triton", torch.device("cuda"), torch.float32)
        assert choose_backend("auto", torch.device("cuda"), torch.float32) == "torch"
    finally:
        module.triton_problem.cache_clear()


@pytest.mark.skipif(cpp_problem() is not None, reason="no compiler")
def test_a_kernel_that_is_wrong_is_found_out() -> None:
    class Wrong(module.CppScan):
        def backward(self, *args: object) -> object:
            right = super().backward(*args)
            return right._replace(dt_bias=1.01 * right.dt_bias)

    module.check_kernel(module.CppScan(), CPU)
    with pytest.raises(RuntimeError, match="its dt_bias is off by"):
        module.check_kernel(Wrong(), CPU)


def test_without_compiler_it_warns_once_and_still_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise module.BuildError("no C++ compiler was found: install g++ or set CXX")

    monkeypatch.setattr(module, "CppScan", missing)
    module.cpp_problem.cache_clear()
    inputs = scan_inputs(1, 20, 4, 16, dtype=torch.float32)
    try:
        with pytest.warns(UserWarning, match="install g\\+\\+ or set CXX") as caught:
            results = [run(inputs, "auto", dtype=torch.float32) for _ in range(3)]
        with pytest.raises(ValueError, match="cannot be used"):
            choose_backend("cpp", CPU, torch.float32)
    finally:
        module.cpp_problem.cache_clear()
    assert len(caught) == 1
    assert_same(results[0], run(inputs, "ref"), 2e-6)


def test_the_check_of_a_kernel_does_not_depend_on_who_asks_first() -> None:
    """Training asks under autocast, generation without gradients: both once turned the kernel of a GPU down."""
    if cpp_problem() is not None:
        pytest.skip("no C++ compiler")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        check_kernel(CppScan(), torch.device("cpu"))


@pytest.mark.parametrize("length", [1, 8])
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("state", torch.zeros(1, 16, 4)),
        ("starts", torch.zeros(1, 8, dtype=torch.bool)),
        ("starts", torch.zeros(2, 8, dtype=torch.int64)),
        ("D", torch.zeros(15)),
        ("B", torch.zeros(2, 8, 5)),
        ("dt", torch.zeros(2, 8, 1)),
        ("A", torch.zeros(15, 4)),
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value.shape)),
)
def test_other_shapes_are_refused_by_every_backend(name, wrong, length):
    x = torch.zeros(2, length, 16)
    given = {"x": x, "dt": x, "A": torch.zeros(16, 4), "D": torch.zeros(16), "starts": None, "state": None}
    given |= {letter: torch.zeros(2, length, 4) for letter in "BC"}
    if length == 1 and name in ("starts", "B", "dt"):
        wrong = wrong[:, :1]
    with pytest.raises(ValueError, match="of a scan must be"):
        selective_scan(**given | {name: wrong})
