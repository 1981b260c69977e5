from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nano_think.nn.norm import RMSNorm, rms_norm_reference


def test_equals_the_formula_in_fp64(randomise) -> None:
    norm = randomise(RMSNorm(7, eps=1e-3))
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    wide = x.double()
    expected = wide / (wide.pow(2).sum(-1, keepdim=True) / 7 + 1e-3).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.6e-2)])
def test_equals_hugging_face_llama_with_gradients(randomise, dtype, tolerance) -> None:
    ours = randomise(RMSNorm(16)).to(dtype)
    theirs = LlamaRMSNorm(16, eps=1e-6).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    one = (3 * torch.randn(4, 16, generator=torch.Generator().manual_seed(1))).to(dtype).requires_grad_()
    two = one.detach().clone().requires_grad_()
    out, expected = ours(one), theirs(two)
    assert out.dtype == dtype
    close = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(out, expected, **close)
    upstream = torch.randn(4, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(one.grad, two.grad, **close)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, **close)


def test_gain_starts_at_one_and_can_be_left_out() -> None:
    assert torch.equal(RMSNorm(5).weight, torch.ones(5))
    assert not list(RMSNorm(5, gain=False).parameters())
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(RMSNorm(5)(x), RMSNorm(5, gain=False)(x))


def test_scale_of_the_input_does_not_matter_also_where_squares_overflow() -> None:
    norm = RMSNorm(8)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm(1000 * x), norm(x), atol=1e-5, rtol=0)
    half = (300 * x).half()
    assert torch.isinf((half * half).sum())
    torch.testing.assert_close(norm(half).float(), norm(x), atol=2e-3, rtol=0)


def test_zeros_stay_zeros_with_finite_gradients() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out = RMSNorm(8)(x)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 8))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("gain", [True, False])
def test_equals_the_reference_with_gradients(randomise, dtype, tolerance, gain) -> None:
    """fp32 to 1e-5; bf16 to 1 % of the norm of each result, against the reference in fp32."""
    norm = randomise(RMSNorm(16, gain=gain)).to(dtype)
    x, upstream = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    leaves = [x.requires_grad_(), *norm.parameters()]
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    expected = rms_norm_reference(wide[0], wide[1] if gain else None, norm.eps)
    wanted = [expected, *torch.autograd.grad(expected, wide, upstream.float())]
    out = norm(x)
    found = [out, *torch.autograd.grad(out, leaves, upstream)]
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        assert (one.float() - other).norm() <= tolerance * other.norm()


def test_another_dtype_is_one_rounding_of_the_same() -> None:
    norm = RMSNorm(8)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = norm(x, torch.bfloat16)
    assert torch.equal(out, norm(x).bfloat16())
    assert torch.autograd.grad(out.float().sum(), x)[0].dtype == torch.float32


def test_another_width_is_an_error_also_where_a_compiled_kernel_computes() -> None:
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(RuntimeError, match="size of tensor"):
            RMSNorm(16).to(dtype)(torch.ones(2, 32, dtype=dtype))
