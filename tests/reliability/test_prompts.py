"""Prompts of any characters and length, from any file: continued as they are, or refused in one sentence."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nano_think.artifacts.build import build
from nano_think.artifacts.checkpoint import Checkpoint, load_checkpoint, save_expert
from nano_think.config import _literal, checked_overrides
from nano_think.engine import session
from nano_think.engine.sampling import SamplingConfig
from nano_think.engine.session import continue_text, read_prompt, save_continuations, session_folder
from nano_think.errors import UserError
from nano_think.model import ExpertLM
from nano_think.tokenizer import SPECIALS
from tests.reliability.mutations import HOSTILE_TEXT, Case, campaign, change_bytes, change_text, patience

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 48
PROMPTS = (
    "In the beginning",
    "def add(a, b):",
    "Ünïcödé — 漢字 🙂",
    "a, [b] = {c: 'd'}",
    "<|eos|> and <|bos|>",
    "",
)
SPEC = {"_target_": "nano_think.experts.transformer.TransformerExpert", "d_model": 8, "num_layers": 1}
SPEC |= {"num_heads": 2, "ffn_dim": 8}


@pytest.fixture
def expert(randomise, byte_tokenizer, tmp_path) -> Checkpoint:
    model = ExpertLM((byte_tokenizer.vocab_size, 8), randomise(build(SPEC)))
    save_expert(tmp_path / "expert", "transformer", SPEC, model, byte_tokenizer, CONTEXT)
    return load_checkpoint(tmp_path / "expert")


def drawn(rng: random.Random) -> Case:
    """(argument, bytes of a file, bytes of standard input, whether it is valid); at most one is not None."""
    prompt, kind = rng.choice(PROMPTS), rng.randrange(3)
    given: list[Any] = [None, None, None]
    if rng.random() < 0.1:
        given[kind] = prompt if kind == 0 else prompt.encode()
        return Case((*given, True), False)
    mutated = rng.random() < 0.9
    text = change_text(prompt, rng) if mutated else "".join(rng.sample(HOSTILE_TEXT, 2))
    raw = text.encode(errors="surrogatepass")
    given[kind] = text if kind == 0 else change_bytes(raw, rng) if rng.random() < 0.5 else raw
    return Case((*given, False), mutated)


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_prompt_is_continued_as_it_is_or_refused(expert, tmp_path, count):
    file, made_file = tmp_path / "prompt.txt", tmp_path / "made.json"

    def judge(data: tuple[str | None, bytes | None, bytes | None, bool], reached: Callable[[], None]) -> None:
        argument, content, piped, valid = data
        if content is not None:
            file.write_bytes(content)
        stdin = io.TextIOWrapper(io.BytesIO(piped or b""), encoding="utf-8")
        try:
            prompt = read_prompt(argument, None if content is None else str(file), stdin)
            reached()
            out = io.StringIO()
            made = continue_text(expert, prompt, 2, SamplingConfig(), stream=out)
        except UserError:
            assert not valid
            raise
        assert made.prompt == prompt
        assert out.getvalue() == f"{prompt}{made.text}\n"
        save_continuations(made_file, [made])
        assert json.loads(made_file.read_text())[0]["full_text"] == prompt + made.text
        ids = expert.tokenizer.encode(prompt)
        assert max(ids, default=0) < 256, "no special token comes of text"
        assert expert.tokenizer.decode(ids) == prompt

    tally = campaign("prompts", drawn, judge, count)
    print(f"\n{tally.line()}")
    assert tally.findings == []
    assert tally.mutated > tally.tried / 2 < tally.reached
    assert min(tally.taken, tally.refused) > tally.tried / 10
    assert tally.growth_mb < 30


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")))
def test_any_text_passes_the_grammar_of_the_command_line(text):
    (written,) = OverridesParser.create().parse_overrides([_literal(f"prompt={text}", sweep=False)])
    assert OmegaConf.create({"prompt": written.value()}).prompt == text


def test_a_long_prompt_passes_it_in_linear_time():
    text = "it's ${so} \\" * 10_000
    with patience(60):
        (written,) = OverridesParser.create().parse_overrides([_literal(f"prompt={text}", sweep=False)])
    assert OmegaConf.create({"prompt": written.value()}).prompt == text


def test_bytes_that_are_no_text_are_refused_on_the_command_line():
    for argument in (b"prompt=caf\xe9", b"data.root=/caf\xe9", b"\xff"):
        with pytest.raises(UserError, match="is not valid UTF-8") as error:
            checked_overrides(["phase=generate", argument.decode(errors="surrogateescape")], ROOT)
        str(error.value).encode()


@pytest.mark.parametrize("special", SPECIALS)
def test_the_name_of_a_special_token_is_text(expert, special):
    made = continue_text(expert, special, 1, SamplingConfig(temperature=0))
    assert made.prompt == special
    assert expert.tokenizer.decode(expert.tokenizer.encode(special)) == special


def test_files_that_are_no_prompts_are_named(tmp_path, monkeypatch):
    (tmp_path / "latin").write_bytes("Über".encode("latin-1"))
    (tmp_path / "loop").symlink_to("loop")
    for name in ("latin", "loop", "missing", ".", "nul\x00byte", "x" * 300):
        with pytest.raises(UserError, match=r"prompt_file=.* cannot be read .*UTF-8") as error:
            read_prompt(None, str(tmp_path / name), io.StringIO())
        assert len(str(error.value).splitlines()) == 1
    monkeypatch.setattr(session, "LONGEST_PROMPT", 1000)
    for endless in ("/dev/zero", "/dev/urandom"):
        with patience(60), pytest.raises(UserError, match=r"longer than 1000 characters|UTF-8"):
            read_prompt(None, endless, io.StringIO())
    with pytest.raises(UserError, match="standard input is longer than 1000 characters"):
        read_prompt(None, None, io.StringIO("x" * 1001))
    assert read_prompt(None, None, io.StringIO("x" * 1000)) == "x" * 1000


def test_a_byte_order_mark_is_no_part_of_the_prompt(tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfOnce\r\nupon")
    assert read_prompt(None, str(tmp_path / "prompt.txt"), io.StringIO()) == "Once\nupon"


@pytest.mark.parametrize("name", ["x" * 201, "漢" * 67, "a\x00b", "a\nb", "caf\udce9", "<|eos|>", "${seed}"])
def test_a_name_that_no_file_system_takes_names_no_session(tmp_path, name):
    with pytest.raises(UserError, match="names no session") as error:
        session_folder(tmp_path, name)
    assert len(str(error.value).splitlines()) == 1
    str(error.value).encode()
