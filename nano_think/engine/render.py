"""Generated tokens for people and programs: coloured by the most trusted expert, or as plain records."""

from __future__ import annotations

import codecs
import os
import unicodedata
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text
from torch import Tensor

from nano_think.engine.generate import Generation

# Distinct also for the common kinds of colour blindness, readable on dark and on light backgrounds.
COLOURS = ("dark_orange", "dodger_blue1", "green3", "magenta", "gold3", "cyan3", "red1", "grey58")

# What a setting means to rich: whether to write as to a terminal, whatever the output is.
AS_TERMINAL = {"auto": None, "always": True, "never": False}

TokenBytes = Callable[[int], bytes]


class TextAssembler:
    """Text from byte-level tokens: bytes are held back until they form whole characters."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes, perhaps none."""
        return self._decoder.decode(self._token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: a replacement character for an unfinished one."""
        return self._decoder.decode(b"", final=True)


class TokenPrinter:
    """Streams one row to a terminal, each token in the colour of its most trusted expert.

    color: `auto` where `file` is a terminal, `always` (for a pager) or `never`. Without colours the exact text is
    written and nothing else, but for characters that the file's encoding lacks. Where nobody reads on, the rest is
    dropped: what was generated is kept elsewhere too. Raises ValueError for another word.
    """

    def __init__(
        self,
        token_bytes: TokenBytes,
        expert_names: Sequence[str] = (),
        file: TextIO | None = None,
        color: str = "auto",
    ) -> None:
        if color not in AS_TERMINAL:
            raise ValueError(f"color={color!r} is not known: {', '.join(AS_TERMINAL)}")
        terminal = AS_TERMINAL[color]
        if isinstance(file, TextIOWrapper):
            file.reconfigure(errors="replace")
        self._console = Console(
            file=file, force_terminal=terminal, highlight=False, markup=False, emoji=False
        )
        self._text = TextAssembler(token_bytes)
        self._names = list(expert_names)

    def prompt(self, text: str) -> None:
        """The prompt, set apart from what follows."""
        self._write(text, "bold")

    def token(self, token: int, weights: Tensor | None = None) -> None:
        """One generated token and its routing weights (N,)."""
        self._write(self._text.push(token), None if weights is None else colour(int(weights.argmax())))

    def finish(self) -> None:
        """End the line; on a terminal, name the colours."""
        self._write(self._text.flush() + "\n", None)
        if self._console.is_terminal and self._names:
            self._put(self._rendered(legend(self._names), end="\n"))

    def _write(self, text: str, style: str | None) -> None:
        self._put(self._rendered(Text(printable(text), style or "")) if self._console.is_terminal else text)

    def _rendered(self, text: Text, end: str = "") -> str:
        with self._console.capture() as captured:
            self._console.print(text, end=end, soft_wrap=True)
        return captured.get()

    def _put(self, text: str) -> None:
        file = self._console.file
        try:
            file.write(text)
            file.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, file.fileno())  # also for what is left in the buffer, and for other writers
            os.close(nowhere)


def colour(expert: int) -> str:
    """The colour of the expert with this index."""
    return COLOURS[expert % len(COLOURS)]


def legend(expert_names: Sequence[str]) -> Text:
    """One line that shows each expert in its colour."""
    parts = [Text(f"■ {name}", colour(i)) for i, name in enumerate(expert_names)]
    return Text("most trusted: ") + Text("  ").join(parts)


def printable(text: str) -> str:
    """`text` with control characters replaced, so that no model can steer the terminal."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def token_records(
    generation: Generation, row: int, token_bytes: TokenBytes, expert_names: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """One record {id, text, logprob, weights: {expert: weight}} a generated token, ready for JSON.

    The texts joined give the whole text: a token inside a character has text "", the one that completes it
    the character. `weights` is left out where the model has no router.
    """
    assembler = TextAssembler(token_bytes)
    records: list[dict[str, Any]] = []
    for token, logprob in zip(generation.tokens[row], generation.logprobs[row], strict=True):
        records.append({"id": token, "text": assembler.push(token), "logprob": logprob})
    if records:
        records[-1]["text"] += assembler.flush()
    if generation.weights is not None:
        for record, weights in zip(records, generation.weights[row].tolist(), strict=True):
            record["weights"] = dict(zip(expert_names, weights, strict=True))
    return records
