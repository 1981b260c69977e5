"""Chunked cross-entropy against the plain formula, values and gradients."""

from __future__ import annotations

import pytest
import torch

from nano_think.ops import cross_entropy as module
from nano_think.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


def problem(rows: int = 3, length: int = 7, d: int = 5, vocab: int = 11):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, length, d, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, d, generator=generator, requires_grad=True)
    labels = torch.randint(vocab, (rows, length), generator=generator)
    labels[0, 2] = labels[2, 4:] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("scaled", ["alike", "apart"])
@pytest.mark.parametrize("chunk", [1, 4, 17, 2048])
def test_values_and_gradients_equal_the_reference(monkeypatch, chunk, scaled, uniform):
    """Also where the softmax takes three tokens of a chunk at a time."""
    hidden, weight, labels = problem()
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 3 * len(weight))
    scale = torch.linspace(0.5, 2.0 if scaled == "apart" else 0.5, labels.numel()).view(labels.shape)
    mine = linear_cross_entropy(hidden, weight, labels, chunk, uniform)
    reference = linear_cross_entropy_reference(hidden, weight, labels)
    torch.testing.assert_close(mine, reference)
    got = torch.autograd.grad((mine * scale).sum(), (hidden, weight))
    want = torch.autograd.grad((reference * scale).sum(), (hidden, weight))
    torch.testing.assert_close(got, want)


def test_reference_is_the_definition():
    hidden, weight, labels = problem()
    probability = (hidden @ weight.T).softmax(-1)
    nll = linear_cross_entropy_reference(hidden, weight, labels)
    assert nll[1, 3].item() == pytest.approx(-probability[1, 3, labels[1, 3]].log().item(), rel=1e-5)
    assert (nll[labels == -100] == 0).all()


def test_without_any_label_the_loss_is_zero_and_differentiable():
    hidden, weight, labels = problem()
    nll = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    assert nll.shape == labels.shape
    assert (nll == 0).all()
    (gradient,) = torch.autograd.grad(nll.sum(), hidden)
    assert (gradient == 0).all()


def test_flat_tokens_and_bf16_hidden_give_fp32():
    hidden, weight, labels = problem()
    nll = linear_cross_entropy(hidden.detach().bfloat16().flatten(0, 1), weight, labels.flatten(), chunk=4)
    assert nll.dtype == torch.float32
    rounded = linear_cross_entropy_reference(hidden.detach().bfloat16().float(), weight, labels)
    torch.testing.assert_close(nll.view(labels.shape), rounded)


def test_no_tensor_of_all_logits_is_saved():
    """Forward and backward of 64 tokens in chunks of 8 never save or make a matrix of more than 8 x V."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(64, 4, generator=generator, requires_grad=True)
    weight = torch.randn(50, 4, generator=generator, requires_grad=True)
    labels = torch.randint(50, (64,), generator=generator)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, labels, chunk=8).sum().backward()
    assert largest == 8 * 50


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient_and_does_not_change_the_other(frozen):
    hidden, weight, labels = problem()
    want = dict(
        zip(
            ("hidden", "weight"),
            torch.autograd.grad(
                linear_cross_entropy_reference(hidden, weight, labels).sum(), (hidden, weight)
            ),
            strict=True,
        )
    )
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels).sum().backward()
    assert (hidden if frozen == "hidden" else weight).grad is None
    moving = "weight" if frozen == "hidden" else "hidden"
    torch.testing.assert_close((weight if moving == "weight" else hidden).grad, want[moving])


def test_under_bf16_autocast_gradients_stay_close_and_of_the_parameter_dtype():
    hidden, weight, labels = problem(rows=8, length=16, d=32, vocab=64)
    with torch.autocast("cpu", torch.bfloat16):
        mine = linear_cross_entropy(hidden, weight, labels)
    assert mine.dtype == torch.float32
    got = torch.autograd.grad(mine.sum(), (hidden, weight))
    want = torch.autograd.grad(linear_cross_entropy_reference(hidden, weight, labels).sum(), (hidden, weight))
    for one, other in zip(got, want, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


def test_logits_beyond_the_range_of_exp_stay_exact():
    hidden, weight, labels = problem()
    hidden = (300 * hidden).detach().requires_grad_()
    mine = linear_cross_entropy(hidden, weight, labels)
    reference = linear_cross_entropy_reference(hidden, weight, labels)
    assert reference.max() > 200
    torch.testing.assert_close(mine, reference)
    got = torch.autograd.grad(mine.sum(), (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(reference.sum(), (hidden, weight)))


def test_the_loss_is_the_same_with_and_without_a_backward_pass():
    hidden, weight, labels = problem()
    with torch.no_grad():
        scored = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), scored)


def test_backward_twice_gives_the_same():
    hidden, weight, labels = problem()
    loss = linear_cross_entropy(hidden, weight, labels).sum()
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(once, torch.autograd.grad(loss, (hidden, weight)), atol=0, rtol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_of_a_sum_is_found_without_reading_a_value(monkeypatch, weighted):
    """On a GPU such a read waits for all that was asked of it before; the way for GPUs is taken here."""
    monkeypatch.setattr(module, "_takes_unlabelled", lambda *_: True)
    hidden, weight, labels = problem()
    labels = labels.clamp_min(0)
    scale = torch.linspace(0.5, 2.0, labels.numel()).view(labels.shape) if weighted else torch.tensor(0.25)
    reads = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                reads.append(str(func))
            return func(*args, **(kwargs or {}))

    def total(nll):
        return (nll * scale).sum() if weighted else nll.sum() * scale

    with Watch():
        got = torch.autograd.grad(total(linear_cross_entropy(hidden, weight, labels)), (hidden, weight))
    assert len(reads) == (1 if weighted else 0)  # whether all weigh the same
    want = torch.autograd.grad(
        total(linear_cross_entropy_reference(hidden, weight, labels)), (hidden, weight)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("differentiated", [True, False])
@pytest.mark.parametrize("label", [11, -1, 10**9])
def test_a_label_outside_the_vocabulary_is_an_error(label, differentiated):
    hidden, weight, labels = problem()
    labels[1, 3] = label
    with torch.set_grad_enabled(differentiated), pytest.raises(IndexError, match=f"label {label} is outside"):
        linear_cross_entropy(hidden, weight, labels)


def test_labels_are_int64():
    hidden, weight, labels = problem()
    with pytest.raises(ValueError, match=r"int64, not torch\.int32"):
        linear_cross_entropy(hidden, weight, labels.int())
