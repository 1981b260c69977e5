"""From text to batches: tokenizer training and encoding beside HF tokenizers and tiktoken, shards, the loader."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch

from benchmarks.harness import Case, Group, Measured, Missing, Options
from benchmarks.harness.case import GateError, installed
from nano_think.data.builtin_stdlib import code_documents
from nano_think.data.documents import Document
from nano_think.data.module import TokenDataModule
from nano_think.data.prepare import prepare_corpus
from nano_think.data.shards import Shards, build_shards
from nano_think.tokenizer import BPE_PATTERN, Tokenizer, train_bpe

MEGABYTES, QUICK_MEGABYTES = 6.0, 0.5
VOCABULARY, QUICK_VOCABULARY = 32_000, 512
BATCH, LENGTH = 8, 512
SAME_SIZE = 0.03  # by so much the bytes a token of two trainers may differ
HF_TRAINING, HF_ENCODING = "HF tokenizers, training", "HF tokenizers, encoding"


def group(options: Options) -> Group:
    """Everything on the same text: the Python sources of the standard library."""
    library = Library(QUICK_MEGABYTES if options.quick else MEGABYTES)
    vocabulary = QUICK_VOCABULARY if options.quick else VOCABULARY
    ours = [*_tokenizing(library, vocabulary), *_reading(library, vocabulary)]
    peers = _hugging_face(library, vocabulary) if installed("tokenizers") else []
    missing = [] if peers else [Missing(n, "pip install tokenizers") for n in (HF_TRAINING, HF_ENCODING)]
    of_text = [case.name for case in (*ours, *peers) if case.tokens == library.num_bytes]
    notes = (
        "tok: bytes of text; for loader and gather, tokens. Both trainers get the same pattern.",
        "Plain gather: random rows of one stream without labels, documents or an order to come back to.",
    )
    return Group(
        f"{library.num_bytes / 1e6:.1f} MB of Python, vocabulary {vocabulary}, batches of {BATCH} x {LENGTH}",
        [*ours, *peers],
        missing,
        notes,
        {f"{name}: MB a CPU second": partial(_megabytes, name, library.num_bytes) for name in of_text},
    )


def _tokenizing(library: Library, vocabulary: int) -> list[Case]:
    made = partial(made_of, library, vocabulary)
    return [
        Case(
            "nano_think, training",
            setup=lambda: partial(train_bpe, library.texts, vocabulary),
            tokens=library.num_bytes,
            peers=(HF_TRAINING,),
        ),
        Case(
            "nano_think, encoding",
            setup=lambda: partial(encode, made().tokenizer.encode_array, library.texts),
            tokens=library.num_bytes,
            peers=(HF_ENCODING, "tiktoken, encoding"),
            check=lambda: round_trip(made().tokenizer, library.texts),
        ),
        Case(
            "tiktoken, encoding",
            setup=lambda: partial(encode, plain_tiktoken(made().tokenizer).encode_ordinary, library.texts),
            tokens=library.num_bytes,
            check=lambda: same_ids(made().tokenizer, library.texts),
        ),
        Case(
            "text to shards, one process",
            setup=lambda: partial(text_to_shards, library, vocabulary),
            tokens=library.num_bytes,
            max_rounds=3,
        ),
    ]


def _reading(library: Library, vocabulary: int) -> list[Case]:
    made = partial(made_of, library, vocabulary)
    return [
        Case(
            "nano_think, loader",
            setup=lambda: batches(made().shards),
            tokens=BATCH * LENGTH,
            peers=("plain gather",),
            check=lambda: right_labels(made().shards),
        ),
        Case("plain gather", setup=lambda: gather(made().shards), tokens=BATCH * LENGTH),
    ]


def _hugging_face(library: Library, vocabulary: int) -> list[Case]:
    made, trained = partial(made_of, library, vocabulary), partial(hugging_face, library, vocabulary)
    return [
        Case(HF_TRAINING, setup=lambda: trained, tokens=library.num_bytes),
        Case(
            HF_ENCODING,
            setup=lambda: partial(trained().encode_batch_fast, library.texts, add_special_tokens=False),
            tokens=library.num_bytes,
            check=lambda: same_size(trained(), made().tokenizer, library.texts),
        ),
    ]


class Library:
    """Python sources as a `Source` of one domain, about so many megabytes."""

    def __init__(self, megabytes: float) -> None:
        self.documents: list[Document] = []
        self.num_bytes = 0
        for document in code_documents():
            if self.num_bytes >= megabytes * 1e6:
                break
            self.documents.append(document)
            self.num_bytes += len(document.text.encode())
        self.texts = [document.text for document in self.documents]

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)

    def fingerprint(self) -> str:
        return str(self.num_bytes)

    def describe(self) -> dict[str, Any]:
        return {"name": "library", "domains": ["code"], "licences": {}, "synthetic": {}}

    def skipped(self) -> dict[str, Any]:
        return {}


class Made:
    """Tokenizer and shards of a library, in a folder that lives as long as this object."""

    def __init__(self, library: Library, vocabulary: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.tokenizer, self.shards = build(library, vocabulary, Path(self._folder.name))


@lru_cache(1)
def made_of(library: Library, vocabulary: int) -> Made:
    """One for all cases."""
    return Made(library, vocabulary)


def build(library: Library, vocabulary: int, folder: Path) -> tuple[Tokenizer, Shards]:
    """What `phase=data` does, in one process."""
    corpus = prepare_corpus(library, folder / "corpus", processes=1)
    records = (record.text for record in corpus.documents("expert_train", "code"))
    tokenizer = train_bpe(records, vocabulary)
    return tokenizer, build_shards(corpus, tokenizer, folder / "shards", processes=1)


def text_to_shards(library: Library, vocabulary: int) -> None:
    """Everything from documents to tokens on disk, into a fresh folder."""
    with tempfile.TemporaryDirectory() as folder:
        build(library, vocabulary, Path(folder))


def encode(method: Callable[[str], object], texts: Sequence[str]) -> None:
    """Every text once."""
    for text in texts:
        method(text)


def plain_tiktoken(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """tiktoken with our ranks and pattern."""
    ranks = {tokenizer.token_bytes(i): i for i in range(tokenizer.bos_id)}
    return tiktoken.Encoding("plain", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens={})


def hugging_face(library: Library, vocabulary: int) -> Any:
    """A byte-level BPE of the same size and pattern, trained by HF tokenizers.

    In its regular expressions a `+` behind a bound is not a possessive mark; without any such mark the pattern
    cuts text at the same places, only with more backtracking.
    """
    from tokenizers import Regex
    from tokenizers import Tokenizer as Peer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from tokenizers.trainers import BpeTrainer

    pattern = Regex(re.sub(r"(?<=[+?*}])\+", "", BPE_PATTERN))
    peer = Peer(BPE())
    peer.pre_tokenizer = Sequence(
        [Split(pattern, "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    peer.decoder = Decoder()
    size = vocabulary - 3  # our vocabulary size counts three special tokens
    peer.train_from_iterator(
        library.texts,
        BpeTrainer(vocab_size=size, initial_alphabet=ByteLevel.alphabet(), show_progress=False),
    )
    return peer


def batches(shards: Shards) -> Callable[[], object]:
    """The next batch of the data module, epoch after epoch."""

    def endless() -> Iterator[object]:
        module = TokenDataModule(shards.directory, seq_len=LENGTH, batch_size=BATCH)
        while True:
            yield from module.train_dataloader()

    return partial(next, endless())


def gather(shards: Shards) -> Callable[[], object]:
    """Random rows by one indexing of the memory map."""
    tokens, generator = shards.tokens("expert_train", "code"), np.random.default_rng(0)
    row = np.arange(LENGTH + 1)

    def draw() -> torch.Tensor:
        at = generator.integers(0, len(tokens) - LENGTH, (BATCH, 1))
        return torch.from_numpy(tokens[at + row].astype(np.int64))

    return draw


def round_trip(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Decoding gives the text back, and the whole vocabulary was learnt."""
    for text in texts:
        if tokenizer.decode(tokenizer.encode_array(text)) != text:
            raise GateError(f"not given back: {text[:60]!r}")


def same_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Ours are tiktoken's."""
    plain = plain_tiktoken(tokenizer)
    if any(plain.encode_ordinary(text) != tokenizer.encode_array(text).tolist() for text in texts):
        raise GateError("ids differ from tiktoken's")


def same_size(peer: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """The peer gives the text back and needs about as many tokens."""
    encoded = peer.encode_batch(texts, add_special_tokens=False)
    if any(peer.decode(e.ids) != text for e, text in zip(encoded, texts, strict=True)):
        raise GateError("HF tokenizers does not give the text back")
    theirs, own = sum(len(e.ids) for e in encoded), sum(len(tokenizer.encode_array(t)) for t in texts)
    if abs(theirs / own - 1) > SAME_SIZE:
        raise GateError(f"HF tokenizers needs {theirs} tokens where ours needs {own}: not the same work")


def right_labels(shards: Shards) -> None:
    """A batch's labels are its tokens shifted, wherever the document goes on."""
    for batch in TokenDataModule(shards.directory, seq_len=LENGTH, batch_size=BATCH).train_dataloader():
        goes_on = batch["segments"][:, 1:] == batch["segments"][:, :-1]
        if not (batch["labels"][:, :-1] == batch["tokens"][:, 1:])[goes_on].all() or not goes_on.any():
            raise GateError("labels are not the next tokens")
        return


def _megabytes(name: str, num_bytes: int, measured: Measured) -> float:
    return measured.over_rounds(
        lambda seconds: num_bytes / 1e6 / seconds[name] if name in seconds else np.nan
    )
