"""The one LightningDataModule of every phase: batches of rows from token shards.

Training is one endless sequence of micro-batches. Batch number n of a rank depends only on the settings, the
seed and n (see `sampler.py`), so workers, prefetching and epochs cannot change the order, and resuming is
only a matter of knowing n: the number of micro-batches the Trainer has processed, which Lightning itself
keeps in a checkpoint. The batches number n of all ranks together are the batch number n of a single process,
so that the number of processes changes neither a result nor where a fit goes on.

An epoch is a number of batches, ceil(tokens of the split / tokens of a batch), not a pass over every document.

Evaluation is one fixed pass: every row of every domain once, domains interleaved, the last partial batch
kept. Ranks get equally many batches, for a network that is divided among them takes its steps together; a rank
without a row for the last one gets a row whose labels are all masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from nano_think.data.packing import IGNORE, RowReader
from nano_think.data.sampler import DomainSampler, row_limits
from nano_think.data.seen import Stream, seen_streams
from nano_think.data.shards import Shards
from nano_think.errors import UserError

Batch = dict[str, torch.Tensor]


class TokenDataModule(L.LightningDataModule):
    """Batches of every phase and split.

    A batch is a dict of int64 tensors: `tokens labels positions segments doc_uid cluster` (B, L), described
        in
    `packing.py`, and `domain` and `row` (B,), an index into `domains` and the row's number there.

    Args:
        shards_dir: directory made by `build_shards`.
        seq_len: L.
        batch_size: rows of a batch of all ranks together; B of one rank is its part of them.
        train_split, val_split: `expert_train`, `fusion_train`, `validation` or `test`.
        mixing, temperature: shares of the domains in training, see `sampler.mixing_shares`.
        mode: `packed` or `padded`.
        val_rows: at most so many rows a domain in `val_dataloader`, spread evenly over the split; None for
            all.
        train_tokens: at most so many tokens of the training split are ever read, in the shares of the domains and
            spread evenly over each; None for all.
        train_part: which of the disjoint selections of that size, see `DomainSampler`.
        seed: of the order of training rows.
        num_workers: processes that prepare batches; 0 prepares them in the training process.

    Raises:
        UserError: missing shards, an empty split, or rows longer than a domain's text.
    """

    def __init__(
        self,
        shards_dir: str | Path,
        seq_len: int,
        batch_size: int,
        train_split: str = "expert_train",
        val_split: str = "validation",
        mixing: str | Sequence[float] | Mapping[str, float] = "equal",
        temperature: float = 1.0,
        mode: str = "packed",
        val_rows: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        train_tokens: int | None = None,
        train_part: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        self.shards = Shards(shards_dir)
        self.seq_len, self.batch_size, self.mode = seq_len, batch_size, mode
        self.train_split, self.val_split, self.val_rows = train_split, val_split, val_rows
        self.mixing, self.temperature, self.seed = mixing, temperature, seed
        self.num_workers = num_workers
        self.train_tokens, self.train_part = train_tokens, train_part
        if train_tokens is not None and train_tokens < 1:
            raise UserError(f"data.train_tokens={train_tokens} leaves nothing to train on")
        self._loaded: dict[str, Any] = {"batches": 0}

    @property
    def domains(self) -> list[str]:
        """Names that `batch["domain"]` indexes."""
        return self.shards.domains

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, special tokens included."""
        return self.shards.vocab_size

    @property
    def tokenizer_hash(self) -> str:
        """Hash of the tokenizer that made the tokens."""
        return self.shards.tokenizer_hash

    @property
    def steps_per_epoch(self) -> int:
        """Micro-batches of one epoch: ceil(tokens of the training split / tokens of all ranks' batches)."""
        tokens = self.shards.num_tokens(self.train_split)
        if self.train_tokens is not None:
            tokens = min(tokens, self.train_tokens)
        return -(-tokens // (self.batch_size * self.seq_len))

    @property
    def batches_done(self) -> int:
        """Micro-batches of this rank that training has processed since step 0, resumed runs included."""
        if self.trainer is None:
            return self._loaded["batches"]
        # Counted by Lightning when a step is complete: batches that workers prefetched and a step that Ctrl+C
        # broke off are not in it, which a count of our own could not know.
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return total.processed

    def train_dataloader(self) -> DataLoader[Batch]:
        """One epoch of training batches, from where training stands when it is iterated.

        Raises:
            UserError: empty split, text shorter than a row, or a checkpoint made with other data settings.
        """
        self._check_resumed_settings()
        reader = self._reader(self.train_split)
        sampler = self._sampler(reader)
        self._check_length(sampler.shares)
        batches = _TrainBatches(
            reader, sampler, self._own_part(self.batch_size), self.steps_per_epoch, self._rank, self._world
        )
        return self._loader(batches, start=lambda: self.batches_done, resumable=True)

    def seen(self, num_rows: int) -> list[Stream]:
        """Token streams of the first `num_rows` training rows that this module draws, see `seen_streams`."""
        reader = self._reader(self.train_split)
        return seen_streams(reader, self._sampler(reader), num_rows)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The fixed pass over `val_split`, at most `val_rows` rows a domain."""
        return self.dataloader(self.val_split, self.val_rows)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The fixed pass over all of `test`."""
        return self.dataloader("test")

    def dataloader(
        self, split: str, rows: int | None = None, batch_size: int | None = None
    ) -> DataLoader[Batch]:
        """The fixed pass over any split: each row once, over all ranks together.

        Args:
            rows: at most so many rows of each domain, spread evenly over its text.

        Raises:
            UserError: the split holds no text.
        """
        reader = self._reader(split)
        chosen = _interleaved(reader.rows_per_domain, rows)
        own = self._own_part(batch_size or self.batch_size)
        return self._loader(_EvalBatches(reader, chosen, own, self._rank, self._world))

    def num_rows(self, split: str, rows: int | None = None) -> int:
        """How many rows `dataloader` passes over, on all ranks together."""
        counts = self._reader(split).rows_per_domain
        return sum(count if rows is None else min(count, rows) for count in counts)

    def state_dict(self) -> dict[str, Any]:
        """Position in the training sequence and the settings that define it."""
        return {"batches": self.batches_done, "settings": self._settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved position; the settings are compared when training goes on."""
        self._loaded = dict(state_dict)

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _world(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _own_part(self, batch_size: int) -> int:
        if batch_size % self._world:
            raise UserError(
                f"a batch of {batch_size} rows cannot be divided among {self._world} processes: choose a multiple"
            )
        return batch_size // self._world

    def _settings(self) -> dict[str, Any]:
        names = (
            "seq_len",
            "batch_size",
            "train_split",
            "mixing",
            "temperature",
            "mode",
            "seed",
            "tokenizer_hash",
            "train_tokens",
            "train_part",
        )
        settings = {name: getattr(self, name) for name in names}
        return {**settings, "corpus_hash": self.shards.manifest["corpus_hash"]}

    def _check_resumed_settings(self) -> None:
        now = self._settings()
        for name, saved in self._loaded.get("settings", {}).items():
            if name in now and now[name] != saved:
                raise UserError(
                    f"the checkpoint was trained with {name}={saved}, this run has {now[name]}: "
                    "resume with the old value or start a new run"
                )

    def _reader(self, split: str) -> RowReader:
        if self.shards.num_tokens(split) == 0:
            raise UserError(
                f"the {split} split in {self.shards.directory} holds no text: use a larger corpus"
            )
        return RowReader(self.shards, split, self.seq_len, self.mode)

    def _sampler(self, reader: RowReader) -> DomainSampler:
        rows = dict(zip(self.domains, reader.rows_per_domain, strict=True))
        limits = None
        if self.train_tokens is not None:
            limits = row_limits(rows, self.train_tokens, self.seq_len, self.mixing, self.temperature)
        return DomainSampler(rows, self.mixing, self.temperature, self.seed, limits, self.train_part)

    def _check_length(self, shares: np.ndarray) -> None:
        for name, share in zip(self.domains, shares, strict=True):
            tokens = self.shards.num_tokens(self.train_split, name)
            if self.mode == "packed" and share > 0 and tokens <= self.seq_len:
                raise UserError(
                    f"the {self.train_split} split of domain {name} holds {tokens} tokens, fewer than one row of "
                    f"seq_len={self.seq_len}: lower seq_len or add text"
                )

    def _loader(
        self, batches: _Batches, start: Callable[[], int] | None = None, resumable: bool = False
    ) -> DataLoader[Batch]:
        """A loader of ready batches: each item of the data set is one, hence no batching by torch."""
        kind = _ResumableLoader if resumable else DataLoader
        return kind(
            batches,
            batch_size=None,
            sampler=_InOrder(batches, start),
            num_workers=self.num_workers,
            persistent_workers=resumable and self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # A loader seeds its workers from the global generator unless it has its own; drawing from that
            # one would change dropout with the number of epochs and resumptions.
            generator=torch.Generator().manual_seed(self.seed),
        )


def _interleaved(rows_per_domain: Sequence[int], limit: int | None) -> list[tuple[int, int]]:
    """(domain, row) of a fixed pass; any prefix of it holds the domains in about their proportions."""
    draws = []
    for domain, count in enumerate(rows_per_domain):
        kept = count if limit is None else min(count, limit)
        rows = np.arange(kept) * count // max(kept, 1)
        draws += [((place + 0.5) / kept, domain, int(row)) for place, row in enumerate(rows)]
    return [(domain, row) for _, domain, row in sorted(draws)]


class _Batches(Dataset[Batch]):
    """Numbered batches."""

    def __len__(self) -> int:
        raise NotImplementedError


class _TrainBatches(_Batches):
    """Batch n of this rank, for any n; the length is that of an epoch."""

    def __init__(
        self, reader: RowReader, sampler: DomainSampler, batch_size: int, length: int, rank: int, world: int
    ) -> None:
        self.reader, self.sampler, self.batch_size, self.length = reader, sampler, batch_size, length
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Batch:
        return self.reader.batch(self.sampler.batch(number, self.batch_size, self.rank, self.world))


class _EvalBatches(_Batches):
    """This rank's part of a list of rows in batches; the last may be smaller, or hold only masked labels."""

    def __init__(
        self, reader: RowReader, draws: list[tuple[int, int]], batch_size: int, rank: int, world: int
    ) -> None:
        self.reader, self.batch_size = reader, batch_size
        self.first, self.draws = draws[:1], draws[rank::world]
        self.length = -(-len(draws) // (batch_size * world))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Batch:
        draws = self.draws[number * self.batch_size :][: self.batch_size]
        if draws:
            return self.reader.batch(draws)
        batch = self.reader.batch(self.first)
        return {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}


class _InOrder(DistributedSampler[int]):
    """Batch numbers start, start + 1, ...; `start` is asked at the beginning of each epoch.

    The base class only tells Lightning that the ranks are already divided: it would wrap any other sampler in
    one that gives each rank different numbers, and here each rank's own batches have the same numbers.
    """

    def __init__(self, batches: _Batches, start: Callable[[], int] | None = None) -> None:
        super().__init__(batches, num_replicas=1, rank=0, shuffle=False)
        self._length, self._start = len(batches), start

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        start = 0 if self._start is None else self._start()
        return iter(range(start, start + self._length))


class _ResumableLoader(DataLoader[Batch]):
    """Has the methods by which Lightning tells that training may resume inside an epoch.

    They carry nothing: the position is the Trainer's count, which `_InOrder` reads. After a resumption the
        loader
    offers a whole epoch from there, and the Trainer stops at the end of the current one.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
