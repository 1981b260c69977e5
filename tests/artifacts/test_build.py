from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from nano_think.artifacts.build import build, complete, locate, signature_defaults
from nano_think.experts.diffuser import DiffuserExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.mla import ExpertRouter, MultiHeadLatentAttention
from nano_think.model import NanoThink

TRANSFORMER = "nano_think.experts.transformer.TransformerExpert"
ATTENTION = "nano_think.nn.mixers.attention.CausalSelfAttention"


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "builtins.eval",
        "subprocess.run",
        "nano_thinker.evil.Class",
        # functions of our own that write files would be enough to plant a program
        "nano_think.files.atomic_write",
        "nano_think.files.atomic_dir",
        "nano_think.data.prepare.prepare_corpus",
        "nano_think.vector_store.VectorStore",
        "nano_think.phases.run.versions",
        # private names, and what our modules import from elsewhere
        "nano_think.model._table",
        "nano_think.files.os.system",
        "nano_think.files.shutil.rmtree",
        "nano_think.phases.run.subprocess.run",
        "nano_think.artifacts.build.importlib.import_module",
        "nano_think.model.__builtins__",
        "torch.nn.modules.module.torch.load",
        "torch.nn.functional.torch.load",
        "torch.nn.modules.__builtins__",
        # no network is a function; nothing of torch's functions is needed to build one
        "torch.nn.functional.relu",
        "torch.nn.init.normal_",
        "torch.nn.utils.clip_grad_norm_",
        "torch.hub.load",
        # of torch.nn, layers alone: nothing that starts processes, rewrites classes or needs another import
        "torch.nn.parallel.DistributedDataParallel",
        "torch.nn.utils.parametrize.ParametrizationList",
        "torch.nn.quantized.Linear",
        "torch.nn.attention.flex_attention.BlockMask",
        # what is no dotted name at all
        "nano_think.experts..transformer",
        "nano_think.experts.transformer.TransformerExpert.forward",
        "nano_think.experts.transformer.TransformerExpert.__init__",
        "nano_think.experts.transformer.TransformerExpert\n",
        "nano_think.experts.transformer\x00.TransformerExpert",
        "nano_think.nn.leaks.leaks",
        "nano_think.\u0435xperts.transformer.TransformerExpert",
        None,
        7,
        ["torch.nn.Linear"],
        {"_target_": "torch.nn.Linear"},
        "nano_think",
        "torch.nn",
        "",
    ],
)
def test_what_is_no_network_class_of_ours_or_of_torch_is_refused(path):
    with pytest.raises(ValueError):
        locate(path)


def test_unknown_names_are_refused_as_such():
    for path in ("nano_think.experts.transformer.Missing", "nano_think.experts.missing.Transformer"):
        with pytest.raises(ValueError, match="there is no"):
            locate(path)


def test_what_is_refused_is_not_even_imported(monkeypatch):
    """A module runs when it is imported: the name alone decides."""
    imported = []
    monkeypatch.setattr("nano_think.artifacts.build.importlib.import_module", imported.append)
    for path in (
        "nano_think.phases.run.Run",
        "torch.nn.parallel.DataParallel",
        "os.path.join",
        "nano_think.a.B",
    ):
        with pytest.raises(ValueError, match="outside"):
            locate(path)
    assert imported == []


@pytest.mark.parametrize(
    "more",
    [
        {"_args_": [1]},
        {"_weight": None},
        {"_partial_": "yes"},
        {"__class__": "os.system"},
        {"mixer": {"_partial_": True, "num_heads": 2}},
        {7: 1},
    ],
)
def test_marks_without_a_meaning_and_private_arguments_are_refused(more):
    with pytest.raises(ValueError, match="has no meaning in a spec"):
        build({"_target_": TRANSFORMER, "d_model": 8, **more})


def test_nothing_but_network_classes_is_called_at_any_depth(tmp_path):
    file = tmp_path / "planted"
    planted = {"_target_": "nano_think.files.atomic_write", "path": str(file), "data": "x"}
    for spec in (
        {"_target_": TRANSFORMER, "mixer": planted},
        {"_target_": TRANSFORMER, "mixer": {**planted, "_partial_": True}},
        {"a": [{"b": planted}]},
    ):
        with pytest.raises(ValueError, match="outside"):
            build(spec)
    assert not file.exists()


def test_network_classes_are_found():
    assert locate(TRANSFORMER) is TransformerExpert
    assert locate("torch.nn.Embedding") is torch.nn.Embedding


def test_nested_specs_become_networks():
    spec = {
        "_target_": TRANSFORMER,
        "d_model": 16,
        "num_layers": 1,
        "dropout": 0.0,
        "ffn_dim": 24,
        "mixer": {"_target_": ATTENTION, "_partial_": True, "num_heads": 4},
    }
    torch.manual_seed(0)
    built = build(json.loads(json.dumps(spec)))
    torch.manual_seed(0)
    mixer = partial(locate(ATTENTION), num_heads=4)
    by_hand = TransformerExpert(16, 1, ffn_dim=24, dropout=0.0, mixer=mixer)
    for (name, one), (_, other) in zip(built.state_dict().items(), by_hand.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_build_hands_further_arguments_to_the_outermost_call_and_keeps_plain_values():
    assert build({"_target_": TRANSFORMER, "num_layers": 1, "num_heads": 2}, d_model=8).d_model == 8
    assert build({"a": [1, {"b": None}], "c": "text"}) == {"a": [1, {"b": None}], "c": "text"}


@pytest.mark.parametrize("kind", [TransformerExpert, DiffuserExpert, MultiHeadLatentAttention, ExpertRouter])
def test_complete_writes_every_default_out_and_builds_the_same(kind):
    spec = {"_target_": f"{kind.__module__}.{kind.__name__}", "d_model": 24}
    full = complete(spec)
    assert set(full) - {"_target_"} == set(kind.__init__.__annotations__) - {"return"}
    assert full["d_model"] == 24
    assert complete(full) == full
    assert json.loads(json.dumps(full)) == full
    torch.manual_seed(0)
    one = build(spec).state_dict()
    torch.manual_seed(0)
    other = build(full).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_given_values_win_over_defaults_at_every_depth():
    spec = {
        "_target_": "nano_think.model.NanoThink",
        "experts": {"a": {"_target_": TRANSFORMER, "d_model": 8, "num_heads": 2}},
        "vocab_size": 11,
        "d_model": 8,
    }
    full = complete(spec)
    assert full["experts"]["a"]["num_heads"] == 2
    assert full["experts"]["a"]["num_layers"] == signature_defaults(TransformerExpert)["num_layers"]
    assert full["fusion"] == "hidden"
    assert isinstance(build(full), NanoThink)
