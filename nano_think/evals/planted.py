"""Does memory let a model use what an earlier session said? Facts told in one session and asked for in the next.

A fact is a word that goes with an invented name. Session 1 tells it, by the engine's own way of writing; session 2
begins with the same words and is scored on the word alone. Sessions of their own hold the same names with words
exchanged (shuffled) and other names with other words (random): only a fact that helps where those do not was
recalled.

Letters: F facts, m tokens of a chunk, L positions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nano_think.artifacts.memory import Memory
from nano_think.engine.session import remember
from nano_think.evals.bootstrap import paired_difference
from nano_think.evals.losses import Batch, DocumentLosses, evaluate_models
from nano_think.evals.retrieval_evidence import differences_json
from nano_think.model import NanoThink
from nano_think.retrieval import MemorySlots
from nano_think.tokenizer import Tokenizer
from nano_think.vector_records import Reader, session_id

# Parted by blanks.
SYLLABLES = "ba do fen gar hul jor kem lin mor nas pel quo rin sar tov ulm vex wil yor zan"
WORDS = (
    "apple anchor arrow basket bell bird book bread bridge candle castle cloud coat corn crown desert "
    "door dream eagle earth fire fish flower forest garden gate ghost glass gold grass hammer hand "
    "harbour heart hill horse house iron island king knife ladder lake lamp leaf letter light lion milk "
    "mirror moon mountain night oak ocean paper path pearl river road rock rose salt sand sea shadow "
    "shield ship silver sky snow song star stone storm sun sword table thunder tower tree valley voice "
    "wall water wheel wind window winter wolf wood year"
)
TOLD = ("own", "shuffled", "random")
TIMES_TOLD = 3


@dataclass(frozen=True)
class Fact:
    """cue: the m tokens before; stem: the words that lead to the answer, and the answer's tokens."""

    cue: list[int]
    stem: list[int]
    answer: list[int]

    @property
    def told(self) -> list[int]:
        """Session 1: the cue, then the fact, repeated."""
        return self.cue + TIMES_TOLD * (self.stem + self.answer)

    @property
    def asked(self) -> list[int]:
        """Session 2, the answer included."""
        return self.cue + self.stem + self.answer


def invented_facts(tokenizer: Tokenizer, count: int, chunk: int, seed: int = 0) -> list[Fact]:
    """`count` facts about different invented names, with words drawn at random."""
    generator, facts, names = random.Random(seed), list[Fact](), set[str]()
    syllables, words = SYLLABLES.split(), WORDS.split()
    while len(facts) < count:
        name = " ".join("".join(generator.choices(syllables, k=3)).capitalize() for _ in range(2))
        if name in names:
            continue
        names.add(name)
        about = f"{name} came to the {generator.choice(words)} and spoke of {name}. "
        intro = tokenizer.encode(about * (2 + chunk // 8))
        stem, answer = tokenizer.encode(f" The word of {name} is"), f" {generator.choice(words)}"
        facts.append(Fact([tokenizer.bos_id, *intro[: chunk - 1]], stem, tokenizer.encode(answer)))
    return facts


def planted_facts(
    model: NanoThink,
    memory: Memory,
    tokenizer: Tokenizer,
    *,
    count: int = 100,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Any]:
    """A265. The store is left as it was.

    {facts, answer_tokens, retrieved, modes: {off | own | shuffled | random: {loss, accuracy}}, differences:
    {"own - off" | "own - shuffled" | "own - random": difference}, recalls}. loss: nats a token of the answers;
    accuracy: share of first answer tokens that are the likeliest; retrieved: share of facts among their own hits;
    recalls: the own fact is better than shuffled ones, random ones and no memory.
    """
    model.eval()
    facts = invented_facts(tokenizer, count, memory.retriever.chunk, seed)
    others = invented_facts(tokenizer, count, memory.retriever.chunk, seed + 1)
    rolled = [replace(fact, answer=facts[i - 1].answer) for i, fact in enumerate(facts)]
    told = dict(zip(TOLD, (facts, rolled, others), strict=True))
    batch = _asked(facts, tokenizer.pad_id)
    losses, right = {}, {}
    losses["off"], right["off"] = _score(model, batch, None)
    for mode in TOLD:
        with _telling(memory, model, told[mode], session_id(f"planted {mode}")) as reader:
            slots = memory.retriever.retrieve(batch["tokens"], reader=reader)
            losses[mode], right[mode] = _score(model, batch, slots)
            if mode == "own":
                retrieved = _retrieved(memory, facts, batch["first"], slots)
    pairs = [("own", "off"), ("own", "shuffled"), ("own", "random")]
    differences = {
        f"{a} - {b}": paired_difference(losses[a], losses[b], n_resamples=resamples, seed=seed)
        for a, b in pairs
    }
    return {
        "facts": count,
        "answer_tokens": int(losses["off"].num_tokens.sum()),
        "retrieved": retrieved,
        "modes": {name: {"loss": losses[name].loss(), "accuracy": right[name]} for name in losses},
        "differences": differences_json(differences),
        "recalls": all(value.verdict == "better" for value in differences.values()),
    }


@contextmanager
def _telling(memory: Memory, model: NanoThink, facts: Sequence[Fact], session: int) -> Iterator[Reader]:
    """Who asks in a session in which these facts were told; the session is forgotten afterwards."""
    generation = memory.store.generation
    try:
        for fact in facts:
            remember(memory, model, fact.told, session)
        yield Reader(session=session)
    finally:
        memory.store.reset(session)
        memory.store.generation = generation


def _asked(facts: Sequence[Fact], pad_id: int) -> Batch:
    """The questions as rows (F, L), labelled at their answers alone; `first` (F,) is where an answer begins."""
    length = max(len(fact.asked) for fact in facts)
    tokens = torch.full((len(facts), length), pad_id)
    labels = torch.full_like(tokens, -100)
    for row, fact in enumerate(facts):
        whole, begin = torch.tensor(fact.asked), len(fact.cue) + len(fact.stem)
        tokens[row, : len(whole)] = whole
        # pads lie behind everything that is scored, so that causality alone keeps them out
        labels[row, begin - 1 : len(whole) - 1] = whole[begin:]
    first = (labels >= 0).int().argmax(1)
    uid = torch.arange(len(facts))
    batch = {"tokens": tokens, "labels": labels, "doc_uid": uid[:, None].expand_as(tokens)}
    return batch | {"domain": torch.zeros_like(uid), "first": first}


@torch.no_grad()
def _score(model: NanoThink, batch: Batch, slots: MemorySlots | None) -> tuple[DocumentLosses, float]:
    """Losses of the answers, a document a fact, and how many first tokens are the likeliest ones."""
    output = model(batch["tokens"], memory=slots)
    rows = torch.arange(len(batch["first"]))
    guessed = output.logits[rows, batch["first"]].argmax(-1)
    right = guessed == batch["labels"][rows, batch["first"]]
    nll = model.nll(output, batch["labels"])
    losses = evaluate_models({"model": lambda _: nll}, [batch], np.ones(model.vocab_size), 1)["model"]
    return losses, float(right.float().mean())


def _retrieved(memory: Memory, facts: Sequence[Fact], first: Tensor, slots: MemorySlots) -> float:
    """Share of facts of which a record is among the hits that the beginning of the answer sees."""
    if slots.hits is None:
        return 0.0
    count = 0
    for row, fact in enumerate(facts):
        group = int(slots.index[row, first[row]])
        if group < 0:
            continue
        found = memory.store.lookup(slots.hits.ids[row, group])
        spans = zip(found["token_offset"].tolist(), found["tokens"].tolist(), strict=True)
        count += any(tokens == fact.told[begin : begin + len(tokens)] for begin, tokens in spans)
    return count / len(facts)
