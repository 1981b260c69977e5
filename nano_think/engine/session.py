"""Continue a text with a loaded checkpoint: memory, streaming, and the record of who was trusted where."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TextIO

import torch

from nano_think.artifacts.checkpoint import Checkpoint
from nano_think.artifacts.memory import SPLIT, Memory, load_memory, memory_of, save_memory, write
from nano_think.artifacts.provenance import content_of
from nano_think.engine.generate import Generation, generate
from nano_think.engine.quantized import generate_quantized
from nano_think.engine.render import TokenPrinter, token_records
from nano_think.engine.sampling import SamplingConfig
from nano_think.errors import UserError
from nano_think.files import locked, remove_dir, write_json
from nano_think.model import NanoThink
from nano_think.nn.quantized import Kind
from nano_think.signatures import short
from nano_think.vector_records import Reader, session_id

# Characters of a prompt that are read; no context holds a share of that.
LONGEST_PROMPT = 16 << 20
# File systems end a name at 255 bytes.
NAME_BYTES = 200


@dataclass(frozen=True)
class Continuation:
    """A prompt, what followed, and the routing weights, ready for JSON.

    context_full: generation ended because the model's context was full.
    """

    prompt: str
    text: str
    experts: list[str]
    tokens: list[dict[str, Any]]
    context_full: bool

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.__dict__, "full_text": self.prompt + self.text}


def session_folder(root: Path, name: str) -> Path:
    """The folder below `root` that a session is kept in; raises UserError for a name that leads elsewhere."""
    if not re.fullmatch(r"\w[\w .-]*", name) or len(name.encode()) > NAME_BYTES:
        raise UserError(
            f"memory.session={short(name)} names no session: use letters, digits, blanks, '.', '_' and '-', "
            f"beginning with a letter or digit, at most {NAME_BYTES} bytes"
        )
    return root / name


class Session:
    """A model's memory plus what earlier continuations of the same name left in it, kept in a folder.

    The store in the folder holds the model's own records too and stands alone; each append makes a new
    generation of it, so that a kill at any moment leaves the old session or the new one. Processes that keep the
    same session append one after the other, each to what is there then.
    Raises UserError where the model has no memory, or the folder was kept by another model.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, folder: Path, reset: bool = False) -> None:
        base = memory_of(checkpoint)
        if base is None:
            raise UserError(
                f"{checkpoint.path} has no memory to keep a session in: use a model of stage 7d "
                "(`python train.py phase=mla expert=all stage=7d`)"
            )
        if reset:
            remove_dir(folder)
        self.name, self.folder, self.number = name, folder, session_id(name)
        self._base, self._model = base, content_of(checkpoint.path)
        self.memory = self._kept()

    @property
    def own_records(self) -> int:
        """Records that earlier continuations left."""
        return self.memory.store.count(self.number)

    def append(self, checkpoint: Checkpoint, tokens: list[int]) -> int:
        """Remember a finished sequence and save; returns its number of records, see `remember`."""
        with locked(self.folder.with_name(f".{self.folder.name}.lock")):
            self.memory = self._kept()
            count = remember(self.memory, checkpoint.model, tokens, self.number)
            kept = replace(self.memory, figures={**self.memory.figures, "model": self._model})
            save_memory(kept, self.folder)
        return count

    def _kept(self) -> Memory:
        """What the folder holds, the model's own memory where there is none; UserError for another model's."""
        kept, base = load_memory(self.folder), self._base
        if kept is None:
            return base
        same = kept.figures.get("model", self._model) == self._model and kept.settings == base.settings
        if not same or kept.encoder.fingerprint() != base.encoder.fingerprint():
            raise UserError(
                f"session {self.name} was kept by another model: start it anew with memory.reset=true, "
                "or choose another memory.session"
            )
        return kept


def remember(memory: Memory, model: NanoThink, tokens: list[int], session: int) -> int:
    """Write a finished sequence into a session of the store, for its later sequences alone.

    Returns the number of records, see `artifacts.memory.write`.
    """
    count = write(memory, model, torch.tensor([tokens]), session=session, split=SPLIT)
    memory.store.publish()
    return count


def continue_text(
    checkpoint: Checkpoint,
    prompt: str,
    max_new_tokens: int,
    config: SamplingConfig,
    session: Session | None = None,
    stream: TextIO | None = None,
    options: dict[str, Any] | None = None,
    quantize: Kind | None = None,
    color: str = "auto",
) -> Continuation:
    """Continue `prompt`, printing to `stream` token by token where one is given, coloured as `TokenPrinter` says.

    A model with memory reads it; with a session the finished sequence is remembered in it. quantize: how coarsely
    the weights are kept that write the text; a session remembers what the saved ones make of it.
    Raises UserError for a prompt that is longer than the model's context.
    """
    tokenizer, model = checkpoint.tokenizer, checkpoint.model
    context = checkpoint.spec["seq_len"]
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if len(tokens) > context:
        raise UserError(
            f"the prompt has {len(tokens) - 1} tokens, this model's context holds {context - 1}: shorten it"
        )
    names = list(getattr(model, "experts", {}))
    printer = None if stream is None else TokenPrinter(tokenizer.token_bytes, names, stream, color)
    if printer is not None:
        printer.prompt(prompt)
    run = generate if quantize is None else partial(generate_quantized, kind=quantize)
    generation = run(
        model,
        prompts=[tokens],
        max_new_tokens=max_new_tokens,
        config=config,
        eos_id=tokenizer.eos_id,
        banned_ids=(tokenizer.bos_id, tokenizer.pad_id),
        context=context,
        memory=_reader(session.memory if session else memory_of(checkpoint), session),
        options=options,
        on_token=(lambda row, token, weights: printer.token(token, weights)) if printer else None,
    )
    if printer is not None:
        printer.finish()
    if session is not None:
        session.append(checkpoint, tokens + generation.tokens[0])
    full = len(tokens) + len(generation.tokens[0]) > context
    return _continuation(checkpoint, prompt, generation, names, full)


def _reader(memory: Memory | None, session: Session | None) -> Any:
    """The retrieval state of one sequence, or None where the model has no memory."""
    if memory is None:
        return None
    return memory.retriever.init_state(1, Reader(session=session.number) if session else Reader())


def _continuation(
    checkpoint: Checkpoint, prompt: str, generation: Generation, names: list[str], full: bool
) -> Continuation:
    records = token_records(generation, 0, checkpoint.tokenizer.token_bytes, names)
    text = "".join(record["text"] for record in records)
    return Continuation(prompt, text, names, records, full)


def read_prompt(prompt: str | None, prompt_file: str | None, stdin: TextIO) -> str:
    """The prompt from the argument, from a file, or from standard input where it is piped; empty otherwise.

    Raises UserError where two sources are given, and for what is no UTF-8 text or longer than `LONGEST_PROMPT`.
    """
    if prompt is not None and prompt_file is not None:
        raise UserError("give the prompt by prompt= or by prompt_file=, not by both")
    source, text = "the prompt", prompt or ""
    try:
        if prompt_file is not None:
            source = f"prompt_file={short(prompt_file)}"
            with open(prompt_file, encoding="utf-8-sig") as file:
                text = file.read(LONGEST_PROMPT + 1)
        elif prompt is None and stdin is not None and not stdin.isatty():
            source = "standard input"
            text = _piped(stdin)
        text.encode()
    except (OSError, ValueError) as error:  # the second for names with a NUL and for what is no UTF-8
        raise UserError(f"{source} cannot be read ({short(error, 200)}): give UTF-8 text") from error
    if len(text) > LONGEST_PROMPT:
        raise UserError(
            f"{source} is longer than {LONGEST_PROMPT} characters, which no model reads: shorten it"
        )
    return text


@cache
def _piped(stdin: TextIO) -> str:
    """What a prompt is made of, read once: the jobs of a sweep in one process get the same."""
    return stdin.read(LONGEST_PROMPT + 1)


def save_continuations(path: Path, continuations: list[Continuation], mark: str = "") -> None:
    """Write texts, tokens and weights as JSON, with the mark of a model that reads later tokens if it has one."""
    warning = {"mark": mark} if mark else {}
    write_json(path, [continuation.as_json() | warning for continuation in continuations])
