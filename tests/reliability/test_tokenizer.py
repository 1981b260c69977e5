"""Text of any characters: every string comes back from its ids, none makes a special token or takes for ever."""

from __future__ import annotations

import random

import pytest

from nano_think.errors import UserError
from nano_think.tokenizer import SPECIALS, Tokenizer, train_bpe
from tests.reliability.mutations import HOSTILE_TEXT, Case, campaign, change_text, patience

TEXTS = [
    "In the beginning God created the heaven and the earth. And the earth was without form, and void;",
    "def add(first, second):\n    total = first + second\n    return total\n",
    "naïve café 東京 ☕ 1789 Ünïcödé 🙂 שלום مرحبا",
    "<|bos|>a document that speaks of <|eos|> and <|pad|>",
]
RUNS = (
    "a",
    "ab",
    "\u0301\u0323",
    "Z\u0351\u036b\u0343",
    "\u05d0\u0627",
    "\ue000",
    " ",
    "\n",
    "\t ",
    "\x00",
    "7",
    "🙂",
)


def drawn(rng: random.Random) -> Case:
    """(text, whether it is valid): some valid, most changed, the rest of any code points."""
    text, kind = rng.choice(TEXTS), rng.random()
    if kind < 0.1:
        return Case((text, True), False)
    if kind < 0.8:
        return Case((change_text(text, rng), False), True)
    codes = (rng.randrange(0x110000) for _ in range(rng.randrange(60)))
    return Case(("".join(map(chr, codes)) + rng.choice(HOSTILE_TEXT), False), False)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS * 3, 320)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_text_comes_back(tokenizer, count):
    specials = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}

    def judge(data: tuple[str, bool], reached) -> None:
        text, valid = data
        ids = tokenizer.encode(text)
        reached()
        readable = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert not valid or readable == text
        assert tokenizer.decode(ids) == readable
        assert not specials & set(ids)
        assert tokenizer.encode_batch([text])[0] == ids
        assert tokenizer.byte_lengths[ids].sum() == len(readable.encode())

    tally = campaign("text to tokens", drawn, judge, count)
    print(f"\n{tally.line()}")
    assert tally.findings == []
    assert tally.taken == tally.reached == tally.tried
    assert tally.mutated > tally.tried / 2
    assert tally.growth_mb < 30


@pytest.mark.parametrize("run", RUNS, ids=repr)
def test_a_long_run_takes_linear_time(tokenizer, run):
    text = run * (500_000 // len(run)) + "x"
    with patience(60):
        ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("count", [30, pytest.param(10_000, marks=pytest.mark.slow)])
def test_training_on_any_text_ends_in_a_vocabulary_or_says_why_not(count):
    def draw(rng: random.Random) -> Case:
        texts = [drawn(rng).data[0] for _ in range(rng.randrange(5))]
        return Case((texts, rng.choice((-1, 258, 259, 262, 270, 300, 5000))), bool(texts))

    def judge(data: tuple[list[str], int], reached) -> None:
        texts, vocab_size = data
        if vocab_size >= 256 + len(SPECIALS):  # or the texts are not looked at
            reached()
        made = train_bpe(texts, vocab_size)
        assert made.vocab_size == vocab_size
        for text in (*texts, *SPECIALS):
            ids = made.encode(text)
            assert max(ids, default=0) < vocab_size - len(SPECIALS)
            assert (
                made.decode_bytes(ids)
                == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
            )

    tally = campaign("training a tokenizer", draw, judge, count)
    print(f"\n{tally.line()}")
    assert tally.findings == []
    assert tally.mutated > tally.tried / 2 < tally.reached
    assert min(tally.taken, tally.refused) > tally.tried / 10
    assert tally.growth_mb < 30


@pytest.mark.parametrize(
    "texts", [[], [""], ["a" * 200_000], ["\u0301\u0323" * 100_000], ["\ud800" * 1000], [" " * 9999]]
)
def test_too_little_to_merge_is_said_with_the_size_that_would_do(texts):
    with (
        patience(60),
        pytest.raises(UserError, match=r"supports only \d+ tokens.*set tokenizer\.vocab_size to"),
    ):
        train_bpe(texts, 3000)
