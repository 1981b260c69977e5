"""A frozen expert passes gradients on and keeps nothing that only gradients of its weights would need."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nano_think.experts.diffuser import DiffuserExpert
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.ops.layout import Layout

D, LENGTH = 32, 160  # longer than a block of attention
# Of these products alone something else needs the input too: the scan that runs over it, or compiled attention,
# whose output it is and which computes its gradients from that.
SHARED = {StateSpaceExpert: {"x_proj"}, TransformerExpert: {"out_proj"}, DiffuserExpert: {"out_proj"}}


@pytest.fixture(params=["transformer", "diffuser", "state_space"])
def expert(request, randomise):
    torch.manual_seed(0)
    made = {
        "transformer": lambda: TransformerExpert(D, 2, 2, 64, dropout=0.0),
        "diffuser": lambda: DiffuserExpert(D, 2, 2, 64, train_T=20, dropout=0.0),
        "state_space": lambda: StateSpaceExpert(D, 2, 48, 4, dropout=0.0),
    }[request.param]()
    randomise(made)
    if isinstance(made, DiffuserExpert):
        made.fit_statistics(torch.randn(50, D))
    return made


def _layout():
    positions = torch.cat((torch.arange(100), torch.arange(LENGTH - 100))).unsqueeze(0)
    return Layout(positions, (torch.arange(LENGTH) >= 100).long().unsqueeze(0))


def _run(expert, half):
    """Gradient of the input, names of products whose input is kept, bytes that are kept beside parameters."""
    x = torch.randn(1, LENGTH, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    inputs, kept, hooks = [], {}, []
    for name, module in expert.named_modules():
        if isinstance(module, nn.Linear) and "time" not in name and "modulation" not in name:
            hooks.append(
                module.register_forward_pre_hook(lambda m, args, n=name: inputs.append((n, args[0])))
            )

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with saved, torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = expert(x, _layout())
    for hook in hooks:
        hook.remove()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*expert.parameters(), *expert.buffers())}
    held = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own)
    names = {name for name, tensor in inputs if tensor.untyped_storage().data_ptr() in kept}
    out.float().square().sum().backward()
    return x.grad, names, held


@pytest.mark.parametrize("half", [False, True])
def test_inputs_of_products_are_kept_for_trained_weights_alone(expert, half):
    gradient, names, held = _run(expert, half)
    assert len(names) > 5
    expert.zero_grad()
    frozen_gradient, frozen_names, frozen_held = _run(expert.requires_grad_(False), half)
    assert {name.rpartition(".")[2] for name in frozen_names} <= SHARED[type(expert)]
    assert frozen_held < 0.9 * held
    assert all(p.grad is None for p in expert.parameters())
    tolerance = 2e-2 if half else 1e-5
    assert (frozen_gradient - gradient).abs().max() <= tolerance * gradient.abs().max()
    assert gradient.abs().max() > 0
