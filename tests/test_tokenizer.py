from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from nano_think.errors import UserError
from nano_think.tokenizer import (
    BPE_PATTERN,
    GPT2_PATTERN,
    SPECIALS,
    Tokenizer,
    gpt2_tokenizer,
    train_bpe,
)

TEXTS = [
    "In the beginning God created the heaven and the earth. And the earth was without form, and void;",
    "def add(first, second):\n    total = first + second\n    return total\n\n\nprint(add(12, 3456))\n",
    "the theory of the thing, the other theme; they're there, isn't it? naïve café 東京 ☕ 1789",
] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 300)


def slow_bpe(tokenizer: Tokenizer, text: str) -> list[int]:
    """Merge the pair of lowest rank until none is left, in each piece: BPE by its definition."""
    ranks = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size - len(SPECIALS))}
    ids = []
    for piece in regex.findall(tokenizer.pattern, text):
        parts = [bytes([value]) for value in piece.encode()]
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
            if not pairs:
                break
            _, at = min(pairs)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def gpt2_letters() -> dict[int, str]:
    """Byte -> character of GPT-2's notation, from its published rule."""
    shown = set(range(ord("!"), ord("~") + 1)) | set(range(0xA1, 0xAD)) | set(range(0xAE, 0x100))
    letters, next_code = {}, 256
    for value in range(256):
        letters[value] = chr(value if value in shown else next_code)
        next_code += value not in shown
    return letters


@given(st.text())
def test_any_unicode_round_trips(text: str) -> None:
    tokenizer = train_bpe(TEXTS, 270)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(alphabet=st.sampled_from("the  \n\t\r'sS1234ß´ीéa̐,.<|eos>東☕")))
def test_encoding_equals_bpe_by_definition(text: str) -> None:
    tokenizer = train_bpe(TEXTS, 300)
    for one in (tokenizer, Tokenizer({tokenizer.token_bytes(i): i for i in range(297)}, GPT2_PATTERN)):
        assert one.encode(text) == slow_bpe(one, text)


def test_each_merge_was_the_most_frequent_pair(tokenizer: Tokenizer) -> None:
    words = Counter(piece for text in TEXTS for piece in regex.findall(BPE_PATTERN, text))
    split = {word: [bytes([value]) for value in word.encode()] for word in words}
    for rank in range(256, tokenizer.vocab_size - len(SPECIALS)):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        top = max(pairs.values())
        learned = [p for p, n in pairs.items() if n == top and p[0] + p[1] == tokenizer.token_bytes(rank)]
        assert learned, f"rank {rank} is not among the most frequent pairs"
        for parts in split.values():
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == learned[0]:
                    parts[at : at + 2] = [parts[at] + parts[at + 1]]
                at += 1


def test_specials_are_the_last_ids_and_stand_for_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 300
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (297, 298, 299)
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("hello"), tokenizer.eos_id]) == "hello"
    assert tokenizer.token_bytes(tokenizer.pad_id) == b""
    for wrong in (-1, 300):
        with pytest.raises(IndexError, match="outside the vocabulary of 300"):
            tokenizer.token_bytes(wrong)


@given(st.lists(st.sampled_from([*SPECIALS, "<|endoftext|>", "<|", "|>", "eos", " "])))
def test_plain_text_never_makes_specials(parts: list[str]) -> None:
    tokenizer = train_bpe([*TEXTS, *SPECIALS * 50], 320)
    ids = tokenizer.encode("".join(parts))
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)
    assert tokenizer.decode(ids) == "".join(parts)


def test_surrogates(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"  # a pair is one character
    assert tokenizer.decode_bytes(tokenizer.encode_batch(["\udfff"])[0]) == "\ufffd".encode()
    assert train_bpe([*TEXTS, "lone \udc00 surrogate"], 270).vocab_size == 270


def test_half_a_character_decodes_to_the_replacement_mark(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.encode("☕")[0]]) == "\ufffd"


@pytest.mark.parametrize("run", ["a", "^", " ", "\n", "\t", "7", " \n", "a ", "\r\n", "́"])
def test_very_long_runs_do_not_break_the_pattern(tokenizer: Tokenizer, run: str) -> None:
    text = run * 300_000 + "x"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_numbers_are_cut_after_two_digits() -> None:
    assert regex.findall(BPE_PATTERN, "year 12345") == ["year", " ", "12", "34", "5"]
    assert regex.findall(BPE_PATTERN, "    return x") == ["   ", " return", " x"]


def test_batch_equals_single(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch([*TEXTS, ""]) == [tokenizer.encode(text) for text in [*TEXTS, ""]]
    assert tokenizer.encode_batch([]) == []


def test_byte_lengths(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXTS[2])
    assert tokenizer.byte_lengths.dtype == np.int64
    assert tokenizer.byte_lengths.shape == (300,)
    assert tokenizer.byte_lengths[ids].sum() == len(TEXTS[2].encode())
    assert tokenizer.byte_lengths[-3:].tolist() == [0, 0, 0]


def test_training_is_deterministic_across_processes(tokenizer: Tokenizer) -> None:
    code = f"from nano_think.tokenizer import train_bpe; print(train_bpe({TEXTS!r}, 300).hash)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == tokenizer.hash == train_bpe(iter(TEXTS), 300).hash


def test_hash_tells_vocabularies_and_patterns_apart(tokenizer: Tokenizer) -> None:
    ranks = {tokenizer.token_bytes(i): i for i in range(297)}
    assert Tokenizer(ranks, BPE_PATTERN).hash == tokenizer.hash
    assert Tokenizer(ranks, GPT2_PATTERN).hash != tokenizer.hash
    swapped = {**ranks, tokenizer.token_bytes(295): 296, tokenizer.token_bytes(296): 295}
    assert Tokenizer(swapped, BPE_PATTERN).hash != tokenizer.hash


def test_save_and_load(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.hash, loaded.vocab_size, loaded.pattern) == (tokenizer.hash, 300, BPE_PATTERN)
    assert loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    # The same path with another vocabulary must not read as the old one.
    other = train_bpe(TEXTS, 280)
    other.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == other.hash
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks.tiktoken", "tokenizer.json"]


def test_damaged_files_are_refused(tokenizer: Tokenizer, tmp_path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer in .* train one"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    train_bpe(TEXTS, 280).save(tmp_path / "other")
    ranks = tmp_path / "ranks.tiktoken"
    ranks.write_bytes((tmp_path / "other" / "ranks.tiktoken").read_bytes())
    with pytest.raises(UserError, match="do not belong together"):
        Tokenizer.load(tmp_path)
    ranks.write_text("not base64!\n")
    with pytest.raises(UserError, match="damaged"):
        Tokenizer.load(tmp_path)


def test_vocabulary_beyond_the_text_says_what_is_possible() -> None:
    with pytest.raises(UserError, match=r"supports only (\d+) tokens") as caught:
        train_bpe(["ab ab ab"], 4096)
    supported = int(regex.search(r"only (\d+)", str(caught.value)).group(1))
    assert "tokenizer.vocab_size" in str(caught.value)
    assert train_bpe(["ab ab ab"], supported).vocab_size == supported
    with pytest.raises(UserError, match="at least 259"):
        train_bpe(["ab"], 258)
    with pytest.raises(UserError, match="supports only 259"):
        train_bpe([], 300)


def test_gpt2_from_rank_file_and_from_json(tokenizer: Tokenizer, tmp_path) -> None:
    tokens = [tokenizer.token_bytes(i) for i in range(297)]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "gpt2.tiktoken").write_text("\n".join(lines) + "\n")
    letters = gpt2_letters()
    table = {"".join(letters[value] for value in token): rank for rank, token in enumerate(tokens)}
    (tmp_path / "encoder.json").write_text(json.dumps({**table, "<|endoftext|>": 297}))

    from_folder = gpt2_tokenizer(tmp_path / "ranks")
    from_json = gpt2_tokenizer(tmp_path / "encoder.json")
    assert from_folder.hash == from_json.hash
    assert from_folder.pattern == GPT2_PATTERN
    assert from_folder.vocab_size == 300
    text = "<|endoftext|> it's 12345  times\n\n ok"
    assert from_json.encode(text) == slow_bpe(from_folder, text)
    assert from_json.decode(from_json.encode(text)) == text


def test_gpt2_without_its_file_says_what_is_needed(tmp_path) -> None:
    for path in (tmp_path, tmp_path / "gpt2.tiktoken"):
        with pytest.raises(UserError, match=r"put gpt2\.tiktoken or encoder\.json there"):
            gpt2_tokenizer(path)
    (tmp_path / "gpt2.tiktoken").write_text("YQ== 0\n")
    with pytest.raises(UserError, match="is not a GPT-2 vocabulary"):
        gpt2_tokenizer(tmp_path)


def test_ranks_must_be_complete() -> None:
    single = {bytes([value]): value for value in range(256)}
    with pytest.raises(ValueError, match="each once"):
        Tokenizer({**single, b"ab": 300}, BPE_PATTERN)
    with pytest.raises(ValueError, match="256 single bytes"):
        Tokenizer({bytes([value]): value for value in range(255)}, BPE_PATTERN)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer.json", b'{"pattern": ["a"]}'),
        ("ranks.tiktoken", b"\xff\xfe"),
        ("ranks.tiktoken", b"YQ== 0\n"),
        ("ranks.tiktoken", b"YQ== " + b"9" * 6000),
        ("ranks.tiktoken", b"YQ==\n"),
    ],
    ids=range(9),
)
def test_files_of_something_else_are_damage(tokenizer, tmp_path, file, content) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged \(.*delete it and train it again"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"hash": "0" * 32},
        {"vocab_size": 7},
        {"specials": {}},
        {"format": 2},
        {"more": 1},
        {"pattern": GPT2_PATTERN},
    ],
    ids=str,
)
def test_a_description_of_another_vocabulary_is_refused(tokenizer, tmp_path, change) -> None:
    tokenizer.save(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(description | change))
    with pytest.raises(UserError, match="do not belong together"):
        Tokenizer.load(tmp_path)


def test_a_pattern_of_somebody_else_is_never_compiled(tokenizer, tmp_path) -> None:
    """An expression can take for ever or end the process, whatever hash stands beside it."""
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pattern": "(a+)+$"}))
    with pytest.raises(UserError, match="its pattern is none of ours"):
        Tokenizer.load(tmp_path)
