"""The files of a model and of the state of a fit."""

from __future__ import annotations

import copy
import io
import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse_tensors

from nano_think.artifacts.checkpoint import load_checkpoint
from nano_think.errors import UserError
from nano_think.files import hash_file, hash_json
from nano_think.phases.states import check_state
from nano_think.tokenizer import Tokenizer
from tests.reliability.formats import (
    Change,
    Folder,
    Format,
    Reached,
    change_json_file,
    change_members,
    copied,
    is_json,
    junk,
)
from tests.reliability.mutations import HOSTILE_TEXT, HOSTILE_VALUES, Case, change_bytes, change_json


def _used(folder: Path) -> None:
    """Load a model and ask it for something: what is taken must work."""
    checkpoint = load_checkpoint(folder, "make it")
    tokens = torch.tensor([[checkpoint.tokenizer.bos_id, *checkpoint.tokenizer.encode("a b")[:3]]])
    with torch.no_grad():
        checkpoint.model(tokens)


def weights(root: Path) -> Format:
    """safetensors: header and numbers of an expert and of its table."""
    folder = Folder(copied("transformer", root / "weights"))
    names = ("expert.safetensors", "embedding.safetensors")

    def draw(rng: random.Random) -> Case:
        name, other = rng.sample(names, 2)
        data, chance = folder.files[name], rng.random()
        start = 8 + int.from_bytes(data[:8], "little")
        if chance < 0.55:
            header = json.dumps(change_header(json.loads(data[8:start]), rng)).encode()
            data = len(header).to_bytes(8, "little") + header + data[start:]
        elif chance < 0.65:
            data = data[:start] + change_bytes(data[start:], rng)[: len(data) - start].ljust(
                len(data) - start
            )
        elif chance < 0.75:
            numbers = bytearray(data)
            for _ in range(rng.randint(1, 9)):
                numbers[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
            data = bytes(numbers)
        elif chance < 0.88:
            data = change_bytes(data, rng)
        elif chance < 0.93:
            data = (
                folder.files[other]
                if rng.random() < 0.3
                else data[: rng.randrange(start)] + folder.files[other]
            )
        else:
            return Case((name, junk(rng)), False)
        return Case((name, data), True)

    def judge(change: Change, reached: Reached) -> None:
        with suppress(Exception):
            parse_tensors(change[1])
            reached()
        with folder.changed(change) as path:
            _used(path)

    return Format("weights (safetensors)", draw, judge, [(name, folder.files[name]) for name in names])


def change_header(header: dict[str, Any], rng: random.Random) -> Any:
    """Other names, types and shapes for the same bytes, which the format allows, or nodes changed at random."""
    names, pick = [name for name in header if name != "__metadata__"], rng.randrange(6)
    one, other = rng.choice(names), rng.choice(names)
    if pick == 0:
        header[one], header[other] = header[other], header[one]
    elif pick == 1:
        header[rng.choice((one + "x", one.upper(), "", "weight", *HOSTILE_TEXT[-9:]))] = header.pop(one)
    elif pick == 2:
        header[one]["dtype"] = rng.choice(("I32", "U32", "F32"))
    elif pick == 3:
        header[one]["shape"] = rng.choice((header[one]["shape"][::-1], [1, *header[one]["shape"]]))
    elif pick == 4:
        header["__metadata__"] = {rng.choice(HOSTILE_TEXT[:20]).encode("utf-8", "replace").decode(): "x"}
    else:
        return change_json(header, rng)
    return header


def spec(root: Path) -> Format:
    """spec.json of an expert and of a mixture."""
    folders = {
        name: Folder(copied(name, root / f"spec_{name}"))
        for name in ("transformer", "nano_think", "diffuser")
    }

    def draw(rng: random.Random) -> Case:
        name = rng.choice(list(folders))
        case = change_json_file(folders[name].files["spec.json"], rng)
        return Case((name, case.data), case.mutated)

    def judge(change: Change, reached: Reached) -> None:
        if is_json(change[1]):
            reached()
        with folders[change[0]].changed(("spec.json", change[1])) as path:
            _used(path)

    valid = [(name, folder.files["spec.json"]) for name, folder in folders.items()]
    spread = [(name, json.dumps(json.loads(data), indent=9).encode()) for name, data in valid]
    return Format("spec.json", draw, judge, valid + spread)


def provenance(root: Path) -> Format:
    """provenance.json of an artefact in its place, with the hashes of its files."""
    made = {"kind": "transformer", "hash": "0" * 12, "spec": {"lr": 1e-3}, "needs": {}}
    need = {"kind": "shards", "hash": "1" * 12, "spec": {}, "needs": {}, "content": "2" * 32}
    path = copied("transformer", root / "provenance" / made["kind"] / made["hash"])
    names = [f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file()]
    files = {name: hash_file(path / name) for name in names}
    made |= {
        "needs": {"shards": need},
        "content": hash_json(files),
        "files": files,
        "result": {"val_loss": 5.0},
    }
    (path / "provenance.json").write_text(json.dumps(made))
    folder = Folder(path)

    def draw(rng: random.Random) -> Case:
        return change_json_file(folder.files["provenance.json"], rng)

    def judge(data: bytes, reached: Reached) -> None:
        if is_json(data):
            reached()
        with folder.changed(("provenance.json", data)) as path:
            _used(path)

    return Format("provenance.json", draw, judge, [folder.files["provenance.json"], b"{}"])


def tokenizer(root: Path) -> Format:
    """Both files of a tokenizer."""
    folder = Folder(copied("transformer", root / "tokenizer") / "tokenizer")
    ranks, description = "ranks.tiktoken", "tokenizer.json"

    def draw(rng: random.Random) -> Case:
        name = rng.choice((ranks, description))
        if name == description or rng.random() < 0.5:
            case = change_json_file(folder.files[name], rng) if name == description else None
            data, mutated = case or Case(change_bytes(folder.files[name], rng), True)
            return Case((name, data), mutated)
        lines = folder.files[ranks].splitlines()
        place, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        token, rank = lines[place].split()
        values = (b"-1", b"9" * 20, b"0", b"1.5", b"", str(int(rank) + 1).encode(), b"9" * 6000)
        lines[place] = rng.choice((token + b" " + rng.choice(values), rank, lines[other], b"=" + token))
        return Case((ranks, b"\n".join(lines) + b"\n"), True)

    def judge(change: Change, reached: Reached) -> None:
        if is_json(change[1]) if change[0] == description else change[1].count(b" ") > 200:
            reached()
        with folder.changed(change) as path:
            assert Tokenizer.load(path).encode("a b")

    return Format("tokenizer", draw, judge, [(name, folder.files[name]) for name in (ranks, description)])


def state(path: Path, task: Any) -> Format:
    """newest.ckpt of `task`: the archive's bytes, and what a sound archive holds."""
    folder = Folder(path.parent)
    valid = folder.files[path.name]
    loaded = torch.load(io.BytesIO(valid), weights_only=True)

    def draw(rng: random.Random) -> Case:
        chance = rng.random()
        if chance < 0.5:
            return Case(_saved(change_state(copy.deepcopy(loaded), rng)), True)
        if chance < 0.75:
            return Case(change_members(valid, lambda name, data: change_bytes(data, rng), rng), True)
        return Case(change_bytes(valid, rng), True) if chance < 0.95 else Case(junk(rng), False)

    def judge(data: bytes, reached: Reached) -> None:
        with folder.changed((path.name, data)) as where:
            try:
                check_state(where / path.name, task)
                reached()
            except UserError as error:
                if not any(
                    said in str(error) for said in ("cut short", "damaged", "something else", "packed")
                ):
                    reached()
                raise

    return Format("newest.ckpt", draw, judge, [valid, _saved(loaded)])


def _saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def change_state(state: Any, rng: random.Random) -> Any:
    """The state with a node changed, tensors included."""
    holders = [state]
    for holder in holders:
        parts = holder.values() if isinstance(holder, dict) else holder
        holders += [part for part in parts if isinstance(part, dict | list) and part]
    holder = rng.choice(holders)
    key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    value, pick = holder[key], rng.randrange(5)
    if pick == 0:
        del holder[key]
    elif pick == 1 and isinstance(holder, dict):
        holder[str(key) + "x"] = holder.pop(key)
    elif isinstance(value, torch.Tensor):
        holder[key] = rng.choice(
            (value.double(), value.flatten()[:1], value.repeat(2, 1) if value.dim() == 2 else 0)
        )
    elif isinstance(value, int | float) and pick == 2:
        holder[key] = rng.choice((-value, value + 1, value * 10**30, str(value), None))
    else:
        values = [value for value in HOSTILE_VALUES if not isinstance(value, int) or abs(value) < 1 << 62]
        holder[key] = rng.choice((*values, torch.ones(2), torch.ones(1).expand(10**12)))
    return state
