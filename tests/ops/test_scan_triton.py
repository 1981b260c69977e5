"""The Triton scan without a GPU: values and gradients in Triton's interpreter, and that it compiles for GPUs.

Run as a script, this file is what the interpreter runs: it has to be asked for before Triton is imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

# batch, length, channels, states, softplus and gate, starts, bf16; tiles are 8 positions of 4 channels
CASES = [
    (1, 2, 4, 2, False, False, False),
    (1, 8, 1, 1, True, False, False),
    (2, 11, 5, 3, True, True, False),
    (1, 19, 6, 4, False, True, False),
    (2, 9, 5, 3, True, True, True),
]


@pytest.fixture(scope="module")
def errors() -> list[dict[str, list[float]]]:
    """Of every case and result: the largest error and the largest value of the reference in fp64."""
    repository = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(repository), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    if "only 0-dimensional arrays" in done.stderr:
        pytest.skip("the interpreter of Triton before 3.7 does not work with NumPy from 2.4 on")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(CASES)))
def test_values_and_gradients_equal_the_reference(errors: list[dict[str, list[float]]], number: int) -> None:
    """Relative to the largest entry: 2e-6 in fp32; half a unit of bf16, 2^-9, where a result is stored in it."""
    *_, gated, _, half = CASES[number]
    assert len(errors[number]) == 9 + 2 * gated
    for name, (error, largest) in errors[number].items():
        rounded = half and name in ("y", "x", "dt", "B", "C", "z")
        assert error <= (2**-8 if rounded else 2e-6) * max(largest, 1e-3), f"{name}: {error:.1e} of {largest}"


@pytest.mark.parametrize("gated", [False, True])
def test_compiles_for_gpus_that_are_not_here(gated: bool) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nano_think.ops import scan_triton

    sequences, whole = ("x", "dt", "B", "C", "z", "y", "dy", "dx", "ddt", "dz"), ("length", "channels", "n")
    for kernel, extra in ((scan_triton._forward, {"KEEP": True}), (scan_triton._backward, {})):
        constants = {"T": scan_triton.CHUNK, "W": scan_triton.BLOCK, "N": 16, **extra}
        constants |= dict.fromkeys(("GATED", "RAW", "STARTS"), gated)
        signature = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(constants, "constexpr")
        for name in kernel.arg_names:
            if name in sequences:
                signature[name] = "*bf16" if gated else "*fp32"
            elif name in whole or name.endswith("_step"):
                signature[name] = "i32"
        signature["starts"] = "*u8"
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        built = triton.compile(source, target=GPUTarget("cuda", 80, 32))
        assert built.asm["cubin"]


def main() -> None:
    from nano_think.ops.scan_triton import TritonScan

    print(json.dumps([case_errors(TritonScan(chunk=8, block=4), *case) for case in CASES]))


def case_errors(
    kernel: object, batch: int, length: int, channels: int, n: int, gated: bool, starts: bool, half: bool
) -> dict[str, list[float]]:
    """{name: [largest error, largest value]} of outputs and gradients."""
    from nano_think.ops.scan_kernel import ScanInputs
    from nano_think.ops.selective_scan import selective_scan

    g = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    sequence, states = (batch, length, channels), (batch, length, n)
    inputs = {"x": normal(*sequence), "dt": normal(*sequence), "A": -0.05 - 2 * normal(channels, n).abs()}
    inputs |= {"B": normal(*states), "C": normal(*states), "D": normal(channels)}
    if gated:
        inputs |= {"dt_bias": normal(channels), "z": 2 * normal(*sequence)}
    else:
        inputs["dt"] = inputs["dt"].abs() / 2
    if half:
        inputs |= {k: v.bfloat16() for k, v in inputs.items() if k in ("x", "dt", "B", "C", "z")}
    state, last_grad = normal(batch, channels, n), normal(batch, channels, n)
    marks = torch.rand(batch, length, generator=g) < 0.2 if starts else None
    upstream = normal(*sequence).to(inputs["x"].dtype)
    packed = ScanInputs(**inputs)
    y, last, borders = kernel.forward(packed, marks, state, keep=True)
    grads = kernel.backward(packed, marks, borders, upstream, last_grad)

    exact = {k: v.double().requires_grad_() for k, v in (inputs | {"state": state}).items()}
    want = selective_scan(**exact, starts=marks, backend="ref")
    wanted = torch.autograd.grad(want, list(exact.values()), [upstream.double(), last_grad.double()])
    results = {"y": (y, want[0]), "last": (last, want[1])}
    results |= {k: (getattr(grads, k), w) for k, w in zip(exact, wanted, strict=True)}
    return {
        name: [float((got.double() - w).detach().abs().max()), float(w.detach().abs().max())]
        for name, (got, w) in results.items()
    }


if __name__ == "__main__":
    main()
