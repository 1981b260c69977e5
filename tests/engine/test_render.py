from __future__ import annotations

import io
import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from nano_think.engine.generate import Generation
from nano_think.engine.render import (
    COLOURS,
    TextAssembler,
    TokenPrinter,
    colour,
    legend,
    printable,
    token_records,
)


def one_byte(token: int) -> bytes:
    return bytes([token]) if token < 256 else b""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return Terminal()


@given(text=st.text())
def test_characters_never_break_whatever_the_tokens(text: str) -> None:
    assembler = TextAssembler(one_byte)
    pieces = [assembler.push(byte) for byte in text.encode()]
    assert "".join(pieces) + assembler.flush() == text
    assert assembler.flush() == ""


def test_bytes_are_held_back_until_the_character_is_whole() -> None:
    assembler = TextAssembler(one_byte)
    assert [assembler.push(byte) for byte in "a€".encode()] == ["a", "", "", "€"]
    assembler.push("é".encode()[0])
    assert assembler.push(999) == ""
    assert assembler.flush() == "\ufffd"


def test_pipe_gets_the_exact_text_and_nothing_else() -> None:
    file = io.StringIO()
    printer = TokenPrinter(one_byte, ["t", "d"], file)
    text = "[bold]é:smile: \x1b[31m\tx\n" + "long " * 60
    printer.prompt("In the\n")
    for byte in text.encode():
        printer.token(byte, torch.tensor([0.3, 0.7]))
    printer.finish()
    assert file.getvalue() == "In the\n" + text + "\n"


def test_terminal_shows_each_token_in_the_colour_of_its_expert(terminal: Terminal) -> None:
    printer = TokenPrinter(one_byte, ["alpha", "beta"], terminal)
    printer.token(ord("a"), torch.tensor([0.9, 0.1]))
    printer.token(ord("b"), torch.tensor([0.1, 0.9]))
    printer.finish()
    expected = io.StringIO()
    console = Console(file=expected, force_terminal=True, color_system="256")
    console.print("a", style=COLOURS[0], end="")
    console.print("b", style=COLOURS[1], end="")
    shown = terminal.getvalue()
    assert shown.startswith(expected.getvalue())
    assert "alpha" in shown
    assert "beta" in shown


def test_colours_may_be_wanted_in_a_pipe_and_unwanted_on_a_terminal(terminal: Terminal) -> None:
    pipe = io.StringIO()
    for file, color in ((pipe, "always"), (terminal, "never")):
        printer = TokenPrinter(one_byte, ["alpha", "beta"], file, color)
        printer.token(ord("a"), torch.tensor([0.9, 0.1]))
        printer.finish()
    assert "\x1b[" in pipe.getvalue()
    assert "most trusted" in pipe.getvalue()
    assert terminal.getvalue() == "a\n"
    with pytest.raises(ValueError, match="color='red' is not known: auto, always, never"):
        TokenPrinter(one_byte, color="red")


def test_model_cannot_steer_the_terminal(terminal: Terminal) -> None:
    printer = TokenPrinter(one_byte, file=terminal)
    for byte in "\x1b]0;x\x07\r\x9b2J ok\n\t.".encode():
        printer.token(byte)
    printer.finish()
    assert not set(terminal.getvalue()) & {"\x1b", "\x07", "\r", "\x9b"}
    assert printable("\x1b[2J\n\té") == "\ufffd[2J\n\té"


def test_legend_names_every_expert_and_colours_repeat() -> None:
    assert legend(["a", "b"]).plain == "most trusted: ■ a  ■ b"
    assert len(set(COLOURS)) == len(COLOURS)
    assert colour(len(COLOURS)) == colour(0)


def test_records_hold_text_weights_and_logprobs() -> None:
    ids = [*"né".encode(), 300]
    weights = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0], [0.0, 1.0]])
    generation = Generation([[0], ids], [[0.0], [-1.0, -2.0, -3.0, -4.0]], [weights[:1], weights])
    records = json.loads(json.dumps(token_records(generation, 1, one_byte, ["t", "s"])))
    assert [record["text"] for record in records] == ["n", "", "é", ""]
    assert [record["id"] for record in records] == ids
    assert [record["logprob"] for record in records] == [-1.0, -2.0, -3.0, -4.0]
    assert records[1]["weights"] == {"t": 0.25, "s": 0.75}


def test_records_of_a_model_without_router_have_no_weights() -> None:
    (record,) = token_records(Generation([["é".encode()[0]]], [[-1.0]]), 0, one_byte)
    assert record == {"id": 0xC3, "text": "\ufffd", "logprob": -1.0}


@pytest.mark.parametrize("color", ["never", "always"])
def test_what_the_output_cannot_say_is_replaced(color: str) -> None:
    raw = io.BytesIO()
    printer = TokenPrinter(one_byte, file=io.TextIOWrapper(raw, encoding="ascii"), color=color)
    for byte in "é!".encode():
        printer.token(byte)
    printer.finish()
    assert b"?!" in raw.getvalue()


@pytest.mark.parametrize("color", ["never", "always"])
def test_a_reader_that_leaves_early_ends_nothing(color: str) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as file:
        printer = TokenPrinter(one_byte, ["t"], file, color)
        os.close(reading)
        for byte in b"nobody reads this":
            printer.token(byte)
        printer.finish()
        print("nor that", file=file, flush=True)
