"""What frozen experts say of every training row, computed once (stage 7b).

While only the router learns, the context and every expert's output are functions of the row alone. Rows come
again: in later epochs, in domains that mixing repeats, in every validation. A row's values are computed when it is
first met, by itself, so that they depend neither on its batch nor on what was seen before: a resumed run finds the
same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nano_think.model import NanoThink
from nano_think.ops.layout import Layout

Batch = Mapping[str, Tensor]
Key = tuple[str, int, int]

CONTEXT, NLL = "context", "nll"
WIDE = 4  # bytes of the widest number that is kept


@dataclass(frozen=True)
class Kept:
    """Of a batch: what the router reads (B, L, d), and what is left to do.

    expert_hidden: (B, L, d) of every expert by name, empty where probabilities are mixed.
    nll: (B, L, N) -log p of the label by every expert, None where hidden states are mixed.
    """

    context: Tensor
    expert_hidden: dict[str, Tensor]
    nll: Tensor | None


class ExpertCache:
    """Values of up to `rows` rows of `length` tokens, each known by its split, its domain and its number there.

    network: frozen but for the router, and for `expert_gain` where hidden states are mixed.
    folder: where the values lie in memory-mapped files, which are gone with the process; None: in memory.
    Raises IndexError for more rows than were announced.
    """

    def __init__(self, network: NanoThink, rows: int, length: int, folder: Path | None = None) -> None:
        self.network, self.rows, self.length, self.folder = network, rows, length, folder
        self.computed = 0
        self._arithmetic: torch.dtype | None = None
        self._slots: dict[Key, int] = {}
        self._arrays: dict[str, Tensor] = {}

    @property
    def bytes(self) -> int:
        """What all rows take at most: the context and, of every expert, a vector or (fusion=prob) a number."""
        width, experts = self.network.embedding.embedding_dim, len(self.network.experts)
        numbers = width + experts * (1 if self.network.fusion == "prob" else width)
        return WIDE * numbers * self.rows * self.length

    def __call__(self, split: str, batch: Batch) -> Kept:
        """Values of a batch with `row` and `domain` (B,), on the device of its tokens."""
        self._forget_other_arithmetic(batch["tokens"].device.type)
        keys = [
            (split, *place) for place in zip(*(batch[k].tolist() for k in ("domain", "row")), strict=True)
        ]
        for number, key in enumerate(keys):
            if key not in self._slots:
                self._keep(key, {name: batch[name][number : number + 1] for name in _READ})
        slots = torch.tensor([self._slots[key] for key in keys])
        device = batch["tokens"].device
        found = {name: array[slots].to(device) for name, array in self._arrays.items()}
        return Kept(found.pop(CONTEXT), found if NLL not in found else {}, found.get(NLL))

    def _forget_other_arithmetic(self, device: str) -> None:
        """Values of another autocast are not what the network would say now."""
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if dtype != self._arithmetic:
            self._slots.clear()
            self._arrays.clear()
            self._arithmetic = dtype

    @torch.no_grad()
    def _keep(self, key: Key, row: Batch) -> None:
        if len(self._slots) == self.rows:
            raise IndexError(f"the cache was made for {self.rows} rows and is asked for one more")
        slot = len(self._slots)
        for name, values in self._compute(row):
            if name not in self._arrays:
                self._arrays[name] = self._allocate(name, values)
            self._arrays[name][slot].copy_(values[0])
        self._slots[key] = slot
        self.computed += 1

    def _compute(self, row: Batch) -> Iterator[tuple[str, Tensor]]:
        layout = Layout(row["positions"], row["segments"])
        context, hidden = self.network.expert_outputs(row["tokens"], layout)
        yield CONTEXT, context
        if self.network.fusion == "prob":
            yield NLL, self.network.expert_nll(hidden, row["labels"])
        else:
            yield from hidden.items()

    def _allocate(self, name: str, values: Tensor) -> Tensor:
        """Room for `rows` of `values` (1, L, C); nothing of it is touched before it is written."""
        shape = (self.rows, *values.shape[1:])
        # a tensor born in inference mode, where validation runs, could take no part in training
        with torch.inference_mode(False):
            if self.folder is None:
                return torch.empty(shape, dtype=values.dtype)
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"expert_outputs_{name}_{id(self)}.bin"
            size = self.rows * values[0].numel()
            mapped = torch.from_file(str(path), shared=True, size=size, dtype=values.dtype)
            path.unlink()  # the mapping holds it until the process ends, however that happens
            return mapped.view(shape)


_READ = ("tokens", "labels", "positions", "segments")
