"""The chunk encoder against NumPy, chunks and records against loops over documents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nano_think.chunks import (
    ChunkEncoder,
    chunk_index,
    chunk_records,
    complete_chunks,
    seed_records,
    token_records,
)
from nano_think.ops.layout import Layout
from nano_think.vector_records import Reader
from nano_think.vector_store import VectorStore

VOCAB, WIDTH, CHUNK = 50, 12, 4


def packed(lengths: list[list[int]], pad_to: int) -> Layout:
    """Rows of documents of the given lengths, padded at the end."""
    positions = torch.zeros(len(lengths), pad_to, dtype=torch.int64)
    segments = torch.full_like(positions, -1)
    for row, parts in enumerate(lengths):
        begin = 0
        for segment, length in enumerate(parts):
            positions[row, begin : begin + length] = torch.arange(length)
            segments[row, begin : begin + length] = segment
            begin += length
    return Layout(positions, segments)


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def encoder() -> ChunkEncoder:
    generator = torch.Generator().manual_seed(1)
    # A common direction, as real embeddings have one.
    embedding = torch.randn(VOCAB, WIDTH, generator=generator) + 2
    return ChunkEncoder.fit(embedding, torch.arange(VOCAB) ** 2, random_tokens(200, CHUNK, seed=3))


def test_encoder_is_sif(encoder):
    table = encoder.table.double().numpy()
    counts = np.arange(VOCAB) ** 2
    weights = 1e-3 / (1e-3 + counts / counts.sum())

    def raw(rows: torch.Tensor) -> np.ndarray:
        kept = [[t for t in row if t >= 0] for row in rows.tolist()]
        return np.array([sum(weights[t] * table[t] for t in row) / len(row) for row in kept])

    sample = raw(random_tokens(200, CHUNK, seed=3))
    component = np.linalg.svd(sample)[2][0]
    tokens = random_tokens(30, 7)
    tokens[3, 2:] = -1
    expected = raw(tokens)
    expected = expected - np.outer(expected @ component, component)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    encoded = encoder.encode(tokens)
    np.testing.assert_allclose(encoded.numpy(), expected, atol=2e-5)
    torch.testing.assert_close(encoded.norm(dim=1), torch.ones(30))
    torch.testing.assert_close(encoded @ encoder.component, torch.zeros(30), atol=1e-6, rtol=0)


def test_component_and_weights_spread_the_chunks(encoder):
    def mean_cosine(vectors: torch.Tensor) -> float:
        return float((vectors @ vectors.T).abs().mean())

    tokens = random_tokens(100, CHUNK)
    assert mean_cosine(encoder.encode(tokens)) < 0.5 * mean_cosine(
        ChunkEncoder.mean_of(encoder.table).encode(tokens)
    )


def test_mean_of_is_the_plain_mean(encoder):
    tokens = random_tokens(5, CHUNK)
    plain = ChunkEncoder.mean_of(encoder.table).encode(tokens)
    torch.testing.assert_close(plain, F.normalize(encoder.table[tokens].mean(1), dim=1))


def test_encoder_is_frozen_and_free_of_gradients(encoder):
    embedding = torch.nn.Parameter(torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0)))
    fitted = ChunkEncoder.fit(embedding, torch.ones(VOCAB), random_tokens(9, CHUNK))
    before = fitted.encode(random_tokens(3, CHUNK))
    with torch.no_grad():
        embedding.mul_(0).add_(1)
    assert torch.equal(fitted.encode(random_tokens(3, CHUNK)), before)
    assert not before.requires_grad
    assert list(fitted.parameters()) == []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fitted.encode(random_tokens(3, CHUNK)), before)


def test_fingerprint_follows_every_buffer(encoder):
    seen = {encoder.fingerprint()}
    copy = ChunkEncoder(vocab_size=VOCAB, d_model=WIDTH)
    copy.load_state_dict(encoder.state_dict())
    assert copy.fingerprint() in seen
    for name in ("table", "weights", "component"):
        getattr(copy, name).view(-1)[0] += 1e-3
        seen.add(copy.fingerprint())
    assert len(seen) == 4


def test_no_direction_gives_zeros(encoder):
    assert torch.equal(encoder.encode(torch.full((1, CHUNK), -1)), torch.zeros(1, WIDTH))
    with pytest.raises(ValueError, match="token counts"):
        ChunkEncoder.fit(encoder.table, torch.ones(3), random_tokens(3, CHUNK))
    with pytest.raises(ValueError, match="token counts"):
        ChunkEncoder.fit(encoder.table, torch.zeros(VOCAB), random_tokens(3, CHUNK))


def test_chunks_of_packed_documents():
    layout = packed([[9, 4, 3], [12, 5]], 18)
    tokens = random_tokens(2, 18)
    index = chunk_index(layout, CHUNK)
    assert index[0].tolist() == [0] * 4 + [1] * 4 + [2] + [0] * 4 + [0] * 3 + [-1] * 2
    chunks = complete_chunks(tokens, layout, CHUNK)
    assert chunks.rows.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert chunks.begin.tolist() == [0, 4, 9, 0, 4, 8, 12]
    assert chunks.segments.tolist() == [0, 0, 1, 0, 0, 0, 1]
    assert chunks.numbers.tolist() == [0, 1, 0, 0, 1, 2, 0]
    for row, begin, block in zip(chunks.rows, chunks.begin, chunks.tokens, strict=True):
        assert torch.equal(block, tokens[row, begin : begin + CHUNK])


@pytest.mark.parametrize("value_of", ["next", "own"])
def test_records_of_packed_documents(encoder, value_of):
    lengths = [[9, 4, 8], [12, 5]]
    layout, tokens = packed(lengths, 22), random_tokens(2, 22)
    hidden = torch.randn(2, 22, WIDTH, generator=torch.Generator().manual_seed(2), requires_grad=True)
    doc_uid = layout.segments + 100 * torch.arange(1, 3).unsqueeze(1)
    records = chunk_records(
        encoder,
        tokens,
        hidden,
        layout,
        chunk=CHUNK,
        value_of=value_of,
        doc_uid=doc_uid,
        cluster=doc_uid + 1000,
        domain=torch.tensor([5, 6]),
        split="fusion_train",
    )
    expected = []
    for row, parts in enumerate(lengths):
        begin = 0
        for segment, length in enumerate(parts):
            for number in range(length // CHUNK):
                at = begin + number * CHUNK
                source = range(at, at + CHUNK)
                if value_of == "next":
                    source = range(at + CHUNK, min(at + 2 * CHUNK, begin + length))
                if len(source):
                    value = torch.stack([hidden[row, i] for i in source]).mean(0).detach()
                    expected.append((row, segment, number, at, value))
            begin += length
    assert records.meta["doc_uid"].tolist() == [100 * (row + 1) + segment for row, segment, *_ in expected]
    assert records.meta["cluster"].tolist() == [uid + 1000 for uid in records.meta["doc_uid"].tolist()]
    assert records.meta["domain"].tolist() == [row + 5 for row, *_ in expected]
    assert records.meta["chunk"].tolist() == [number for _, _, number, _, _ in expected]
    assert records.meta["token_offset"].tolist() == [CHUNK * number for _, _, number, _, _ in expected]
    blocks = torch.stack([tokens[row, at : at + CHUNK] for row, _, _, at, _ in expected])
    assert torch.equal(records.meta["tokens"], blocks)
    torch.testing.assert_close(records.keys, encoder.encode(blocks))
    torch.testing.assert_close(records.values, torch.stack([value for *_, value in expected]))
    assert not records.values.requires_grad


def test_stored_passage_is_its_own_top_hit(encoder):
    tokens = random_tokens(6, 40)
    hidden = torch.randn(6, 40, WIDTH, generator=torch.Generator().manual_seed(2))
    records = chunk_records(encoder, tokens, hidden, chunk=CHUNK)
    store = VectorStore(WIDTH, chunk=CHUNK, fingerprint=encoder.fingerprint())
    ids = store.add(records.keys, records.values, **records.meta)
    assert len(store) == 6 * 9
    hits = store.search(encoder.encode(records.meta["tokens"]), 1, Reader())
    assert hits.ids[:, 0].tolist() == ids.tolist()
    torch.testing.assert_close(hits.scores[:, 0], torch.ones(len(ids)))
    assert np.array_equal(store.lookup(hits.ids[:, 0])["tokens"], records.meta["tokens"].numpy())


def test_records_without_a_complete_chunk_and_wrong_option(encoder):
    hidden = torch.zeros(1, 3, WIDTH)
    records = chunk_records(encoder, random_tokens(1, 3), hidden, chunk=CHUNK)
    assert records.keys.shape == records.values.shape == (0, WIDTH)
    store = VectorStore(WIDTH, chunk=CHUNK)
    assert len(store.add(records.keys, records.values, **records.meta)) == len(store) == 0
    with pytest.raises(ValueError, match="value_of"):
        chunk_records(encoder, random_tokens(1, 3), hidden, value_of="previous")


def test_seed_records_are_normalised_outputs():
    hidden = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(2))
    hidden[0, 1] = 0
    valid = torch.tensor([[True, True, False], [True, True, True]])
    records = seed_records(hidden, valid)
    expected = torch.stack([hidden[0, 0], *hidden[1]])
    torch.testing.assert_close(records.keys, expected / expected.norm(dim=1, keepdim=True))
    assert torch.equal(records.keys, records.values)


def test_token_records_equal_a_loop_over_documents(encoder):
    layout, tokens = packed([[3, 1, 6], [9]], 11), random_tokens(2, 11, seed=5)
    uid = torch.arange(22).view(2, 11) // 5
    records = token_records(
        encoder, tokens, layout, span=3, doc_uid=uid, domain=torch.tensor([4, 2]), split="test"
    )
    expected: dict[str, list] = {name: [] for name in ("tokens", "offset", "uid", "domain", "next")}
    for row, lengths in enumerate([[3, 1, 6], [9]]):
        start = 0
        for length in lengths:
            for last in range(length - 1):
                begin = max(0, last - 2)
                window = tokens[row, start + begin : start + last + 1].tolist()
                expected["tokens"].append(window + [-1] * (3 - len(window)))
                expected["offset"].append(begin)
                expected["uid"].append(int(uid[row, start + last]))
                expected["domain"].append([4, 2][row])
                expected["next"].append(int(tokens[row, start + last + 1]))
            start += length
    assert records.meta["tokens"].tolist() == expected["tokens"]
    assert records.meta["token_offset"].tolist() == expected["offset"]
    assert records.meta["doc_uid"].tolist() == expected["uid"]
    assert records.meta["domain"].tolist() == expected["domain"]
    assert records.meta["split"] == "test"
    torch.testing.assert_close(records.keys, encoder.encode(torch.tensor(expected["tokens"])))
    assert torch.equal(records.values, encoder.table[torch.tensor(expected["next"])])
