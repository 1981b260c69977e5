"""The files of a memory, of token shards, of a corpus, of a sweep and of a run."""

from __future__ import annotations

import hashlib
import io
import json
import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.torch import load as parse_tensors

from nano_think.artifacts.memory import load_memory
from nano_think.data.corpus import Corpus
from nano_think.data.packing import RowReader
from nano_think.data.shards import Shards
from nano_think.errors import UserError
from nano_think.files import hash_file, write_json
from nano_think.phases.journal import DONE, FAILED, Journal
from nano_think.phases.resume import unfinished, what_stays
from nano_think.phases.run import Run
from nano_think.phases.sweep import settings_in, summary_table
from tests.reliability.formats import (
    Change,
    Folder,
    Format,
    Reached,
    change_array,
    change_json_file,
    change_members,
    copied,
    is_json,
    junk,
)
from tests.reliability.mutations import Case, change_bytes, change_json


def store(root: Path) -> Format:
    """All files of a memory: settings, encoder, and the generation of its store."""
    folder = Folder(copied("nano_think", root / "memory") / "memory")
    place = "store/generation-000001"
    names = [name for name in folder.files if not name.endswith("CURRENT")]
    manifest = f"{place}/manifest.json"

    def draw(rng: random.Random) -> Case:
        name = rng.choice([*names, "store/CURRENT", manifest])
        data = folder.files[name]
        if rng.random() < 0.05:
            return Case(([(name, junk(rng))]), False)
        if name.endswith(".json"):
            case = change_json_file(data, rng)
            return Case([(name, case.data)], case.mutated)
        if name.endswith(".npz") and rng.random() < 0.7:
            data = change_members(data, lambda member, content: change_array(content, rng), rng)
        else:
            data = change_array(data, rng) if name.endswith(".npy") else change_bytes(data, rng)
        changes = [(name, data)]
        if name.startswith(place) and rng.random() < 0.85:
            listed = json.loads(folder.files[manifest])
            listed["files"][name.rpartition("/")[2]] = hashlib.sha256(data).hexdigest()
            changes.append((manifest, json.dumps(listed).encode()))
        return Case(changes, True)

    def judge(changes: list[Change], reached: Reached) -> None:
        if _parses(*changes[0]):
            reached()
        with folder.changed(*changes) as path:
            memory = load_memory(path)
            assert memory is not None
            tokens = torch.arange(16).unsqueeze(0)
            nowhere, zeros = torch.full_like(tokens, -1), torch.zeros_like(tokens)
            batch = {
                "tokens": tokens,
                "positions": tokens,
                "segments": zeros,
                "doc_uid": nowhere,
                "cluster": nowhere,
            }
            memory.slots(batch)

    controls = [[(name, folder.files[name])] for name in folder.files]
    return Format("memory and store", draw, judge, controls)


def _parses(name: str, data: bytes) -> bool:
    with suppress(Exception):
        if name.endswith(".json"):
            json.loads(data.decode())
        elif name.endswith(".safetensors"):
            parse_tensors(data)
        elif name.endswith((".npy", ".npz")):
            found = np.load(io.BytesIO(data))
            if name.endswith(".npz"):
                _ = [found[key] for key in found]
        return True
    return False


def shards(path: Path) -> Format:
    """A folder of token shards: manifest, streams, tables of documents."""
    folder = Folder(path)
    manifest = "manifest.json"

    def draw(rng: random.Random) -> Case:
        name = rng.choice([*(name for name in folder.files), manifest, manifest, manifest])
        if rng.random() < 0.05:
            return Case([(name, junk(rng))], False)
        data = folder.files[name]
        if name == manifest:
            case = change_json_file(data, rng)
            return Case([(name, case.data)], case.mutated)
        data = change_array(data, rng) if name.endswith(".npy") else change_bytes(data, rng)
        changes = [(name, data)]
        if rng.random() < 0.85:
            changes.append((manifest, _rehashed(folder, manifest, name, data)))
        return Case(changes, True)

    def judge(changes: list[Change], reached: Reached) -> None:
        if _parses(*changes[0]):
            reached()
        with folder.changed(*changes) as where:
            made = Shards(where)
            for split in list(made.manifest["splits"]):
                for domain in made.domains:
                    made.tokens(split, domain), made.docs(split, domain)
                reader = RowReader(made, split, 16)
                draws = [(number, 0) for number, rows in enumerate(reader.rows_per_domain) if rows]
                if draws:
                    reader.batch(draws)

    controls = [[(name, folder.files[name])] for name in folder.files]
    controls.append([(manifest, _rehashed(folder, manifest, *next(iter(folder.files.items()), {})))])
    return Format("token shards", draw, judge, controls[:-1])


def _rehashed(folder: Folder, manifest: str, name: str, data: bytes) -> bytes:
    """The manifest with the hash of `data` for one of its files."""
    listed = json.loads(folder.files[manifest])
    listed["files"][name] = hashlib.blake2b(data, digest_size=16).hexdigest()
    return json.dumps(listed).encode()


def corpus(path: Path) -> Format:
    """A prepared corpus: manifest and records."""
    listed = json.loads((path / "manifest.json").read_text())
    listed["files"] = {f.relative_to(path).as_posix(): hash_file(f) for f in path.rglob("*.jsonl")}
    (path / "manifest.json").write_text(json.dumps(listed))
    folder = Folder(path)
    manifest = "manifest.json"

    def draw(rng: random.Random) -> Case:
        name = rng.choice([*(name for name in folder.files if name.endswith(".jsonl")), manifest, manifest])
        if rng.random() < 0.05:
            return Case([(name, junk(rng))], False)
        data = folder.files[name]
        if name == manifest:
            case = change_json_file(data, rng)
            return Case([(name, case.data)], case.mutated)
        lines = data.splitlines(keepends=True)
        if lines and rng.random() < 0.6:
            place = rng.randrange(len(lines))
            lines[place] = json.dumps(change_json(json.loads(lines[place]), rng)).encode() + b"\n"
            data = b"".join(lines)
        else:
            data = change_bytes(data, rng)
        right = rng.random() < 0.85
        return Case(
            [(name, data), *([(manifest, _rehashed(folder, manifest, name, data))] if right else [])], True
        )

    def judge(changes: list[Change], reached: Reached) -> None:
        name, data = changes[0]
        lines = [data] if name == manifest else data.splitlines()
        if all(is_json(line) for line in lines):
            reached()
        with folder.changed(*changes) as where:
            made = Corpus(where)
            for split in ("expert_train", "test"):
                for domain in made.domains:
                    for record in made.documents(split, domain):
                        assert record.text is not None

    controls = [[(name, data)] for name, data in folder.files.items()]
    return Format("corpus", draw, judge, controls)


def sweep(root: Path) -> Format:
    """What a sweep keeps: sweep.json, and the config.yaml of a job."""
    path = root / "sweep"
    journal = Journal(path)
    asked = ["phase=mla", "seed=1,2,3"]
    journal.open(
        "python train.py -m phase=mla seed=1,2,3", asked, [["seed=1"], ["seed=2"], ["seed=3"]], False
    )
    for number, override in enumerate((["seed=1"], ["seed=2"])):
        journal.begin(number, override)
    journal.end(0, DONE, objective=5.25, figures={"loss.7c": 5.25})
    journal.end(1, FAILED, error="there is no such thing")
    settings = {"phase": {"name": "mla"}, "seed": 1, "expert_seed": None, "optimizer": {"betas": [0.9, 0.95]}}
    (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    folder = Folder(path)
    names = ("sweep.json", "config.yaml")

    def draw(rng: random.Random) -> Case:
        name = rng.choice((*names, names[0]))
        if name == names[0]:
            case = change_json_file(folder.files[name], rng)
            return Case((name, case.data), case.mutated)
        if rng.random() < 0.5:
            return Case((name, json.dumps(change_json(settings, rng)).encode()), True)
        return Case((name, change_bytes(folder.files[name], rng)), True)

    def judge(change: Change, reached: Reached) -> None:
        if change[0] == names[1] or is_json(change[1]):
            reached()
        with folder.changed(change) as where:
            summary_table(Journal(where).read()["jobs"]).markdown()
            settings_in(where / names[1])

    return Format("sweep", draw, judge, [(name, folder.files[name]) for name in names])


def manifest(root: Path) -> Format:
    """The manifest of a run, by which the same command finds its folder again and goes on."""
    where = root / "outputs" / "runs" / "expert" / "1"
    command = ["phase=expert", "expert=transformer", f"run.root={root / 'outputs'}"]
    known = {
        "command": ["train.py", *command],
        "seed": 1,
        "status": "failed",
        "starts": 2,
        "error": "no more",
    }
    known["fits"] = {"transformer": {"choices": {"precision": "32-true"}, "seconds": 1.5}}
    known["artifacts"] = {"0123456789ab": "corpus"}
    name = "manifest.json"
    write_json(where / name, known)
    folder = Folder(where)
    cfg = OmegaConf.create({"run": {"root": str(root / "outputs")}})

    def draw(rng: random.Random) -> Case:
        case = change_json_file(folder.files[name], rng)
        return Case((name, case.data), case.mutated)

    def judge(change: Change, reached: Reached) -> None:
        if is_json(change[1]):
            reached()
        with folder.changed(change):
            found = unfinished(root / "outputs", command)
            assert found in (None, where)
            run = Run(cfg, command, where, Console(file=io.StringIO()))
            run.manifest = what_stays(where)
            run.record_fit("transformer", seconds=2.5)
            assert json.loads((where / name).read_text())["fits"]["transformer"]["seconds"] == 2.5
            if found is None:
                raise UserError("it belongs to no run that could go on")

    return Format("manifest of a run", draw, judge, [(name, folder.files[name])])
