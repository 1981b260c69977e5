"""A model's memory on disk and in use: the store, the frozen chunk encoder, and the retriever over both.

encoder.safetensors    the chunk encoder
settings.json          chunk length, neighbours, granularity, whether reading writes; figures of the build
store/                 generations of the vector store
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nano_think.artifacts.checkpoint import Checkpoint, load_tensors, save_tensors
from nano_think.chunks import ChunkEncoder, chunk_records, complete_chunks, token_records
from nano_think.errors import UserError, brief
from nano_think.files import read_json, write_json
from nano_think.model import NanoThink
from nano_think.nn.leaks import leaks, mark
from nano_think.ops.layout import Layout
from nano_think.retrieval import MemorySlots, Retriever, leaky_settings
from nano_think.vector_records import LONGEST, Reader
from nano_think.vector_store import VectorStore

SPLIT = "expert_train"
# Neighbours of a query beyond which a memory is a mistake.
MOST_NEIGHBOURS = 4096


@dataclass(frozen=True)
class Memory:
    """What a model may remember. figures: how the store was built."""

    store: VectorStore
    encoder: ChunkEncoder
    retriever: Retriever
    figures: dict[str, Any]

    @classmethod
    def over(
        cls, store: VectorStore, encoder: ChunkEncoder, retrieval: Mapping[str, Any], figures: dict[str, Any]
    ) -> Memory:
        """Memory with `retrieval` settings k, chunk, granularity, write_on_read."""
        return cls(store, encoder, Retriever(store, encoder, **retrieval), figures)

    @property
    def settings(self) -> dict[str, Any]:
        """The `retrieval` settings of `over`."""
        names = ("k", "chunk", "granularity", "write_on_read")
        return {name: getattr(self.retriever, name) for name in names}

    @property
    def leaks(self) -> list[str]:
        """Leaky options that are on, see `nano_think.nn.leaks`."""
        return self.retriever.leaks

    @property
    def flops_options(self) -> dict[str, Any]:
        """What reading it costs, as `evals.flops` takes it: every query meets every key."""
        return {"slots": self.retriever.k, "chunk": self.retriever.chunk, "records": len(self.store)}

    def slots(self, batch: Mapping[str, Tensor]) -> MemorySlots:
        """Slots of a batch; a document never finds itself or a near copy."""
        reader = Reader(doc_uid=batch["doc_uid"], cluster=batch["cluster"], splits=(SPLIT,))
        layout = Layout(batch["positions"], batch["segments"])
        return self.retriever.retrieve(batch["tokens"], layout, reader)


@torch.no_grad()
def build_memory(
    model: NanoThink,
    batches: Iterable[Mapping[str, Tensor]],
    retrieval: Mapping[str, Any],
    store: Mapping[str, Any],
) -> Memory:
    """Fill a store with `batches` (text that its readers never train on), see `write`.

    The encoder is fitted on the same text and frozen with the table as it is now.
    """
    model.eval()
    batches, chunk = list(batches), retrieval["chunk"]
    tokens = torch.cat([batch["tokens"][batch["segments"] >= 0] for batch in batches])
    counts = torch.bincount(tokens, minlength=model.vocab_size)
    samples = torch.cat(
        [complete_chunks(b["tokens"], Layout(b["positions"], b["segments"]), chunk).tokens for b in batches]
    )
    encoder = ChunkEncoder.fit(model.embedding.weight, counts, samples)
    # the same few tokens go on in many ways in one document, and each way is worth keeping
    kept: dict[str, Any] = {"near_duplicate": None} if retrieval.get("granularity") == "token" else {}
    made = {"chunk": chunk, "fingerprint": encoder.fingerprint(), **kept, **store}
    memory = Memory.over(VectorStore(model.embedding.embedding_dim, **made), encoder, retrieval, {})
    for batch in batches:
        ids = {name: batch[name] for name in ("doc_uid", "cluster", "domain")}
        layout = Layout(batch["positions"], batch["segments"])
        write(memory, model, batch["tokens"], layout, split=SPLIT, **ids)
    memory.store.publish()
    figures = {"records": len(memory.store), "tokens": len(tokens), "chunk": chunk}
    return replace(memory, figures={**figures, "index": memory.store.settings()})


@torch.no_grad()
def write(memory: Memory, model: NanoThink, tokens: Tensor, layout: Layout | None = None, **meta: Any) -> int:
    """Store what may be learnt of tokens (B, L), in the records that the memory is asked for; returns how many.

    A memory asked at every token keeps every token, any other the complete chunks that something follows, whose
    value is what `model` says of that. meta: see `chunk_records`.
    """
    retriever = memory.retriever
    if retriever.granularity == "token":
        records = token_records(memory.encoder, tokens, layout, span=retriever.chunk, **meta)
    else:
        hidden = fused_hidden(model, tokens, layout)
        records = chunk_records(memory.encoder, tokens, hidden, layout, chunk=retriever.chunk, **meta)
    if len(records.keys):
        memory.store.add(records.keys, records.values, **records.meta)
    return len(records.keys)


def fused_hidden(model: NanoThink, tokens: Tensor, layout: Layout | None = None) -> Tensor:
    """Weighted expert outputs (B, L, d): what the head reads, and the nearest thing to it in `prob` fusion."""
    output = model(tokens, layout, with_logits=False)
    if output.hidden is not None:
        return output.hidden
    return sum(output.weights[..., i, None] * h for i, h in enumerate(output.expert_hidden.values()))


def save_memory(memory: Memory, path: Path) -> None:
    """Write the folder described at the top of this module."""
    save_tensors(path / "encoder.safetensors", memory.encoder.state_dict())
    memory.store.save(path / "store")
    write_json(path / "settings.json", {"retrieval": memory.settings, "figures": memory.figures})


def load_memory(path: Path) -> Memory | None:
    """The memory in a folder; None where there is none. Raises UserError where it is damaged."""
    settings = _settings(path)
    if settings is None:
        return None
    tensors = load_tensors(path / "encoder.safetensors")
    try:
        vocab_size, d_model = tensors["table"].shape
        encoder = ChunkEncoder(vocab_size=vocab_size, d_model=d_model)
        encoder.load_state_dict(tensors)
        store = VectorStore.load(path / "store", fingerprint=encoder.fingerprint(), d_model=d_model)
        return Memory.over(store, encoder, settings["retrieval"], settings["figures"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({brief(error)}): delete its folder and make it again") from error


def memory_of(checkpoint: Checkpoint) -> Memory | None:
    """The memory that came with a model; None where it has none.

    Raises UserError where it is damaged or was made for a model of another vocabulary or width.
    """
    memory = load_memory(checkpoint.path / "memory")
    if memory is not None and memory.encoder.table.shape != checkpoint.model.embedding.weight.shape:
        sizes = (
            " x ".join(map(str, t.shape)) for t in (memory.encoder.table, checkpoint.model.embedding.weight)
        )
        raise UserError(
            "the memory in {} is of tokens and width {}, its model of {}: make both again".format(
                checkpoint.path, *sizes
            )
        )
    return memory


def memory_leaks(path: Path) -> list[str]:
    """Leaky options of the memory in a folder, told without loading its store; empty where there is none."""
    return leaky_settings((_settings(path) or {}).get("retrieval", {}))


def mark_of(checkpoint: Checkpoint) -> str:
    """The line that outputs made with a checkpoint carry where it or its memory leaks, else ""."""
    return mark(leaks(checkpoint.model) + memory_leaks(checkpoint.path / "memory"))


def _settings(path: Path) -> dict[str, Any] | None:
    if not (path / "settings.json").is_file():
        return None
    try:
        settings = read_json(path / "settings.json")
        retrieval = settings["retrieval"]
        for name, most in (("k", MOST_NEIGHBOURS), ("chunk", LONGEST)):
            if type(retrieval[name]) is not int or not 0 <= retrieval[name] <= most:
                raise ValueError(f"{name} is {retrieval[name]!a:.40}")
        if not isinstance(settings.setdefault("figures", {}), dict):
            raise ValueError("its figures are none")
        if not isinstance(retrieval.get("write_on_read", False), bool):
            raise ValueError("write_on_read is neither true nor false")
        return settings
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({brief(error)}): delete its folder and make it again") from error
