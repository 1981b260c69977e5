"""Networks without numbers are those with numbers, but for the numbers."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest

from nano_think.artifacts.build import build
from nano_think.artifacts.outline import outlined
from nano_think.ops.diffusion import ScheduleKind

SIZES = {"d_model": 16, "num_layers": 2}
HEADS = {"num_heads": 2, "ffn_dim": 24}
TRANSFORMER = {"_target_": "nano_think.experts.transformer.TransformerExpert", **SIZES, **HEADS}
DIFFUSER = {"_target_": "nano_think.experts.diffuser.DiffuserExpert", **SIZES, **HEADS}
STATE_SPACE = {"_target_": "nano_think.experts.state_space.StateSpaceExpert", **SIZES, "d_inner": 32}
LATENT = {"_target_": "nano_think.nn.mixers.latent_attention.LatentAttention", "num_heads": 2}
SSD = {"_target_": "nano_think.nn.mixers.ssd.SSD", "d_inner": 32, "head_dim": 8}
MLA = {"_target_": "nano_think.mla.MultiHeadLatentAttention", "d_model": 16, "num_heads": 2, "memory": True}
FUSED = {
    "_target_": "nano_think.model.NanoThink",
    "experts": {"transformer": TRANSFORMER, "diffuser": DIFFUSER, "state_space": STATE_SPACE},
    "vocab_size": 50,
    "d_model": 16,
}
SPECS = {
    "transformer": TRANSFORMER,
    "latent attention": TRANSFORMER | {"mixer": LATENT | {"_partial_": True}},
    "state space": STATE_SPACE,
    "ssd": STATE_SPACE | {"mixer": SSD | {"_partial_": True}},
    **{f"diffuser, {schedule}": DIFFUSER | {"schedule": schedule} for schedule in get_args(ScheduleKind)},
    "diffuser, next_embed": DIFFUSER | {"target": "next_embed"},
    "fused": FUSED | {"mla": MLA},
    "fused, memory apart": FUSED | {"mla": MLA | {"slot_reader": "own"}},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_shapes_types_and_names_are_the_same(spec) -> None:
    whole = build(spec)
    with outlined():
        outline = build(spec)
    for part in ("named_parameters", "named_buffers"):
        one, other = (dict(getattr(network, part)()) for network in (outline, whole))
        assert all(tensor.is_meta for tensor in one.values())
        assert not any(tensor.is_meta for tensor in other.values())
        assert {name: (t.shape, t.dtype) for name, t in one.items()} == {
            name: (t.shape, t.dtype) for name, t in other.items()
        }


def test_no_compiler_is_imported_for_any_of_them() -> None:
    code = (
        "import sys\n"
        "from nano_think.artifacts.build import build\n"
        "from nano_think.artifacts.outline import outlined\n"
        "with outlined():\n"
        f"    [build(spec) for spec in {list(SPECS.values())!r}]\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
