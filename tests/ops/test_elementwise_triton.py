"""The elementwise kernels for GPUs without one: values in Triton's interpreter, and that they compile for GPUs.

Run as a script, this file is what the interpreter runs: it has to be asked for before Triton is imported.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nano_think.ops import elementwise

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

WIDTHS = (1, 3, 16, 50, 384)


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """Of every result: the largest error, relative to the largest value of the formula in fp64."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    if "only 0-dimensional arrays" in done.stderr:
        pytest.skip("the interpreter of Triton before 3.7 does not work with NumPy from 2.4 on")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_fp32_equals_the_formulas(errors: dict[str, float]) -> None:
    """2e-6 of the largest value."""
    wrong = {name: error for name, error in errors.items() if "half" not in name and not error <= 2e-6}
    assert not wrong


def test_bf16_is_rounded_once(errors: dict[str, float]) -> None:
    """2^-7 of the largest value: the interpreter cuts off what a GPU rounds."""
    assert sum("half" in name for name in errors) > 20
    assert not {name: error for name, error in errors.items() if "half" in name and not error <= 2**-7}


KERNELS = {
    "_head_losses": {"PIECE": 4096},
    "_gated_silu": {"TILE": 2048},
    "_gated_silu_gradients": {"TILE": 2048},
    "_norm": {"GAIN": True, "R": 4, "W": 512},
    "_norm_gradients": {"GAIN": True, "R": 4, "W": 512},
    "_rotate": {"STEP": 1, "R": 64, "W": 32},
}
WIDE = ("losses", "inverse", "cos", "sin", "weight", "d_weight")
ACTIVATIONS = ("z", "gate", "up", "out", "upstream", "d_gate", "d_up", "x", "dx")


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_gpus_that_are_not_here(name: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nano_think.ops import elementwise_triton

    kernel = getattr(elementwise_triton, name)
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("eps", "sign"), "fp32")
    types |= dict.fromkeys(WIDE, "*fp32") | dict.fromkeys(ACTIVATIONS, "*bf16") | {"labels": "*i64"}
    types |= dict.fromkeys(KERNELS[name], "constexpr")
    signature = {argument: types[argument] for argument in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=KERNELS[name])
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def test_a_wrong_kernel_is_found_out() -> None:
    from nano_think.ops import elementwise_cpp

    class Wrong:
        """The kernels for CPUs with a norm that forgets its root."""

        def __getattr__(self, name: str) -> object:
            return getattr(elementwise_cpp, name)

        @staticmethod
        def rms_norm(x, weight, eps, dtype):
            return x * weight, torch.ones(len(x), 1)

    with pytest.raises(RuntimeError, match="a norm is off by"):
        elementwise.check(NormOnly(Wrong()), torch.device("cpu"))


class NormOnly:
    """Kernels whose other results are of no interest."""

    def __init__(self, kernels: object) -> None:
        self.rms_norm = kernels.rms_norm

    def __getattr__(self, name: str) -> object:
        def nothing(*arguments: object) -> object:
            zeros = torch.zeros_like(arguments[0])
            return (zeros, torch.zeros(zeros.shape[-1])) if name.endswith("gradients") else zeros

        return nothing


def cases(kernels: object) -> dict[str, float]:
    """Errors by name and width."""
    found: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def note(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
        found[name] = float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30))

    for name, got, want in elementwise._results(kernels, draw):
        note(name, got, want.double())
    for half in (False, True):
        for width in WIDTHS:
            ending = f"{width}{' half' if half else ''}"
            _norm_cases(kernels, width, half, ending, draw, note)
            _silu_cases(kernels, width, half, ending, draw, note)
            _head_cases(kernels, 40 * width, half, ending, draw, note)
        _rope_cases(kernels, half, draw, note)
    _odd_logits(kernels)
    return found


def _cast(half: bool, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.bfloat16() if half else tensor for tensor in tensors]


def _norm_cases(kernels, width, half, ending, draw, note):
    x, upstream = _cast(half, draw(3, 7, width), draw(3, 7, width))
    for weight in (None, draw(width)):
        wide = x.double().requires_grad_()
        gain = None if weight is None else weight.double().requires_grad_()
        normed = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        want = normed if gain is None else normed * gain
        grads = torch.autograd.grad(want, [wide] if gain is None else [wide, gain], upstream.double())
        out, inverse = kernels.rms_norm(x, weight, 1e-6, x.dtype)
        dx, d_weight = kernels.rms_norm_gradients(x, weight, inverse, upstream)
        gained = f"{'gain ' if weight is not None else ''}{ending}"
        note(f"norm {gained}", out, want.detach())
        # that of a single coordinate is the difference of two nearly equal terms
        if width > 1:
            note(f"d norm {gained}", dx, grads[0])
        if weight is not None:
            note(f"d gain {ending}", d_weight, grads[1])


def _silu_cases(kernels, width, half, ending, draw, note):
    gate, up, upstream = _cast(half, 3 * draw(5, width), draw(5, width), draw(5, width))
    wide = [tensor.double().requires_grad_() for tensor in (gate, up)]
    want = F.silu(wide[0]) * wide[1]
    grads = torch.autograd.grad(want, wide, upstream.double())
    note(f"silu {ending}", kernels.gated_silu(gate, up), want.detach())
    for name, got, wanted in zip(
        ("gate", "up"), kernels.gated_silu_gradients(gate, up, upstream), grads, strict=True
    ):
        note(f"d {name} {ending}", got, wanted)


def _head_cases(kernels, width, half, ending, draw, note):
    (z,) = _cast(half, 4 * draw(6, width))
    labels = torch.tensor([0, width - 1, width // 2, -100, width // 3, -100])
    wide = z.double()
    want = F.cross_entropy(wide, labels, reduction="none")
    hot = F.one_hot(labels.clamp_min(0), width) * (labels >= 0).unsqueeze(1)
    d_want = (wide.softmax(-1) - hot) * (labels >= 0).unsqueeze(1)
    note(f"losses {width}", kernels.softmax_minus_one_hot(z, labels), want)
    note(f"d logits {ending}", z, d_want)


def _rope_cases(kernels, half, draw, note):
    for batch, interleaved in ((1, False), (2, True)):
        (x,) = _cast(half, draw(2, 5, 3, 12).transpose(1, 2))
        cos, sin = draw(batch, 1, 5, 6), draw(batch, 1, 5, 6)
        first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
        for sign in (1, -1):
            a, b = first.double() * cos - sign * second.double() * sin, None
            b = second.double() * cos + sign * first.double() * sin
            want = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
            name = f"rope {batch} {interleaved} {sign}{' half' if half else ''}"
            note(name, kernels.rotate(x, cos, sin, interleaved, sign), want)


def _odd_logits(kernels) -> None:
    """Far apart, far from zero, with tokens ruled out, and not a number."""
    z = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -3e4, -3e4], [5.0, -math.inf, 4.0]])
    labels = torch.tensor([1, 2, 0])
    want = F.cross_entropy(z, labels, reduction="none")
    torch.testing.assert_close(kernels.softmax_minus_one_hot(z, labels), want)
    torch.testing.assert_close(z[0], torch.tensor([1.0, -1.0, 0.0]))
    nan = torch.tensor([[1.0, math.nan, 2.0]])
    assert kernels.softmax_minus_one_hot(nan, torch.tensor([0])).isnan().all()


def main() -> None:
    from nano_think.ops import elementwise_triton

    print(json.dumps(cases(elementwise_triton)))


if __name__ == "__main__":
    main()
