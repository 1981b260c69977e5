from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nano_think.artifacts import provenance
from nano_think.artifacts.checkpoint import load_checkpoint
from nano_think.artifacts.recipe import Recipe
from nano_think.errors import UserError
from nano_think.files import hash_json, write_json

COMMITTED = Path(__file__).resolve().parents[1] / "data_files" / "checkpoints" / "schema_0"
TRANSFORMER = Recipe("transformer", {"lr": 1})
FUSED = Recipe("mla_7a", {"seed": 1}, {"transformer": TRANSFORMER})


def _finish(recipe: Recipe, root: Path) -> Path:
    """Give a folder the provenance that a run would give it."""
    folder = recipe.path(root)
    files = provenance.fingerprints(folder)
    made = {**recipe.lineage(root), "content": hash_json(files), "files": files, "result": {}}
    write_json(folder / provenance.FILE, made)
    return folder


@pytest.fixture
def made(tmp_path) -> Path:
    """A root of artefacts with a Transformer and a fused model that names it as its expert."""
    for recipe, source in ((TRANSFORMER, "transformer"), (FUSED, "nano_think")):
        shutil.copytree(COMMITTED / source, recipe.path(tmp_path))
        (recipe.path(tmp_path) / provenance.FILE).unlink()
        _finish(recipe, tmp_path)
    return tmp_path


def _flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_untouched_artefacts_load_where_they_lie_and_elsewhere(made):
    assert load_checkpoint(FUSED.path(made)).provenance["hash"] == FUSED.hash
    shutil.move(FUSED.path(made), made / "published")
    assert load_checkpoint(made / "published").provenance["hash"] == FUSED.hash


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "spec.json",
        "static.json",
        "tokenizer/ranks.tiktoken",
        "tokenizer/tokenizer.json",
        "memory/encoder.safetensors",
        "memory/settings.json",
        "memory/store/CURRENT",
        "memory/store/generation-000001/values.npy",
    ],
)
def test_a_file_that_is_not_the_one_it_was_made_with_is_named(made, file):
    """Also where it still is a file of its kind: a bit of a weight, a blank more."""
    path = FUSED.path(made) / file
    if path.suffix == ".json":
        path.write_text(path.read_text() + " ")
    else:
        _flip(path, -1)
    with pytest.raises(
        UserError, match=rf"{file} is not the file that .* was made with.*make it again.*`make`"
    ):
        load_checkpoint(FUSED.path(made), "make")


def test_weights_of_another_model_of_the_same_shape_are_refused(made):
    other = made / "other"
    shutil.copytree(FUSED.path(made), other)
    _flip(other / "model.safetensors", -1)
    shutil.copy(other / "model.safetensors", FUSED.path(made) / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is not the file"):
        load_checkpoint(FUSED.path(made))


def test_what_it_was_made_from_must_still_be_that(made):
    """An expert trained anew to other weights lies in its place, sound in itself."""
    _flip(TRANSFORMER.path(made) / "expert.safetensors", -1)
    _finish(TRANSFORMER, made)
    load_checkpoint(TRANSFORMER.path(made))
    with pytest.raises(
        UserError, match=rf"transformer {TRANSFORMER.hash} is no longer what mla_7a {FUSED.hash} was"
    ):
        load_checkpoint(FUSED.path(made))
    shutil.rmtree(TRANSFORMER.path(made))
    load_checkpoint(FUSED.path(made))


def test_so_must_what_that_was_made_from(made):
    last = Recipe("mla_7b", {}, {"before": FUSED})
    shutil.copytree(FUSED.path(made), last.path(made))
    (last.path(made) / provenance.FILE).unlink()
    _finish(last, made)
    load_checkpoint(last.path(made))
    _flip(TRANSFORMER.path(made) / "expert.safetensors", -1)
    _finish(TRANSFORMER, made)
    with pytest.raises(
        UserError, match=rf"transformer .* is no longer what mla_7b {last.hash} was made from"
    ):
        load_checkpoint(last.path(made))


def test_a_memory_that_was_put_beside_a_model_is_refused(made):
    shutil.copytree(COMMITTED / "nano_think" / "memory", TRANSFORMER.path(made) / "memory")
    with pytest.raises(UserError, match="does not belong to"):
        load_checkpoint(TRANSFORMER.path(made))


def test_folders_without_hashes_claim_nothing(made):
    """They are from before hashes were kept; as a need they are known by what lies there when they are used."""
    folder = TRANSFORMER.path(made)
    shutil.copy(COMMITTED / "transformer" / provenance.FILE, folder / provenance.FILE)
    _flip(folder / "expert.safetensors", -1)
    load_checkpoint(folder)
    assert provenance.content_of(folder) == hash_json(provenance.fingerprints(folder))


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"files": [1]}',
        b'{"files": {"../x": "a"}}',
        b'{"files": {"/etc/passwd": "a"}}',
        b'{"files": {"spec.json": 1}}',
        b'{"kind": "../..", "hash": "x", "needs": {}}',
        b'{"kind": "a", "hash": ["x"], "needs": {}}',
        b'{"kind": "a", "hash": "x", "needs": [1]}',
        b'{"kind": "a", "hash": "x", "needs": {"b": {"kind": "b", "hash": "y", "needs": {}, "content": 1}}}',
        b'{"a": ' * 20_000,
        b'{"kind": "a", "hash": "x", "needs": {"b": {"kind": "'
        + b"b" * 300
        + b'", "hash": "y", "needs": {}}}}',
        b'{"kind": "a", "hash": "..", "needs": {}}',
    ],
    ids=range(14),
)
def test_what_is_no_provenance_is_damage(made, damage):
    (FUSED.path(made) / provenance.FILE).write_bytes(damage)
    with pytest.raises(UserError, match=r"provenance\.json is damaged .*make it again"):
        load_checkpoint(FUSED.path(made))


@pytest.mark.parametrize("name", ["a\r\nb", "a\x00b", "\ud800", "a" * 5000, "x\x1b[2J"])
def test_names_of_files_are_shown_in_one_plain_line(made, name):
    file = FUSED.path(made) / provenance.FILE
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"files": found["files"] | {name: "0"}}))
    with pytest.raises(UserError, match="is missing or cannot be read") as caught:
        load_checkpoint(FUSED.path(made))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_file_that_is_listed_and_gone_is_missed(made):
    (FUSED.path(made) / "static.json").unlink()
    with pytest.raises(UserError, match=r"static\.json is missing or cannot be read"):
        load_checkpoint(FUSED.path(made))


def test_lineage_holds_what_everything_was(made):
    made_of = json.loads((FUSED.path(made) / provenance.FILE).read_text())["needs"]["transformer"]
    assert made_of["content"] == provenance.content_of(TRANSFORMER.path(made))
    assert set(FUSED.lineage()["needs"]["transformer"]) == {"kind", "hash", "spec", "needs"}
