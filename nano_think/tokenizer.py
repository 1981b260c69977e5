"""Byte-level BPE: trained by rustbpe, encoded by tiktoken, stored as two small files with a hash.

A vocabulary is a table of ranks (byte string -> id; merging prefers the lower id) plus a pattern that cuts
text into pieces no merge may cross. The three special tokens take the last ids and belong to `vocab_size`.
They are never produced from plain text: a document that contains the characters "<|eos|>" is encoded as those
characters.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rustbpe
import tiktoken

from nano_think.errors import UserError, brief
from nano_think.files import atomic_write, hash_bytes, read_json, write_json

SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>")

# Where pieces end, tried in this order at every place:
#   contractions | a word with the one mark or blank before it | one or two digits (long numbers would eat a
#   small vocabulary) | a run of marks, line ends after it included | blanks up to a line end | blanks before
#   a blank, so that the last blank joins the next word | a blank.
# Runs of blanks are bounded because the look-ahead backtracks: a megabyte of spaces would overflow its stack.
BPE_PATTERN = "|".join(
    (
        r"'(?i:[sdmt]|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?+[\p{L}\p{M}]++",
        r"\p{N}{1,2}+",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*+",
        r"\s{0,128}[\r\n]",
        r"\s{1,128}(?!\S)",
        r"\s",
    )
)

# The pattern GPT-2 was trained with (Radford et al. 2019, `encoder.py`), without which its ranks mean nothing;
# only the run of blanks is bounded, for the reason above and far beyond what text contains.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s{1,9999}(?!\S)|\s+"

# What a tokenizer on disk may cut with. A pattern that is changed stays here under another name.
PATTERNS = (BPE_PATTERN, GPT2_PATTERN)

_RANKS_FILE = "ranks.tiktoken"
_DESCRIPTION_FILE = "tokenizer.json"


class Tokenizer:
    """A fixed vocabulary.

    Args:
        ranks: every ordinary token's bytes -> id; the ids are 0 .. n-1 and contain all 256 single bytes.
        pattern: regular expression of the pieces, in the syntax of fancy-regex.

    Raises:
        ValueError: ids have gaps or a single byte is missing.
    """

    def __init__(self, ranks: Mapping[bytes, int], pattern: str) -> None:
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(
                f"the {len(ranks)} ranks of a vocabulary must be the numbers from 0 up, each once"
            )
        if any(bytes([value]) not in ranks for value in range(256)):
            raise ValueError("a byte-level vocabulary must contain all 256 single bytes")
        self.pattern = pattern
        self._tokens: list[bytes] = sorted(ranks, key=ranks.__getitem__)
        self.bos_id, self.eos_id, self.pad_id = (len(ranks) + offset for offset in range(len(SPECIALS)))
        self.vocab_size = len(ranks) + len(SPECIALS)
        self.hash = hash_bytes(pattern.encode(), *(name.encode() for name in SPECIALS), *self._tokens)
        self.byte_lengths = np.array([len(self.token_bytes(i)) for i in range(self.vocab_size)], np.int64)
        # The specials are deliberately not registered: tiktoken then has no way to produce them.
        self._encoding = tiktoken.Encoding(
            self.hash, pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without special tokens; a lone surrogate is encoded as U+FFFD."""
        return self._encoding.encode_ordinary(_valid_unicode(text))

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as uint32 (n,); tiktoken's own way to an array looks for special tokens and is slower."""
        return np.array(self.encode(text), dtype=np.uint32)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 2) -> list[list[int]]:
        """`encode` of every text, on `num_threads` threads."""
        cleaned = [_valid_unicode(text) for text in texts]
        return self._encoding.encode_ordinary_batch(cleaned, num_threads=num_threads)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes the ids stand for; special tokens stand for none."""
        return b"".join(self.token_bytes(int(i)) for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, b"" for a special one.

        Raises:
            IndexError: the id is not in the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise IndexError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return self._tokens[token_id] if token_id < len(self._tokens) else b""

    def save(self, directory: str | Path) -> None:
        """Write the ranks (tiktoken's text format) and, last, the description with the hash."""
        directory = Path(directory)
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(self._tokens))
        atomic_write(directory / _RANKS_FILE, "".join(lines))
        write_json(directory / _DESCRIPTION_FILE, self._description())

    def _description(self) -> dict[str, Any]:
        """What lies beside the ranks."""
        return {
            "format": 1,
            "vocab_size": self.vocab_size,
            "pattern": self.pattern,
            "specials": dict(zip(SPECIALS, (self.bos_id, self.eos_id, self.pad_id), strict=True)),
            "hash": self.hash,
        }

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read what `save` wrote.

        Raises:
            UserError: files are missing, unreadable or do not belong together.
        """
        directory = Path(directory)
        try:
            description = read_json(directory / _DESCRIPTION_FILE)
            if description["pattern"] not in PATTERNS:
                # an expression is a program: one of somebody else's could take for ever, or end the process
                raise ValueError("its pattern is none of ours")
            tokenizer = cls(_read_ranks(directory / _RANKS_FILE), description["pattern"])
        except FileNotFoundError as error:
            raise UserError(
                f"no tokenizer in {directory}: train one with `python train.py phase=tokenizer`"
            ) from error
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"the tokenizer in {directory} is damaged ({brief(error)}): delete it and train it again"
            ) from error
        if tokenizer._description() != description:
            raise UserError(
                f"the two files of the tokenizer in {directory} do not belong together: train it again"
            )
        return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a vocabulary of `vocab_size` tokens, special tokens included; the same texts give the same one.

    Byte pair encoding (Sennrich et al. 2016, 1508.07909) over bytes: the most frequent pair of neighbours
    inside the pieces of `BPE_PATTERN` becomes a token, over and over.

    Raises:
        UserError: `vocab_size` has no room for bytes and specials, or the text has too few pairs to merge.
    """
    smallest = 256 + len(SPECIALS)
    if vocab_size < smallest:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIALS)} special tokens "
            f"need at least {smallest}"
        )
    trainer = rustbpe.Tokenizer()
    valid: Iterator[str] = (_valid_unicode(text) for text in texts)
    trainer.train_from_iterator(valid, vocab_size=vocab_size - len(SPECIALS), pattern=BPE_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    supported = len(ranks) + len(SPECIALS)
    if supported < vocab_size:
        raise UserError(
            f"the text supports only {supported} tokens, fewer than tokenizer.vocab_size={vocab_size}: "
            f"set tokenizer.vocab_size to {supported} or lower, or add text"
        )
    return Tokenizer(ranks, BPE_PATTERN)


def gpt2_tokenizer(path: str | Path) -> Tokenizer:
    """GPT-2's vocabulary from a local file; nothing is downloaded.

    Args:
        path: `gpt2.tiktoken` (a line per token: base64 and rank), `encoder.json` or `vocab.json` (token ->
            id; GPT-2's ids are its ranks, so that `vocab.bpe` is not needed), or a directory that holds one
            of them.

    Raises:
        UserError: there is no such file, or it is not a byte-level vocabulary.
    """
    path = Path(path)
    names = ("gpt2.tiktoken", "encoder.json", "vocab.json")
    candidates = [path / name for name in names] if path.is_dir() else [path]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UserError(
            f"the GPT-2 vocabulary is not at {path}: put gpt2.tiktoken or encoder.json there "
            "and name the file or its folder with tokenizer.path"
        )
    try:
        ranks = _read_gpt2_json(found) if found.suffix == ".json" else _read_ranks(found)
        return Tokenizer(ranks, GPT2_PATTERN)
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{found} is not a GPT-2 vocabulary ({error}): fetch gpt2.tiktoken again") from error


def _valid_unicode(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Parse tiktoken's text format; its own loader caches by path and misses that a file has changed."""
    pairs = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}


def _read_gpt2_json(path: Path) -> dict[bytes, int]:
    """Undo GPT-2's notation, in which each byte is one printable character; named specials are left out.

    Bytes that are printable in Latin-1 stand for themselves, the others for U+0100, U+0101 and so on in
    order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(value): value for value in printable}
    hidden = (value for value in range(256) if value not in set(printable))
    byte_of.update({chr(0x100 + offset): value for offset, value in enumerate(hidden)})
    table = json.loads(path.read_text(encoding="utf-8"))
    return {
        bytes(byte_of[character] for character in token): rank
        for token, rank in table.items()
        if token != "<|endoftext|>"
    }
