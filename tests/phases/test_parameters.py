"""`phase=parameters`: the committed counts, to the last parameter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose
from rich.console import Console

from nano_think.phases.parameters import configured_network, parts, run
from nano_think.phases.run import Run

ROOT = Path(__file__).resolve().parents[2]
D, ENTRY = 384, 384 * 384
# the arithmetic of each component at size=seed, without the entry adaptors of the experts and without memory
PLAIN = {
    "embedding": 32_000 * D,
    "mla": 528_896,
    "router": 1_155,
    "experts.transformer": 14_160_768,
    "experts.diffuser": 6_307_584,
    "experts.state_space": 5_785_728,
}
SLOTS = D + D + 6


@pytest.fixture
def run_of(tmp_path) -> Callable[..., Run]:
    """`run_of("size=tiny")`: a run of phase=parameters with its folder."""

    def make(*overrides: str) -> Run:
        cfg = compose("config", ["phase=parameters", *overrides])
        return Run(cfg, list(overrides), tmp_path, Console(quiet=True))

    return make


def report(made: Run) -> dict:
    run(made)
    return json.loads((made.dir / "parameters.json").read_text())


def test_counts_at_seed_size_are_the_arithmetic(run_of):
    counted = report(run_of("size=seed"))
    adaptors = {name: ENTRY * name.startswith("experts.") for name in PLAIN}
    want = {name: count + adaptors[name] for name, count in PLAIN.items()}
    assert counted["components"] == want | {"mla": PLAIN["mla"] + SLOTS, "(own)": 3}
    assert counted["total"] == counted["trainable"] == sum(want.values()) + SLOTS + 3 == 39_515_276
    here = {name.split(":")[0]: value for name, value in counted["optional"].items() if value["here"]}
    assert here == {"memory": {"parameters": SLOTS, "here": True}}


@pytest.mark.parametrize("size", ["tiny", "small", "seed", "budget30"])
def test_parts_add_up_to_their_components(run_of, size):
    made = run_of(f"size={size}")
    counted = report(made)
    assert sum(counted["parts"].values()) == counted["total"]
    for name, count in counted["components"].items():
        inside = [n for part, n in counted["parts"].items() if f"{part}.".startswith(f"{name}.")]
        assert name == "(own)" or sum(inside) == count, name
    network = configured_network(made, "cpu")
    assert sum(parameter.numel() for parameter in network.parameters()) == counted["total"]
    assert (counted["total"] < 30_000_000) == (size != "seed")


def test_optional_parts_say_what_they_would_add(run_of):
    default = report(run_of("size=tiny"))
    changes = {
        "memory": ["model.retrieval.k=0"],
        "input of the earlier estimate": ["++experts.diffuser.self_cond=true"],
        "read-out": ["experts.diffuser.target=next_embed"],
    }
    for name, override in changes.items():
        (key,) = (option for option in default["optional"] if name in option)
        changed = report(run_of("size=tiny", *override))
        before, after = default["optional"][key], changed["optional"][key]
        assert before["here"] is not after["here"]
        difference = before["parameters"] * (1 if after["here"] else -1)
        assert changed["total"] - default["total"] == difference


def test_private_tables_and_single_experts(run_of):
    table = 512 * 64
    private = configured_network(run_of("size=tiny", "expert.embed=own"))
    assert dict(parts(private))["tables.diffuser"] == table
    counted = report(run_of("size=tiny", "expert=state_space"))
    assert list(counted["components"]) == ["embedding", "expert"]
    assert counted["components"]["embedding"] == table


def test_the_committed_table_is_what_the_phase_writes(run_of):
    committed = (ROOT / "docs" / "parameters.md").read_text()
    for size in ("seed", "budget30"):
        made = run_of(f"size={size}")
        run(made)
        assert (made.dir / "parameters.md").read_text() in committed
