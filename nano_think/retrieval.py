"""Retrieval for language models without leaks: which tokens ask, what they may see, what is stored.

Chunks of m tokens count from the start of a document (RETRO, arXiv 2112.04426): the neighbours of chunk u - 1
serve the tokens of chunk u, chunk 0 has none, so nothing a token sees depends on a later token. Nothing here
has gradients and nothing writes to the store, except for two leaky options, see `leaky_settings`.

Letters: B rows, L positions, U groups of slots in a row, k slots of a group, d width, m chunk, N chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from nano_think.chunks import ChunkEncoder, chunk_records
from nano_think.ops.layout import Layout
from nano_think.vector_records import Hits, Reader
from nano_think.vector_store import VectorStore

# Longer than any document.
WHOLE = 1 << 31


def leaky_settings(settings: Mapping[str, Any]) -> list[str]:
    """Settings of a `Retriever` by which a token may learn of later ones, in words; empty for causal ones."""
    found = []
    if settings.get("granularity") == "sequence":
        found.append("retrieval.granularity=sequence reads later tokens")
    if settings.get("write_on_read"):
        found.append("retrieval.write_on_read=true stores what it reads, for the next reading to find")
    return found


@dataclass(frozen=True)
class MemoryHits:
    """What the slots of a batch came from, for display and statistics.

    ids (B, U, k) int64 logical ids, -1 = none; scores (B, U, k); asked (B, U) bool, a query was made.
    """

    ids: Tensor
    scores: Tensor
    asked: Tensor

    @property
    def per_query(self) -> float:
        """Mean number of neighbours found for a query; NaN without queries."""
        return (self.ids >= 0).sum(-1)[self.asked].float().mean().item()


@dataclass(frozen=True)
class MemorySlots:
    """Extra keys and values of the MLA block.

    values (B, U, k, d) float32; valid (B, U, k) bool; index (B, L) int64 in [-1, U): the group a token sees,
    -1 where it sees none. Every group that `index` names has at least one valid slot. scores (B, U, k): cosines.
    """

    values: Tensor
    valid: Tensor
    index: Tensor
    hits: MemoryHits | None = None
    scores: Tensor | None = None

    @classmethod
    def none(cls, index: Tensor, k: int, d_model: int, hits: MemoryHits | None = None) -> MemorySlots:
        """No groups at all (U = 0) for tokens shaped like `index` (B, L)."""
        values = torch.zeros(len(index), 0, k, d_model, device=index.device)
        return cls(
            values, values.new_zeros(values.shape[:3], dtype=torch.bool), torch.full_like(index, -1), hits
        )

    @property
    def empty(self) -> bool:
        """No token sees anything: the model must do exactly what it does without memory."""
        return self.values.shape[1] == 0 or not bool((self.index >= 0).any())

    def to(self, device: torch.device | str) -> MemorySlots:
        """The same slots on another device; `hits` stays where it is."""
        names = ("values", "valid", "index", *(() if self.scores is None else ("scores",)))
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def dropped(self, keep_mask: Tensor) -> MemorySlots:
        """Memory dropout: rows where keep_mask (B,) bool is False see no slots."""
        keep = keep_mask.unsqueeze(1)
        return replace(self, valid=self.valid & keep.unsqueeze(2), index=self.index.masked_fill(~keep, -1))


@dataclass(frozen=True)
class Granularity:
    """Which query serves which position, positions counting from the start of the document.

    group_of maps positions to group numbers, 0 for "no memory"; window maps group numbers to the (begin, end)
    of the tokens that the query of that group is made of, cut off where the document ends. Causal because
    end <= position + 1 for every position of the group, "sequence" being the exception. width bounds end - begin.
    """

    width: int
    group_of: Callable[[Tensor], Tensor]
    window: Callable[[Tensor], tuple[Tensor, Tensor]]

    @classmethod
    def named(cls, name: str, chunk: int, prompt_len: int | None = None) -> Granularity:
        """What asks: the chunk before ("chunk"), the last m tokens ("token"), the prompt for what follows it.

        "sequence" asks once with the whole document for all its tokens, as the plan does. That reads later
        tokens: it is for analysis and cannot decode.

        Raises:
            ValueError: an unknown name, or "prompt" without prompt_len >= 1.
        """
        if name == "chunk":
            return cls(chunk, lambda p: p // chunk, lambda g: ((g - 1) * chunk, g * chunk))
        if name == "token":
            return cls(chunk, lambda p: p + 1, lambda g: ((g - chunk).clamp_min(0), g))
        if name == "sequence":
            return cls(WHOLE, torch.ones_like, lambda g: (g * 0, g * 0 + WHOLE))
        if name != "prompt":
            raise ValueError(
                f"unknown retrieval granularity {name!r}: choose chunk, prompt, token or sequence"
            )
        if not prompt_len or prompt_len < 1:
            raise ValueError("granularity 'prompt' needs prompt_len, the number of tokens of the prompt")
        length = prompt_len
        return cls(length, lambda p: (p >= length).long(), lambda g: (g * 0, g * 0 + length))


class Retriever:
    """Finds memory for tokens.

    Args:
        store: read only, unless write_on_read.
        encoder: makes the queries; its fingerprint must be that of the store's keys.
        chunk: m, tokens between two refreshes.
        k: neighbours of a query; 0 switches memory off.
        granularity: "chunk", "prompt", "token" (one search a token: slow; for a store of `token_records`, whose
            span is `chunk`) or "sequence" (leaky), see `Granularity.named`.
        write_on_read: `retrieve` stores the chunks that it has read, as the plan's forward pass does, so that
            whoever reads the text again finds what comes next. Leaky: for analysis alone.

    Raises:
        ValueError: an unknown granularity, chunk < 1, k < 0, or a store written with another encoder.
    """

    def __init__(
        self,
        store: VectorStore,
        encoder: ChunkEncoder,
        *,
        chunk: int = 64,
        k: int = 4,
        granularity: str = "chunk",
        write_on_read: bool = False,
    ) -> None:
        if chunk < 1 or k < 0:
            raise ValueError(f"need chunk >= 1 and k >= 0, got chunk={chunk} and k={k}")
        if store.fingerprint and store.fingerprint != encoder.fingerprint():
            raise ValueError("the store was written with another chunk encoder: build it again with this one")
        Granularity.named(granularity, chunk, prompt_len=1)
        self.store, self.encoder, self.chunk, self.k, self.granularity = store, encoder, chunk, k, granularity
        self.write_on_read = write_on_read

    @property
    def leaks(self) -> list[str]:
        """Leaky options that are on, see `nano_think.nn.leaks`."""
        return leaky_settings({"granularity": self.granularity, "write_on_read": self.write_on_read})

    @torch.no_grad()
    def retrieve(
        self,
        tokens: Tensor,
        layout: Layout | None = None,
        reader: Reader | None = None,
        *,
        prompt_len: int | None = None,
    ) -> MemorySlots:
        """The slots that tokens (B, L) see; `reader` names their documents as (B, L), None means unknown.

        Args:
            prompt_len: tokens of the prompt, for granularity "prompt" only.

        Raises:
            ValueError: granularity "prompt" without prompt_len; see also `VectorStore.search`.
        """
        layout = Layout.of(tokens, layout)
        slots = self._read(tokens, layout, reader or Reader(), prompt_len)
        if self.write_on_read:
            self._write(tokens, layout)
        return slots

    def _read(self, tokens: Tensor, layout: Layout, reader: Reader, prompt_len: int | None) -> MemorySlots:
        plan = Granularity.named(self.granularity, self.chunk, prompt_len)
        positions, pads = layout.positions.expand_as(tokens), layout.pads.expand_as(tokens)
        group = plan.group_of(positions).masked_fill(pads, 0)
        # A run of positions of one document that share a group makes one query.
        first = layout.starts.expand_as(tokens) | (group != torch.roll(group, 1, dims=1))
        first[:, 0] = True
        first &= group > 0
        index = (first.cumsum(1) - 1).masked_fill(group == 0, -1)
        rows, columns = first.nonzero(as_tuple=True)
        if self.k == 0 or len(self.store) == 0 or len(rows) == 0:
            return MemorySlots.none(index, self.k, self.store.d_model)
        begin, end = plan.window(group[rows, columns])
        if self.granularity == "sequence":
            segments = layout.segments.expand_as(tokens)
            end = (segments[rows] == segments[rows, columns].unsqueeze(1)).sum(1)
        start = columns - positions[rows, columns]
        width = min(plan.width, tokens.shape[1])
        blocks = _gather_window(tokens, rows, start + begin, start + end, width)
        found = self.search(blocks, _at(reader, rows, columns))
        return self.lay_out(found, rows, index[rows, columns], index)

    def _write(self, tokens: Tensor, layout: Layout) -> None:
        """Store the chunks of `tokens` that something follows; the value is the mean embedding of what follows.

        That stands for the model's output over the chunk after, which `chunk_records` is made for and a
        retriever does not know. As in the plan, no record says whose document it is from.
        """
        embedded = self.encoder.table[tokens.to(self.encoder.table.device)].to(tokens.device)
        records = chunk_records(self.encoder, tokens, embedded, layout, chunk=self.chunk)
        if len(records.keys):
            self.store.add(records.keys, records.values, **records.meta)

    def search(self, blocks: Tensor, reader: Reader) -> Hits:
        """Neighbours of blocks of tokens (N, w), -1 = pad, on the device of the tokens."""
        found = self.store.search(self.encoder.encode(blocks), self.k, reader)
        return _each(found, lambda part: part.to(blocks.device))

    def lay_out(self, found: Hits, rows: Tensor, groups: Tensor, index: Tensor) -> MemorySlots:
        """Put answer n of `found` at group groups[n] of row rows[n]; index (B, L) names groups, -1 = none."""
        shape = (len(index), int(groups.max()) + 1)

        def placed(part: Tensor, fill: float) -> Tensor:
            out = part.new_full((*shape, *part.shape[1:]), fill)
            out[rows, groups] = part
            return out

        asked = placed(torch.ones_like(rows, dtype=torch.bool), False)
        hits = MemoryHits(placed(found.ids, -1), placed(found.scores, 0), asked)
        if not found.valid.any():
            return MemorySlots.none(index, self.k, self.store.d_model, hits)
        valid = placed(found.valid, False)
        fruitless = ~valid.any(-1).gather(1, index.clamp_min(0))
        return MemorySlots(
            placed(found.values, 0), valid, index.masked_fill(fruitless, -1), hits, hits.scores
        )

    def init_state(self, batch: int, reader: Reader | None = None) -> RetrievalState:
        """State for decoding one unpacked document per row; `reader` names the documents as (B,).

        Decoding never writes. Raises ValueError for granularity "sequence".
        """
        return RetrievalState(self, batch, reader or Reader())


class RetrievalState:
    """Slots for decoding, refreshed when a chunk is complete: `step` by piece equals `retrieve` at once.

    Keeps the tokens read and the last answers; after a rollback beyond those it asks again, so either the
    store stays as it is while a sequence is decoded, or `reader.generation` is set.
    """

    _KEPT = 2

    def __init__(self, retriever: Retriever, batch: int, reader: Reader) -> None:
        if retriever.granularity == "sequence":
            raise ValueError(
                "retrieval.granularity=sequence reads later tokens and cannot decode; choose chunk"
            )
        self.retriever, self.reader = retriever, reader
        self.tokens = torch.empty(batch, 0, dtype=torch.int64)
        self.prompt_len = 0
        self._answers: dict[int, Hits] = {}

    @property
    def length(self) -> int:
        """Positions read so far."""
        return self.tokens.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tokens and of the answers kept."""
        kept = [
            self.tokens,
            *(getattr(hits, f.name) for hits in self._answers.values() for f in fields(hits)),
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> MemorySlots:
        """The slots that the next tokens (B, n) see, index (B, n). The first call brings the prompt."""
        begin = self.length
        self.tokens = torch.cat((self.tokens.to(tokens.device), tokens), dim=1)
        self.prompt_len = self.prompt_len or self.length
        retriever, plan = self.retriever, self._plan()
        positions = torch.arange(begin, self.length, device=tokens.device)
        numbers, index = plan.group_of(positions).unique(return_inverse=True)
        wanted = [number for number in numbers.tolist() if number > 0]
        if retriever.k == 0 or len(retriever.store) == 0 or not wanted:
            return MemorySlots.none(tokens, retriever.k, retriever.store.d_model)
        rows = torch.arange(len(tokens), device=tokens.device)
        for number in wanted:
            if number not in self._answers:
                window = plan.window(torch.full_like(rows, number))
                blocks = _gather_window(self.tokens, rows, *window, plan.width)
                self._answers[number] = retriever.search(blocks, self.reader)
        answers = [self._answers[number] for number in wanted]
        found = Hits(*(torch.cat([getattr(hits, f.name) for hits in answers]) for f in fields(Hits)))
        self._answers = dict(sorted(self._answers.items())[-self._KEPT :])
        # Group 0, if there, is the first of `numbers` and becomes index -1.
        index = (index - (len(numbers) - len(wanted))).expand_as(tokens)
        groups = torch.arange(len(wanted), device=rows.device).repeat_interleave(len(rows))
        return retriever.lay_out(found, rows.repeat(len(wanted)), groups, index)

    def rollback(self, n: int) -> None:
        """Forget the last n positions.

        Raises:
            ValueError: more than were read, or a part of the prompt that granularity "prompt" asked with.
        """
        kept = self.length - n
        inside_prompt = self.retriever.granularity == "prompt" and 0 < kept < self.prompt_len
        if kept < 0 or inside_prompt:
            raise ValueError(f"cannot forget {n} of {self.length} positions")
        self.tokens = self.tokens[:, :kept]
        if kept == 0:
            self.prompt_len, self._answers = 0, {}
            return
        plan = self._plan()
        ends = {number: int(plan.window(torch.tensor(number))[1]) for number in self._answers}
        self._answers = {number: self._answers[number] for number, end in ends.items() if end <= kept}

    def reorder(self, index: Tensor) -> None:
        """Make row i the former row index[i]."""
        self.tokens = self.tokens.index_select(0, index.to(self.tokens.device))
        self._answers = {
            number: _each(hits, lambda part: part.index_select(0, index.to(part.device)))
            for number, hits in self._answers.items()
        }
        self.reader = _at(self.reader, index)

    def _plan(self) -> Granularity:
        return Granularity.named(self.retriever.granularity, self.retriever.chunk, self.prompt_len)


def _gather_window(tokens: Tensor, rows: Tensor, begin: Tensor, end: Tensor, width: int) -> Tensor:
    """tokens[rows, begin:end] as (N, width), padded with -1 behind."""
    columns = begin.unsqueeze(1) + torch.arange(width, device=tokens.device)
    inside = (columns < end.unsqueeze(1)) & (columns >= 0)
    return tokens[rows.unsqueeze(1), columns.clamp(0, tokens.shape[1] - 1)].masked_fill(~inside, -1)


def _at(reader: Reader, *where: Tensor) -> Reader:
    """The reader with its document columns indexed by `where`."""

    def pick(column: Tensor | None) -> Tensor | None:
        return None if column is None else column[tuple(index.to(column.device) for index in where)]

    return replace(reader, doc_uid=pick(reader.doc_uid), cluster=pick(reader.cluster))


def _each(hits: Hits, change: Callable[[Tensor], Tensor]) -> Hits:
    return Hits(*(change(getattr(hits, f.name)) for f in fields(Hits)))
