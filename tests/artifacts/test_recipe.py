from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nano_think.artifacts import recipe as module
from nano_think.artifacts.recipe import COMPLETE_MARK, Recipe

CORPUS = Recipe("corpus", {"source": "abc"})
EXPERT = Recipe(
    "transformer", {"lr": 1e-3, "net": {"layers": 2, "heads": [1, 2]}, "own": None}, {"data": CORPUS}
)


@pytest.mark.parametrize(
    "other",
    [
        replace(EXPERT, kind="state_space"),
        replace(EXPERT, spec=EXPERT.spec | {"lr": 1e-4}),
        replace(EXPERT, spec=EXPERT.spec | {"seed": 1}),
        replace(EXPERT, spec=EXPERT.spec | {"own": False}),
        replace(EXPERT, spec=EXPERT.spec | {"net": {"layers": 2, "heads": [2, 1]}}),
        replace(EXPERT, spec=EXPERT.spec | {"net": {"layers": "2", "heads": [1, 2]}}),
        replace(EXPERT, needs={}),
        replace(EXPERT, needs={"text": CORPUS}),
        replace(EXPERT, needs={"data": replace(CORPUS, spec={"source": "abd"})}),
        replace(EXPERT, needs={"data": CORPUS, "teacher": EXPERT}),
    ],
)
def test_every_part_changes_the_hash(other):
    assert other.hash != EXPERT.hash


def test_order_of_keys_and_the_command_do_not():
    spec = dict(reversed(EXPERT.spec.items()))
    assert list(spec) != list(EXPERT.spec)
    assert replace(EXPERT, spec=spec, command="python train.py").hash == EXPERT.hash


def test_a_change_two_generations_up_is_seen():
    one = Recipe("mla", {}, {"expert": EXPERT})
    far = replace(CORPUS, spec={"source": "other"})
    assert one.hash != Recipe("mla", {}, {"expert": replace(EXPERT, needs={"data": far})}).hash


def test_the_format_of_the_files_changes_the_hash(monkeypatch):
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    assert replace(EXPERT).hash != EXPERT.hash


def test_existence_is_that_of_a_complete_folder(tmp_path):
    path = EXPERT.path(tmp_path)
    assert path == tmp_path / "transformer" / EXPERT.hash
    path.mkdir(parents=True)
    assert not EXPERT.exists(tmp_path)
    (path / COMPLETE_MARK).write_text("{}")
    assert EXPERT.exists(tmp_path)


def test_the_lineage_names_every_ancestor_as_plain_values():
    lineage = Recipe("mla", {"stage": "7a"}, {"expert": EXPERT}).lineage()
    assert json.loads(json.dumps(lineage)) == lineage
    assert lineage["needs"]["expert"]["hash"] == EXPERT.hash
    assert lineage["needs"]["expert"]["needs"]["data"]["spec"] == {"source": "abc"}
