"""The same batch with its own memory, with another document's, with any text's, and with none.

That memory lowers the loss does not say that retrieval found anything: more vectors to attend to may do that as
well. So the same slots are filled with what another document of the batch found, and with records drawn at random
under the same rules of who may see what.

Letters: B rows, L positions, U groups of slots in a row, k slots of a group, G visible groups of a batch, m chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nano_think.artifacts.memory import SPLIT, Memory
from nano_think.evals.losses import Batch
from nano_think.ops.seeding import mixed_seed
from nano_think.retrieval import MemorySlots
from nano_think.vector_records import Reader

MODES = ("none", "real", "shuffled", "random")
# Real hits without those of the reader's own source, where sources are known.
OTHER_SOURCES = "other sources"


@dataclass(frozen=True)
class Groups:
    """The groups of slots that some token of a batch sees: (G,) each.

    rows, groups: where the slots lie. columns: the first token that sees them.
    """

    rows: Tensor
    groups: Tensor
    columns: Tensor

    @classmethod
    def of(cls, slots: MemorySlots) -> Groups:
        """All of them, in reading order."""
        index = slots.index
        first = (index >= 0) & (index != torch.roll(index, 1, dims=1))
        first[:, 0] = index[:, 0] >= 0
        rows, columns = first.nonzero(as_tuple=True)
        return cls(rows, index[rows, columns], columns)

    def at(self, column: Tensor) -> Tensor:
        """Values (G,) of a column (B, L) at the groups' first tokens."""
        return column[self.rows, self.columns]


class MemoryModes:
    """Slots of a batch in each mode.

    source_of: source number by document, of readers and of stored documents; adds the mode "other sources".
    seed: of the donors and of the random records; batches are numbered, so that a batch has one set of each.
    """

    def __init__(self, memory: Memory, source_of: Mapping[int, int] | None = None, seed: int = 0) -> None:
        self.memory, self.source_of, self.seed = memory, source_of, seed

    @property
    def names(self) -> tuple[str, ...]:
        """The modes there are."""
        return MODES if self.source_of is None else (*MODES, OTHER_SOURCES)

    def slots(self, batch: Batch, number: int = 0) -> dict[str, MemorySlots | None]:
        """What the batch with this number sees in each mode; None is no memory."""
        real = self.memory.slots(batch)
        modes: dict[str, MemorySlots | None] = {"none": None, "real": real}
        seed = mixed_seed(self.seed, number)
        modes["shuffled"] = self._shuffled(real, batch, seed)
        modes["random"] = self._random(real, batch, seed)
        if self.source_of is not None:
            modes[OTHER_SOURCES] = self._other_sources(real, batch, self.source_of)
        return modes

    def _shuffled(self, real: MemorySlots, batch: Batch, seed: int) -> MemorySlots:
        """Every group gets the hits of another document's, of the same domain where the batch holds one.

        The rule of who may see a record holds for the new reader too.
        """
        groups = Groups.of(real)
        if real.hits is None or len(groups.rows) == 0:
            return real
        uid, cluster = groups.at(batch["doc_uid"]), groups.at(batch["cluster"])
        domain = batch["domain"][groups.rows]
        foreign = (uid[:, None] != uid) & ((cluster[:, None] != cluster) | (cluster[:, None] < 0))
        alike = foreign & (domain[:, None] == domain)
        eligible = torch.where(alike.any(1, keepdim=True), alike, foreign)
        generator = torch.Generator().manual_seed(seed)
        # a group without any donor draws one all the same and sees nothing of it
        draws = torch.where(eligible.any(1, keepdim=True), eligible, torch.ones_like(eligible))
        donor = torch.multinomial(draws.float(), 1, generator=generator)[:, 0]
        there = groups.rows[donor], groups.groups[donor]
        ids = real.hits.ids[there]
        stored = self.memory.store.lookup(ids)
        valid = real.valid[there] & eligible.any(1, keepdim=True)
        for name, own in (("doc_uid", uid), ("cluster", cluster)):
            theirs = torch.from_numpy(stored[name])
            valid &= (theirs != own[:, None]) | (own[:, None] < 0)
        return _filled(real, groups, real.values[there], valid, real.hits.scores[there])

    def _random(self, real: MemorySlots, batch: Batch, seed: int) -> MemorySlots:
        """Every group gets as many records as it found, any that its reader may see."""
        groups = Groups.of(real)
        reader = Reader(groups.at(batch["doc_uid"]), groups.at(batch["cluster"]), splits=(SPLIT,))
        found = self.memory.store.draw(len(groups.rows), self.memory.retriever.k, reader, seed)
        valid = found.valid & real.valid[groups.rows, groups.groups]
        return _filled(real, groups, found.values, valid)

    def _other_sources(self, real: MemorySlots, batch: Batch, source_of: Mapping[int, int]) -> MemorySlots:
        """The real hits without those whose source is the reader's; of an unknown source nothing is left out."""
        groups = Groups.of(real)
        if real.hits is None or len(groups.rows) == 0:
            return real
        own = _sources(groups.at(batch["doc_uid"]).numpy(), source_of)
        there = groups.rows, groups.groups
        theirs = _sources(self.memory.store.lookup(real.hits.ids[there])["doc_uid"], source_of)
        same = torch.from_numpy((theirs == own[:, None]) & (theirs >= 0))
        return _filled(real, groups, real.values[there], real.valid[there] & ~same)


def _sources(uid: np.ndarray, source_of: Mapping[int, int]) -> np.ndarray:
    return np.array([source_of.get(int(one), -1) for one in uid.flat], np.int64).reshape(uid.shape)


def _filled(
    slots: MemorySlots, groups: Groups, values: Tensor, valid: Tensor, scores: Tensor | None = None
) -> MemorySlots:
    """The slots with values (G, k, d), validity and perhaps scores (G, k) of the visible groups replaced.

    Records that nobody asked for keep the scores of those whose place they take. No hits are told.
    """
    there = groups.rows, groups.groups
    new_values, new_valid = slots.values.clone(), slots.valid.clone()
    new_values[there], new_valid[there] = values, valid
    new_scores = None if slots.scores is None else slots.scores.clone()
    if new_scores is not None and scores is not None:
        new_scores[there] = scores
    if new_valid.shape[1] == 0:
        return replace(slots, hits=None)
    fruitless = ~new_valid.any(-1).gather(1, slots.index.clamp_min(0))
    return MemorySlots(new_values, new_valid, slots.index.masked_fill(fruitless, -1), scores=new_scores)


def hit_texts(memory: Memory, ids: Tensor) -> Tensor:
    """Tokens (..., 2 m) of the records with these logical ids and of the chunks after them; -1 is a pad."""
    columns, capacity = memory.store.columns, memory.store.capacity
    count = len(columns["chunk"])
    slots = np.where(ids.numpy() >= 0, ids.numpy() % capacity, 0)
    after = (slots + 1) % max(count, 1)
    # chunks are written in reading order, so that the one after lies in the next place if it was stored
    goes_on = columns["chunk"][after] == columns["chunk"][slots] + 1
    for name in ("doc_uid", "session"):
        goes_on &= columns[name][after] == columns[name][slots]
    own, following = columns["tokens"][slots], columns["tokens"][after]
    following = np.where(goes_on[..., None], following, -1)
    texts = np.concatenate((own, following), axis=-1)
    return torch.from_numpy(np.where(ids.numpy()[..., None] >= 0, texts, -1))


def common_run(chunk: Tensor, texts: Tensor) -> Tensor:
    """Length (G,) of the longest run of tokens that a chunk (G, m) shares with any of its texts (G, k, w).

    -1 are pads, which equal nothing. By the table of common suffixes, one row of it at a time.
    """
    ends = torch.zeros_like(texts)
    longest = torch.zeros(len(chunk), dtype=texts.dtype)
    for token in chunk.unbind(1):
        before = torch.nn.functional.pad(ends[..., :-1], (1, 0))
        same = (texts == token[:, None, None]) & (token >= 0)[:, None, None]
        ends = torch.where(same, before + 1, torch.zeros_like(before))
        longest = torch.maximum(longest, ends.flatten(1).amax(1))
    return longest


def overlap(memory: Memory, slots: MemorySlots, batch: Batch, least: int = 8) -> Tensor:
    """Share (B, L) of a token's chunk that is one run copied from its hits; -1 where a token sees nothing.

    RETRO's measure of leakage (arXiv 2112.04426, section 2.6): longest common run of a chunk and its neighbours,
    continuation included, over the length of the chunk. Runs below `least` tokens count as none.
    """
    groups, m = Groups.of(slots), memory.retriever.chunk
    share = torch.full(slots.index.shape, -1.0)
    if slots.hits is None or len(groups.rows) == 0:
        return share
    begin = groups.columns - groups.at(batch["positions"]) % m
    columns = begin[:, None] + torch.arange(m)
    inside, columns = columns < slots.index.shape[1], columns.clamp_max(slots.index.shape[1] - 1)
    rows = groups.rows[:, None]
    inside &= batch["segments"][rows, columns] == groups.at(batch["segments"])[:, None]
    chunk = batch["tokens"][rows, columns].masked_fill(~inside, -1)
    texts = hit_texts(memory, slots.hits.ids[groups.rows, groups.groups]).to(chunk.dtype)
    run = common_run(chunk, texts).float()
    run = run.masked_fill(run < least, 0.0) / inside.sum(1)
    found = torch.zeros(slots.valid.shape[:2])
    found[groups.rows, groups.groups] = run
    return torch.where(slots.index >= 0, found.gather(1, slots.index.clamp_min(0)), share)
