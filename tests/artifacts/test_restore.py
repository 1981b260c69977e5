from __future__ import annotations

import resource
import time

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from nano_think.artifacts.build import build
from nano_think.artifacts.restore import restore
from nano_think.experts.transformer import TransformerExpert

D = 16
TRANSFORMER = {
    "_target_": "nano_think.experts.transformer.TransformerExpert",
    "d_model": D, "num_layers": 1, "num_heads": 2, "ffn_dim": 32,
}  # fmt: skip
DIFFUSER = {
    "_target_": "nano_think.experts.diffuser.DiffuserExpert",
    "d_model": D, "num_layers": 1, "num_heads": 2, "ffn_dim": 32, "train_T": 20,
}  # fmt: skip
ABSURD = 10**12


def weights_of(spec):
    torch.manual_seed(0)
    return build(spec).state_dict()


def anything(network) -> bool:
    return True


def test_a_network_comes_back_with_its_weights():
    weights = weights_of(TRANSFORMER)
    network = restore(TRANSFORMER, weights, lambda made: isinstance(made, TransformerExpert))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))


@pytest.mark.parametrize(
    ("spec", "more"),
    [
        (TRANSFORMER, {"num_layers": ABSURD}),
        (TRANSFORMER, {"d_model": ABSURD}),
        (TRANSFORMER, {"ffn_dim": ABSURD}),
        (TRANSFORMER, {"d_model": 10**30}),
        (DIFFUSER, {"max_positions": ABSURD}),
        (DIFFUSER, {"train_T": ABSURD}),
        (DIFFUSER, {"num_layers": ABSURD}),
        ({"_target_": "torch.nn.Embedding", "num_embeddings": ABSURD, "embedding_dim": D}, {}),
        # rows that fit into memory and are far more than the weights hold
        ({"_target_": "torch.nn.Embedding", "num_embeddings": 10**8, "embedding_dim": D}, {}),
        ({"_target_": "torch.nn.Transformer", "d_model": D, "nhead": 2, "num_encoder_layers": ABSURD}, {}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_absurd_sizes_are_refused_before_memory_is_asked_for(spec, more):
    weights = weights_of(spec) if more else {"weight": torch.ones(4, D)}
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError):
        restore({**spec, **more}, weights, anything)
    assert time.process_time() - started < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize(
    "more",
    [
        {"num_heads": 0},
        {"num_heads": "two"},
        {"d_model": -1},
        {"d_model": None},
        {"d_model": [16]},
        {"d_model": 16.5},
        {"mixer": 5},
        {"mixer": {"_target_": "torch.nn.Identity"}},
        {"mixer": {"_target_": "torch.nn.Identity", "_partial_": True}},
        {"ffn": {"a": 1}},
        {"dropout": "much"},
        {"device": "cuda"},
        {"_target_": "torch.nn.Identity"},
        {"_partial_": True},
    ],
)
def test_whatever_a_constructor_makes_of_strange_arguments_is_one_kind_of_error(more):
    with pytest.raises(ValueError):
        restore({**TRANSFORMER, **more}, weights_of(TRANSFORMER), lambda made: isinstance(made, nn.Module))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w | {"entry.adaptor.weight": torch.ones(D, D + 1)}, "the spec says"),
        (lambda w: w | {"entry.adaptor.weight": torch.ones(D, D).double()}, "float64"),
        (lambda w: w | {"extra": torch.ones(1)}, "1 tensors are not the model's, 'extra'"),
        (lambda w: {n: t for n, t in w.items() if n != "norm.weight"}, "1 tensors are missing"),
    ],
)
def test_weights_that_are_not_those_of_the_spec_are_named(change, said):
    weights = weights_of(TRANSFORMER)
    weights.setdefault("norm.weight", torch.ones(D))
    with pytest.raises(ValueError, match=said):
        restore(TRANSFORMER, change(weights), anything)


@pytest.mark.parametrize(
    "more",
    [
        {"fused_steps": "posterior"},
        {"fused_steps": 0},
        {"fused_steps": 21},
        {"fused_steps": True},
        {"fused_steps": 1 << 63},
        {"noise_seed": -1},
        {"num_heads": -1},
        {"num_heads": 16},
        {"input_scale": 10**30},
        {"ddim_steps": "ten"},
        {"ddim_steps": [10]},
        {"input_scale": "large"},
        {"input_scale": None},
        {"bidirectional": "yes"},
        {"schedule": "square"},
        {"schedule": 1},
        {"max_positions": 64.5},
    ],
    ids=str,
)
def test_what_would_fail_when_the_network_is_asked_fails_when_it_is_restored(more):
    """No constructor of a network needs these; the weights fit."""
    weights = weights_of(DIFFUSER)
    restore(DIFFUSER, weights, anything)
    with pytest.raises(ValueError):
        restore({**DIFFUSER, **more}, weights, anything)


def test_another_kind_of_network_is_refused():
    with pytest.raises(ValueError, match="describes a TransformerExpert"):
        restore(TRANSFORMER, weights_of(TRANSFORMER), lambda made: False)


def test_nothing_is_counted_once_it_is_over():
    before = (
        len(torch_module._global_parameter_registration_hooks),
        len(torch_module._global_module_registration_hooks),
    )
    with pytest.raises(ValueError):
        restore({**TRANSFORMER, "num_layers": ABSURD}, weights_of(TRANSFORMER), anything)
    after = (
        len(torch_module._global_parameter_registration_hooks),
        len(torch_module._global_module_registration_hooks),
    )
    assert before == after
