"""From tokens to records: chunks of documents, the frozen encoder that makes their keys, what is stored.

Letters: B rows, L positions, N chunks, m tokens of a chunk, V vocabulary, d width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nano_think.files import hash_bytes
from nano_think.ops.layout import Layout
from nano_think.vector_records import Records

# Part of the fingerprint: raise it when the same buffers would give other keys.
_ENCODER_VERSION = b"sif-1"


class ChunkEncoder(nn.Module):
    """Frozen map from chunks of tokens to unit vectors, for keys and queries alike.

    SIF (Arora, Liang and Ma 2017, algorithm 1): the mean of the embeddings weighted by a / (a + p(token)),
    minus its projection on the first principal component of a sample of chunks, then normalised. Without the
    weights and the projection frequent tokens make every chunk look alike. Holds a copy of the embedding, so
    that keys written once stay comparable while the model's own table goes on training.

    A new instance is blank, ready for `load_state_dict`; `fit` makes a working one.
    """

    table: Tensor
    weights: Tensor
    component: Tensor

    def __init__(self, *, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(vocab_size, d_model))
        self.register_buffer("weights", torch.ones(vocab_size))
        self.register_buffer("component", torch.zeros(d_model))

    @classmethod
    @torch.no_grad()
    def fit(
        cls, embedding: Tensor, token_counts: Tensor, sample_chunks: Tensor, *, smoothing: float = 1e-3
    ) -> ChunkEncoder:
        """Encoder for a reference embedding (V, d).

        Args:
            token_counts: (V,), how often each token occurs in the training text.
            sample_chunks: (N, m) tokens, -1 = pad; a few thousand are enough for the component.
            smoothing: a of the weights.

        Raises:
            ValueError: counts that do not fit the table, no counted token, or no sample chunk.
        """
        if token_counts.shape != embedding.shape[:1] or token_counts.sum() <= 0 or len(sample_chunks) == 0:
            raise ValueError(
                f"need sample chunks and token counts of shape ({len(embedding)},), not all zero"
            )
        encoder = cls.mean_of(embedding)
        frequency = token_counts.double() / token_counts.double().sum()
        encoder.weights.copy_(smoothing / (smoothing + frequency))
        raw = encoder._weighted_mean(sample_chunks.to(encoder.table.device)).double()
        # The last eigenvector of the second moments is the first right singular vector, at d x d cost.
        encoder.component.copy_(torch.linalg.eigh(raw.T @ raw).eigenvectors[:, -1])
        return encoder

    @classmethod
    @torch.no_grad()
    def mean_of(cls, embedding: Tensor) -> ChunkEncoder:
        """Plain normalised mean embedding (seed-literal query): no weights, no component."""
        encoder = cls(vocab_size=embedding.shape[0], d_model=embedding.shape[1]).to(embedding.device)
        encoder.table.copy_(embedding.detach())
        return encoder

    def _weighted_mean(self, tokens: Tensor) -> Tensor:
        present = tokens >= 0
        weights = self.weights[tokens.clamp_min(0)] * present
        total = F.embedding_bag(tokens.clamp_min(0), self.table, mode="sum", per_sample_weights=weights)
        return total / present.sum(1, keepdim=True).clamp_min(1)

    @torch.no_grad()
    def encode(self, chunk_tokens: Tensor) -> Tensor:
        """Unit vectors (N, d) float32 of chunks (N, m), -1 = pad; zeros for a chunk without direction."""
        with torch.autocast(self.table.device.type, enabled=False):
            raw = self._weighted_mean(chunk_tokens.to(self.table.device))
            raw = raw - (raw @ self.component).unsqueeze(1) * self.component
            return F.normalize(raw, dim=1)

    forward = encode

    def fingerprint(self) -> str:
        """Hash of the buffers and of the version of this code."""
        buffers = (self.table, self.weights, self.component)
        return hash_bytes(_ENCODER_VERSION, *(buffer.cpu().numpy().tobytes() for buffer in buffers))


@dataclass(frozen=True)
class Chunks:
    """Complete chunks of a batch, in reading order.

    rows, begin, segments, numbers: (N,) row, first column, document fragment, chunk number inside it;
    tokens: (N, m).
    """

    rows: Tensor
    begin: Tensor
    segments: Tensor
    numbers: Tensor
    tokens: Tensor


def chunk_index(layout: Layout, chunk: int = 64) -> Tensor:
    """Chunk number (B, L) of every position inside its document fragment, -1 at pads."""
    return (layout.positions // chunk).expand_as(layout.segments).masked_fill(layout.pads, -1)


def complete_chunks(tokens: Tensor, layout: Layout | None = None, chunk: int = 64) -> Chunks:
    """All chunks of tokens (B, L) that have all their `chunk` tokens; a fragment's rest is left out."""
    layout = Layout.of(tokens, layout)
    positions, pads = layout.positions.expand_as(tokens), layout.pads.expand_as(tokens)
    segments = layout.segments.expand_as(tokens)
    rows, last = ((positions % chunk == chunk - 1) & ~pads).nonzero(as_tuple=True)
    begin = last - chunk + 1
    block = tokens[rows.unsqueeze(1), begin.unsqueeze(1) + torch.arange(chunk, device=tokens.device)]
    return Chunks(rows, begin, segments[rows, last], positions[rows, last] // chunk, block)


@torch.no_grad()
def chunk_records(
    encoder: ChunkEncoder,
    tokens: Tensor,
    hidden: Tensor,
    layout: Layout | None = None,
    *,
    chunk: int = 64,
    value_of: str = "next",
    doc_uid: Tensor | None = None,
    cluster: Tensor | None = None,
    domain: Tensor | None = None,
    **meta: Any,
) -> Records:
    """Records of the complete chunks of a batch, for `store.add(r.keys, r.values, **r.meta)`.

    Args:
        tokens: (B, L).
        hidden: fused output (B, L, d).
        value_of: "next": the value is the mean output over the chunk that follows in the same fragment, as
            far as it is there; a chunk nothing follows is skipped. "own": over the chunk itself.
        doc_uid, cluster: (B, L); domain: (B,).
        meta: split, generation and session, the same for all records.

    Raises:
        ValueError: an unknown value_of.
    """
    if value_of not in ("next", "own"):
        raise ValueError(f"unknown value_of {value_of!r}: choose next or own")
    layout = Layout.of(tokens, layout)
    found = complete_chunks(tokens, layout, chunk)
    segments, rows = layout.segments.expand_as(tokens), found.rows.unsqueeze(1)
    columns = found.begin.unsqueeze(1) + torch.arange(chunk, device=tokens.device)
    columns = columns + (chunk if value_of == "next" else 0)
    inside, columns = columns < tokens.shape[1], columns.clamp_max(tokens.shape[1] - 1)
    inside &= segments[rows, columns] == found.segments.unsqueeze(1)
    total = hidden[rows, columns].float().mul(inside.unsqueeze(2)).sum(1)
    values = total / inside.sum(1, keepdim=True).clamp_min(1)
    keys = encoder.encode(found.tokens).to(values.device)
    keep = inside.any(1) & keys.any(1)
    columns_of: dict[str, Any] = {
        "chunk": found.numbers[keep],
        "token_offset": found.numbers[keep] * chunk,
        "tokens": found.tokens[keep],
    }
    for name, column in (("doc_uid", doc_uid), ("cluster", cluster)):
        if column is not None:
            columns_of[name] = column[found.rows, found.begin][keep]
    if domain is not None:
        columns_of["domain"] = domain[found.rows][keep]
    return Records(keys[keep], values[keep], columns_of | meta)


@torch.no_grad()
def token_records(
    encoder: ChunkEncoder,
    tokens: Tensor,
    layout: Layout | None = None,
    *,
    span: int = 4,
    doc_uid: Tensor | None = None,
    cluster: Tensor | None = None,
    domain: Tensor | None = None,
    **meta: Any,
) -> Records:
    """A record for every token (B, L) that another follows: the last `span` tokens, and the embedding of the next.

    The memory of a kNN-LM (arXiv 1911.00172) with the keys of a bag of words. A record answers the reader whose
    last tokens are alike, so it is for granularity "token". doc_uid, cluster, domain, meta: as in `chunk_records`.
    """
    layout = Layout.of(tokens, layout)
    segments = layout.segments.expand_as(tokens)
    positions = layout.positions.expand_as(tokens)
    followed = (segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] >= 0)
    rows, last = followed.nonzero(as_tuple=True)
    begin = last - positions[rows, last].clamp_max(span - 1)
    columns = begin.unsqueeze(1) + torch.arange(span, device=tokens.device)
    inside = columns <= last.unsqueeze(1)
    windows = tokens[rows.unsqueeze(1), columns.clamp_max(tokens.shape[1] - 1)].masked_fill(~inside, -1)
    keys = encoder.encode(windows)
    keep = keys.any(1)
    rows, last, begin = rows[keep], last[keep], begin[keep]
    columns_of: dict[str, Any] = {
        "chunk": positions[rows, last],
        "token_offset": positions[rows, begin],
        "tokens": windows[keep],
    }
    for name, column in (("doc_uid", doc_uid), ("cluster", cluster)):
        if column is not None:
            columns_of[name] = column[rows, last]
    if domain is not None:
        columns_of["domain"] = domain[rows]
    values = encoder.table[tokens[rows, last + 1].to(encoder.table.device)]
    return Records(keys[keep], values, columns_of | meta)


@torch.no_grad()
def seed_records(hidden: Tensor, valid: Tensor) -> Records:
    """Seed-literal records: the normalised fused output of every token as its own key and value.

    hidden (B, L, d), valid (B, L) bool. Meant for `ChunkEncoder.mean_of` queries. Leaky by construction: with
    a tied head the output at a token lies near the embedding of the token it predicts, so a reader who
    trains on the same text reads its own targets. For analysis only.
    """
    vectors = hidden.float()[valid]
    vectors = F.normalize(vectors[vectors.any(1)], dim=1)
    return Records(vectors, vectors)
