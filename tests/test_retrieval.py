"""Slots against a loop over documents, causality by changing the future, decoding against the full call."""

from __future__ import annotations

import itertools

import pytest
import torch

from nano_think.chunks import ChunkEncoder, chunk_records, complete_chunks
from nano_think.ops.layout import Layout
from nano_think.retrieval import MemorySlots, Retriever
from nano_think.vector_records import Reader, session_id
from nano_think.vector_store import VectorStore

VOCAB, WIDTH = 40, 12


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def encoder() -> ChunkEncoder:
    embedding = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1))
    return ChunkEncoder.fit(embedding, torch.ones(VOCAB), random_tokens(200, 64, seed=3))


def filled_store(encoder: ChunkEncoder, chunk: int = 64, documents: int = 20) -> VectorStore:
    tokens = random_tokens(documents, 4 * chunk, seed=9)
    hidden = torch.randn(documents, 4 * chunk, WIDTH, generator=torch.Generator().manual_seed(2))
    uid = torch.arange(documents).unsqueeze(1).expand_as(tokens)
    records = chunk_records(encoder, tokens, hidden, chunk=chunk, doc_uid=uid, cluster=uid + 500)
    store = VectorStore(WIDTH, chunk=chunk, fingerprint=encoder.fingerprint(), near_duplicate=None)
    store.add(records.keys, records.values, **records.meta)
    return store


def packed_row() -> tuple[torch.Tensor, Layout, list[tuple[int, int, int]]]:
    """Two rows of documents in pieces of 4: tokens, layout, and (row, begin, length) of each document."""
    documents = [(0, 0, 9), (0, 9, 4), (0, 13, 10), (0, 23, 1), (0, 24, 1), (1, 0, 17), (1, 17, 3)]
    positions = torch.zeros(2, 26, dtype=torch.int64)
    segments = torch.full_like(positions, -1)
    for number, (row, begin, length) in enumerate(documents):
        positions[row, begin : begin + length] = torch.arange(length)
        segments[row, begin : begin + length] = number
    return random_tokens(2, 26), Layout(positions, segments), documents


def seen_by(slots: MemorySlots, row: int, column: int) -> list[int]:
    group = int(slots.index[row, column])
    return [] if group < 0 else slots.hits.ids[row, group][slots.valid[row, group]].tolist()


@pytest.mark.parametrize("granularity", ["chunk", "token"])
def test_slots_equal_a_loop_over_documents(encoder, granularity):
    store = filled_store(encoder, chunk=4)
    tokens, layout, documents = packed_row()
    uid = layout.segments.clamp_min(-1)
    reader = Reader(doc_uid=uid, cluster=uid + 501)
    slots = Retriever(store, encoder, chunk=4, k=3, granularity=granularity).retrieve(tokens, layout, reader)
    for number, (row, begin, length) in enumerate(documents):
        for position in range(length):
            end = position // 4 * 4 if granularity == "chunk" else position + 1
            expected, values = [], torch.empty(0, WIDTH)
            if end:
                query = encoder.encode(tokens[row : row + 1, begin + max(0, end - 4) : begin + end])
                mine = Reader(doc_uid=torch.tensor([number]), cluster=torch.tensor([number + 501]))
                found = store.search(query, 3, mine)
                expected, values = found.ids[0].tolist(), found.values[0]
            assert seen_by(slots, row, begin + position) == expected
            if expected:
                group = slots.index[row, begin + position]
                assert torch.equal(slots.values[row, group], values)
    assert (slots.index[layout.pads] == -1).all()
    assert slots.hits.per_query == 3.0
    # No group that nobody sees.
    assert slots.values.shape[1] == int(slots.index.max()) + 1


@pytest.mark.parametrize("granularity", ["chunk", "token"])
def test_neighbours_do_not_depend_on_later_tokens(encoder, granularity):
    retriever = Retriever(filled_store(encoder, chunk=4), encoder, chunk=4, granularity=granularity)
    tokens, layout, _ = packed_row()
    before = retriever.retrieve(tokens, layout)
    changed_something = False
    for cut in range(1, 26):
        other = tokens.clone()
        other[:, cut:] = random_tokens(2, 26, seed=cut + 50)[:, cut:]
        after = retriever.retrieve(other, layout)
        for row, column in itertools.product(range(2), range(26)):
            position = int(layout.positions[row, column])
            asked_until = column - position + position // 4 * 4 if granularity == "chunk" else column + 1
            same = seen_by(before, row, column) == seen_by(after, row, column)
            assert same or asked_until > cut
            changed_something |= not same
    assert changed_something


def test_chunk_zero_sees_nothing_and_each_chunk_its_predecessor(encoder):
    store = filled_store(encoder)
    tokens = random_tokens(1, 200)
    slots = Retriever(store, encoder).retrieve(tokens)
    assert slots.index[0].tolist() == [-1] * 64 + [0] * 64 + [1] * 64 + [2] * 8
    assert slots.values.shape == (1, 3, 4, WIDTH)
    expected = store.search(encoder.encode(tokens[:, 64:128]), 4, Reader())
    assert torch.equal(slots.hits.ids[0, 1], expected.ids[0])
    assert torch.equal(slots.hits.scores[0, 1], expected.scores[0])
    assert not slots.values.requires_grad


def test_passage_in_store_is_found_unless_it_is_the_readers_own(encoder):
    store = filled_store(encoder)
    tokens = random_tokens(20, 256, seed=9)[3:4]
    uid = torch.full_like(tokens, 3)
    retriever = Retriever(store, encoder)
    found = store.lookup(retriever.retrieve(tokens).hits.ids)
    assert found["doc_uid"][0, :, 0].tolist() == [3, 3, 3]
    assert found["chunk"][0, :, 0].tolist() == [0, 1, 2]
    assert found["tokens"][0, 1, 0].tolist() == tokens[0, 64:128].tolist()
    for reader in (Reader(doc_uid=uid), Reader(cluster=uid + 500)):
        slots = retriever.retrieve(tokens, reader=reader)
        assert slots.valid.all()
        assert not (store.lookup(slots.hits.ids)["doc_uid"] == 3).any()


def test_no_memory_is_exactly_none(encoder):
    tokens = random_tokens(2, 130)
    empty = VectorStore(WIDTH)
    full = filled_store(encoder)
    for retriever, reader in (
        (Retriever(empty, encoder), None),
        (Retriever(full, encoder, k=0), None),
        (Retriever(full, encoder), Reader(splits=("test",))),
        (Retriever(full, encoder, chunk=131), None),
    ):
        for slots in (
            retriever.retrieve(tokens, reader=reader),
            retriever.init_state(2, reader).step(tokens),
        ):
            assert slots.empty
            assert slots.values.shape[1] == 0
            assert (slots.index == -1).all()
            assert slots.index.shape == tokens.shape


def test_a_document_that_may_see_nothing_gets_no_group(encoder):
    store = VectorStore(WIDTH, chunk=64)
    store.add(torch.ones(1, WIDTH), doc_uid=7)
    tokens = random_tokens(2, 128)
    uid = torch.tensor([[7], [8]]).expand_as(tokens)
    slots = Retriever(store, encoder).retrieve(tokens, reader=Reader(doc_uid=uid))
    assert (slots.index[0] == -1).all()
    assert (slots.index[1, 64:] == 0).all()
    assert slots.valid[1, 0].tolist() == [True, False, False, False]
    assert slots.hits.per_query == 0.5
    assert not slots.empty


def test_dropout_hides_rows(encoder):
    slots = Retriever(filled_store(encoder), encoder).retrieve(random_tokens(3, 130))
    dropped = slots.dropped(torch.tensor([True, False, True]))
    assert (dropped.index[1] == -1).all()
    assert not dropped.valid[1].any()
    for row in (0, 2):
        assert torch.equal(dropped.index[row], slots.index[row])
        assert torch.equal(dropped.valid[row], slots.valid[row])
    assert slots.dropped(torch.zeros(3, dtype=torch.bool)).empty
    assert torch.equal(slots.to("cpu").values, slots.values)


def same_slots(step: MemorySlots, full: MemorySlots, begin: int) -> None:
    for row in range(len(step.index)):
        for column in range(step.index.shape[1]):
            mine, theirs = int(step.index[row, column]), int(full.index[row, begin + column])
            assert (mine < 0) == (theirs < 0), (row, begin + column)
            if mine >= 0:
                assert torch.equal(step.values[row, mine], full.values[row, theirs])
                assert torch.equal(step.valid[row, mine], full.valid[row, theirs])
                assert torch.equal(step.hits.ids[row, mine], full.hits.ids[row, theirs])


@pytest.mark.parametrize(
    ("granularity", "prompt"),
    [*itertools.product(["chunk", "prompt"], [1, 63, 64, 65, 128, 130]), ("token", 1), ("token", 65)],
)
def test_decoding_equals_the_full_call(encoder, granularity, prompt):
    retriever = Retriever(filled_store(encoder), encoder, granularity=granularity)
    tokens, reader = random_tokens(3, prompt + 70), Reader(doc_uid=torch.tensor([1, 2, 3]))
    wide = Reader(doc_uid=reader.doc_uid.unsqueeze(1).expand_as(tokens))
    full = retriever.retrieve(tokens, reader=wide, prompt_len=prompt)
    state, begin = retriever.init_state(3, reader), 0
    for n in (prompt, 1, 1, 2, 61, 1, 1, 3):
        same_slots(state.step(tokens[:, begin : begin + n]), full, begin)
        begin += n
        assert state.length == begin
    assert begin == prompt + 70


def test_search_only_at_chunk_borders(encoder, monkeypatch):
    retriever = Retriever(filled_store(encoder), encoder)
    calls = []
    search = retriever.store.search
    monkeypatch.setattr(retriever.store, "search", lambda q, k, r: (calls.append(len(q)), search(q, k, r))[1])
    state, tokens = retriever.init_state(2), random_tokens(2, 200)
    for column in range(200):
        state.step(tokens[:, column : column + 1])
    assert calls == [2, 2, 2]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("granularity", ["chunk", "token"])
def test_random_programs_of_step_rollback_and_reorder(encoder, granularity, seed):
    retriever = Retriever(filled_store(encoder, chunk=8), encoder, chunk=8, granularity=granularity)
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    uid, history = torch.tensor([1, 2, 3]), torch.empty(3, 0, dtype=torch.int64)
    state = retriever.init_state(3, Reader(doc_uid=uid))
    for move in range(40):
        action = draw(4)
        if action == 0 and history.shape[1]:
            n = draw(history.shape[1] + 1)
            state.rollback(n)
            history = history[:, : history.shape[1] - n]
        elif action == 1:
            index = torch.randint(3, (3,), generator=generator)
            state.reorder(index)
            history, uid = history[index], uid[index]
        else:
            new = random_tokens(3, 1 + draw(12), seed=100 * seed + move)
            begin, history = history.shape[1], torch.cat((history, new), 1)
            step = state.step(new)
            wide = Reader(doc_uid=uid.unsqueeze(1).expand_as(history))
            same_slots(step, retriever.retrieve(history, reader=wide), begin)
        assert state.length == history.shape[1]


def test_rollback_refuses_too_much(encoder):
    store = filled_store(encoder)
    state = Retriever(store, encoder).init_state(1)
    state.step(random_tokens(1, 10))
    with pytest.raises(ValueError, match="cannot forget 11 of 10"):
        state.rollback(11)
    state = Retriever(store, encoder, granularity="prompt").init_state(1)
    state.step(random_tokens(1, 10))
    state.step(random_tokens(1, 2))
    state.rollback(2)
    with pytest.raises(ValueError, match="cannot forget 1 of 10"):
        state.rollback(1)


def test_state_counts_its_bytes(encoder):
    state = Retriever(filled_store(encoder), encoder, k=4).init_state(2)
    state.step(random_tokens(2, 63))
    assert state.num_bytes == 2 * 63 * 8
    state.step(random_tokens(2, 2))
    # A kept answer: k vectors and, for each, a score, an id and a flag.
    assert state.num_bytes == 2 * 65 * 8 + 2 * 4 * (4 * WIDTH + 4 + 8 + 1)


def test_finished_sequence_is_remembered_in_its_session_only(encoder):
    store = filled_store(encoder)
    finished, session = random_tokens(1, 192, seed=77), session_id("me")
    hidden = torch.randn(1, 192, WIDTH, generator=torch.Generator().manual_seed(4))
    records = chunk_records(encoder, finished, hidden, session=session)
    new = store.add(records.keys, records.values, **records.meta)
    retriever = Retriever(store, encoder)
    mine = retriever.retrieve(finished, reader=Reader(session=session))
    assert mine.hits.ids[0, :, 0].tolist() == new.tolist()
    torch.testing.assert_close(mine.values[0, 0, 0], hidden[0, 64:128].mean(0))
    for session in (0, session_id("you")):
        others = retriever.retrieve(finished, reader=Reader(session=session))
        assert not set(others.hits.ids.flatten().tolist()) & set(new.tolist())


def test_wrong_settings_are_refused(encoder):
    store = filled_store(encoder)
    for wrong in ({"chunk": 0}, {"k": -1}, {"granularity": "sentence"}):
        with pytest.raises(ValueError):
            Retriever(store, encoder, **wrong)
    with pytest.raises(ValueError, match="another chunk encoder"):
        Retriever(store, ChunkEncoder.mean_of(encoder.table + 1))
    with pytest.raises(ValueError, match="prompt_len"):
        Retriever(store, encoder, granularity="prompt").retrieve(random_tokens(1, 70))


class TestWholeSequence:
    def test_one_query_a_document_of_all_its_tokens(self, encoder):
        store = filled_store(encoder, chunk=4)
        tokens, layout, documents = packed_row()
        slots = Retriever(store, encoder, chunk=4, k=3, granularity="sequence").retrieve(tokens, layout)
        for row, begin, length in documents:
            query = encoder.encode(tokens[row : row + 1, begin : begin + length])
            expected = store.search(query, 3, Reader())
            for column in range(begin, begin + length):
                assert seen_by(slots, row, column) == expected.ids[0].tolist()
                assert torch.equal(slots.values[row, slots.index[row, column]], expected.values[0])
        assert (slots.index[layout.pads] == -1).all()
        assert slots.values.shape[1] == int(slots.index.max()) + 1

    def test_a_later_token_changes_what_the_first_sees_in_its_own_document_alone(self, encoder):
        store = filled_store(encoder, chunk=4)
        tokens, layout, _ = packed_row()
        changed = tokens.clone()
        changed[0, 20:23] = (changed[0, 20:23] + 7) % VOCAB  # the end of the document that begins at 13
        for granularity, first_moves in (("sequence", True), ("chunk", False), ("token", False)):
            retriever = Retriever(store, encoder, chunk=4, granularity=granularity)
            before, after = (retriever.retrieve(some, layout) for some in (tokens, changed))
            assert (seen_by(before, 0, 13) != seen_by(after, 0, 13)) == first_moves
            others = [*((0, column) for column in (0, 8, 9, 12, 23, 24)), *((1, c) for c in range(20))]
            assert all(seen_by(before, *where) == seen_by(after, *where) for where in others)

    def test_it_cannot_decode(self, encoder):
        retriever = Retriever(filled_store(encoder), encoder, granularity="sequence")
        with pytest.raises(ValueError, match=r"granularity=sequence .* cannot decode"):
            retriever.init_state(1)


class TestWriteOnRead:
    def test_reading_changes_the_store_with_the_option_alone(self, encoder):
        tokens = random_tokens(2, 200)
        for option, added in (({}, 0), ({"write_on_read": True}, 2 * 3)):
            store = filled_store(encoder)
            before = len(store)
            Retriever(store, encoder, **option).retrieve(tokens)
            assert len(store) == before + added

    def test_a_pass_reads_as_ever_and_the_next_finds_what_follows_each_chunk(self, encoder):
        store = VectorStore(WIDTH, chunk=4)
        tokens, layout, _ = packed_row()
        retriever = Retriever(store, encoder, chunk=4, k=1, write_on_read=True)
        assert retriever.retrieve(tokens, layout).empty
        slots = retriever.retrieve(tokens, layout)
        chunks = complete_chunks(tokens, layout, 4)
        judged = 0
        for row, begin in zip(chunks.rows.tolist(), chunks.begin.tolist(), strict=True):
            segment = layout.segments[row, begin]
            following = [
                c for c in range(begin + 4, min(begin + 8, 26)) if layout.segments[row, c] == segment
            ]
            for column in following:
                value = slots.values[row, slots.index[row, column], 0]
                torch.testing.assert_close(value, encoder.table[tokens[row, following]].mean(0))
                judged += 1
        assert judged == int((slots.index >= 0).sum()) > 20

    def test_what_an_earlier_reading_saw_later_reaches_earlier_tokens(self, encoder):
        """Two texts that part at token 100; readers of their common beginning see which of them was read."""
        tokens = random_tokens(1, 128)
        other = torch.cat((tokens[:, :100], random_tokens(1, 28, seed=5)), dim=1)
        seen = {}
        for write in (False, True):
            for name, first in (("same", tokens), ("other", other)):
                retriever = Retriever(filled_store(encoder), encoder, write_on_read=write)
                retriever.retrieve(first)
                seen[write, name] = retriever.retrieve(tokens[:, :100]).values
        assert torch.equal(seen[False, "same"], seen[False, "other"])
        assert not torch.equal(seen[True, "same"], seen[True, "other"])

    def test_the_rule_against_ones_own_document_does_not_hold_it_back(self, encoder):
        store, tokens = VectorStore(WIDTH, chunk=64), random_tokens(1, 128)
        uid = torch.full_like(tokens, 3)
        retriever = Retriever(store, encoder, write_on_read=True)
        for found in (0, 1):
            slots = retriever.retrieve(tokens, reader=Reader(doc_uid=uid, cluster=uid))
            assert int(slots.valid.sum()) == found

    def test_decoding_does_not_write(self, encoder):
        store = filled_store(encoder)
        before = len(store)
        Retriever(store, encoder, write_on_read=True).init_state(1).step(random_tokens(1, 200))
        assert len(store) == before


def test_retrievers_name_their_leaks(encoder):
    store = filled_store(encoder)
    for options, parts in (
        ({}, []),
        ({"granularity": "token"}, []),
        ({"granularity": "sequence"}, ["granularity=sequence"]),
        ({"granularity": "sequence", "write_on_read": True}, ["granularity=sequence", "write_on_read=true"]),
    ):
        leaks = Retriever(store, encoder, **options).leaks
        assert len(leaks) == len(parts)
        assert all(part in leak for part, leak in zip(parts, leaks, strict=True))
