"""Continuing a text with a checkpoint from disk, and sessions whose memory outlives the process."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nano_think.artifacts.build import build
from nano_think.artifacts.checkpoint import Checkpoint, load_checkpoint, save_expert, save_fused
from nano_think.artifacts.memory import Memory, memory_of, save_memory
from nano_think.chunks import ChunkEncoder, chunk_records
from nano_think.engine.sampling import SamplingConfig
from nano_think.engine.session import (
    Continuation,
    Session,
    continue_text,
    read_prompt,
    save_continuations,
    session_folder,
)
from nano_think.errors import UserError
from nano_think.model import ExpertLM
from nano_think.vector_records import Reader
from nano_think.vector_store import VectorStore

D, CHUNK, CONTEXT = 16, 8, 40
GREEDY = SamplingConfig(temperature=0.0)
TRANSFORMER = {"_target_": "nano_think.experts.transformer.TransformerExpert", "d_model": D}
TRANSFORMER |= {"num_layers": 1, "num_heads": 2, "ffn_dim": 24}
STATE_SPACE = {"_target_": "nano_think.experts.state_space.StateSpaceExpert", "d_model": D}
STATE_SPACE |= {"num_layers": 1, "d_inner": 24, "d_state": 4}


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def make_checkpoint(randomise, byte_tokenizer, tmp_path):
    """`make_checkpoint("name", seed)`: a fused model of noise with 20 records of its own, loaded from disk.

    gain: of its first expert. k: neighbours that it asks for.
    """

    def make(name: str = "model", seed: int = 0, gain: float = 1.0, k: int = 2) -> Checkpoint:
        vocab_size = byte_tokenizer.vocab_size
        mla = {"_target_": "nano_think.mla.MultiHeadLatentAttention", "d_model": D, "num_heads": 2}
        spec = {"_target_": "nano_think.model.NanoThink", "vocab_size": vocab_size, "d_model": D}
        spec |= {"experts": {"transformer": TRANSFORMER, "state_space": STATE_SPACE}}
        spec |= {"mla": mla | {"memory": True}}
        model = randomise(build(spec), seed=seed)
        with torch.no_grad():
            model.expert_gain[0].mul_(gain)
        save_fused(tmp_path / name, spec, model, byte_tokenizer, CONTEXT)
        documents = ids(20, 2 * CHUNK, seed=8)
        encoder = ChunkEncoder.fit(model.embedding.weight, torch.ones(vocab_size), documents[:, :CHUNK])
        store = VectorStore(D, chunk=CHUNK, fingerprint=encoder.fingerprint())
        hidden = torch.randn(20, 2 * CHUNK, D, generator=torch.Generator().manual_seed(9))
        records = chunk_records(encoder, documents, hidden, chunk=CHUNK)
        store.add(records.keys, records.values, **records.meta)
        retrieval = {"k": k, "chunk": CHUNK, "granularity": "chunk"}
        save_memory(Memory.over(store, encoder, retrieval, {"records": 20}), tmp_path / name / "memory")
        return load_checkpoint(tmp_path / name)

    return make


@pytest.fixture
def checkpoint(make_checkpoint) -> Checkpoint:
    return make_checkpoint()


@pytest.fixture
def expert(randomise, byte_tokenizer, tmp_path) -> Checkpoint:
    model = ExpertLM((byte_tokenizer.vocab_size, D), randomise(build(TRANSFORMER)))
    save_expert(tmp_path / "expert", "transformer", TRANSFORMER, model, byte_tokenizer, CONTEXT)
    return load_checkpoint(tmp_path / "expert")


class TestContinueText:
    def test_stream_is_the_prompt_the_text_and_a_line_end(self, checkpoint):
        out = io.StringIO()
        made = continue_text(checkpoint, "Über", 20, SamplingConfig(seed=3), stream=out)
        assert out.getvalue() == f"{made.prompt}{made.text}\n"
        assert made.text == "".join(record["text"] for record in made.tokens)
        assert continue_text(checkpoint, "Über", 20, SamplingConfig(seed=3)) == made
        assert continue_text(checkpoint, "Über", 20, SamplingConfig(seed=4)).text != made.text

    def test_json_holds_texts_experts_and_a_weight_for_each_token_and_expert(self, checkpoint, tmp_path):
        made = continue_text(checkpoint, "x=[1,\n2]", 5, GREEDY)
        save_continuations(tmp_path / "made.json", [made])
        (read,) = json.loads((tmp_path / "made.json").read_text())
        assert read["prompt"] == "x=[1,\n2]"
        assert read["full_text"] == read["prompt"] + read["text"]
        assert read["experts"] == ["transformer", "state_space"]
        assert read["context_full"] is False
        assert 1 <= len(read["tokens"]) <= 5
        for record in read["tokens"]:
            assert set(record) == {"id", "text", "logprob", "weights"}
            assert record["logprob"] <= 0
            assert list(record["weights"]) == read["experts"]
            assert sum(record["weights"].values()) == pytest.approx(1, abs=1e-5)

    def test_an_expert_alone_has_no_weights(self, expert):
        made = continue_text(expert, "abc", 4, GREEDY)
        assert made.experts == []
        assert all("weights" not in record for record in made.tokens)

    def test_options_reach_the_model(self, checkpoint):
        made = continue_text(checkpoint, "abc", 4, GREEDY, options={"knock_out": ["transformer"]})
        assert all(record["weights"]["transformer"] == 0 for record in made.tokens)

    def test_a_prompt_fills_the_context_but_may_not_exceed_it(self, checkpoint):
        longest = "a" * (CONTEXT - 1)  # the document start takes one place
        made = continue_text(checkpoint, longest, 10, GREEDY)
        assert len(made.tokens) == 1
        assert made.context_full
        with pytest.raises(UserError, match=f"{CONTEXT} tokens, .* holds {CONTEXT - 1}: shorten"):
            continue_text(checkpoint, longest + "a", 1, GREEDY)

    def test_an_empty_prompt_starts_a_document(self, checkpoint):
        assert len(continue_text(checkpoint, "", 3, GREEDY).tokens) > 0

    def test_memory_of_the_model_is_read(self, checkpoint, monkeypatch):
        prompt = "a chunk and more"
        with_memory = continue_text(checkpoint, prompt, 4, GREEDY)
        monkeypatch.setattr("nano_think.engine.session.memory_of", lambda checkpoint: None)
        without = continue_text(checkpoint, prompt, 4, GREEDY)
        assert with_memory.tokens[0]["logprob"] != without.tokens[0]["logprob"]


class TestSession:
    FACT = "the key lies under the third stone"

    def open(self, checkpoint: Checkpoint, tmp_path: Path, name: str = "ann", **options: bool) -> Session:
        return Session(checkpoint, name, session_folder(tmp_path / "sessions", name), **options)

    def plant(self, session: Session, checkpoint: Checkpoint) -> list[int]:
        tokens = [checkpoint.tokenizer.bos_id, *checkpoint.tokenizer.encode(self.FACT)]
        assert session.append(checkpoint, tokens) == len(tokens) // CHUNK
        return tokens

    def top_hit(self, session: Session, tokens: list[int]) -> tuple[list[int], float]:
        """Tokens and score of the nearest record of the first chunk."""
        block, reader = torch.tensor([tokens[:CHUNK]]), Reader(session=session.number)
        found = session.memory.retriever.search(block, reader)
        return session.memory.store.lookup(found.ids[0, :1])["tokens"][0].tolist(), float(found.scores[0, 0])

    def test_appending_grows_the_session_and_stays(self, checkpoint, tmp_path):
        session = self.open(checkpoint, tmp_path)
        shared = len(session.memory.store)
        assert (session.own_records, shared) == (0, 20)
        for count in (1, 2):
            tokens = self.plant(session, checkpoint)
            grown = count * (len(tokens) // CHUNK)
            again = self.open(checkpoint, tmp_path)
            assert session.own_records == again.own_records == grown
            assert len(again.memory.store) == shared + grown
        assert session.append(checkpoint, [1, 2, 3]) == 0

    def test_a_planted_fact_is_the_top_hit_of_the_same_session_only(self, checkpoint, tmp_path):
        tokens = self.plant(self.open(checkpoint, tmp_path, "ann"), checkpoint)
        hit, score = self.top_hit(self.open(checkpoint, tmp_path, "ann"), tokens)
        assert hit == tokens[:CHUNK]
        assert score == pytest.approx(1, abs=1e-5)
        stranger = self.open(checkpoint, tmp_path, "bob")
        assert stranger.own_records == 0
        assert self.top_hit(stranger, tokens)[0] != tokens[:CHUNK]
        # nor would another name find it in the very same store
        stranger.memory = self.open(checkpoint, tmp_path, "ann").memory
        assert self.top_hit(stranger, tokens)[0] != tokens[:CHUNK]

    def test_what_was_said_before_changes_what_is_said_next(self, checkpoint, tmp_path):
        prompt = self.FACT[: 2 * CHUNK]
        first = continue_text(checkpoint, prompt, 6, GREEDY, self.open(checkpoint, tmp_path))
        remembered = self.open(checkpoint, tmp_path)
        assert remembered.own_records == (1 + len(prompt) + len(first.tokens) - 1) // CHUNK
        second = continue_text(checkpoint, prompt, 6, GREEDY, remembered)
        other = continue_text(checkpoint, prompt, 6, GREEDY, self.open(checkpoint, tmp_path, "bob"))
        assert other == first
        assert second.tokens[0]["logprob"] != first.tokens[0]["logprob"]

    def test_the_models_own_memory_is_left_alone(self, checkpoint, tmp_path):
        before = {path: path.read_bytes() for path in checkpoint.path.rglob("*") if path.is_file()}
        self.plant(self.open(checkpoint, tmp_path), checkpoint)
        assert before == {path: path.read_bytes() for path in checkpoint.path.rglob("*") if path.is_file()}

    def test_reset_begins_anew(self, checkpoint, tmp_path):
        self.plant(self.open(checkpoint, tmp_path), checkpoint)
        self.plant(self.open(checkpoint, tmp_path, "bob"), checkpoint)
        assert self.open(checkpoint, tmp_path, reset=True).own_records == 0
        assert self.open(checkpoint, tmp_path).own_records == 0
        assert self.open(checkpoint, tmp_path, "bob").own_records > 0

    def test_a_killed_append_leaves_the_session_as_it_was(self, checkpoint, tmp_path, monkeypatch):
        session = self.open(checkpoint, tmp_path)
        self.plant(session, checkpoint)
        kept = session.own_records

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        for name in ("nano_think.generations.atomic_write", "numpy.save"):
            opened = self.open(checkpoint, tmp_path)
            with monkeypatch.context() as patch:
                patch.setattr(name, killed)
                with pytest.raises(KeyboardInterrupt):
                    self.plant(opened, checkpoint)
            assert self.open(checkpoint, tmp_path).own_records == kept
        self.plant(self.open(checkpoint, tmp_path), checkpoint)
        assert self.open(checkpoint, tmp_path).own_records == 2 * kept

    def test_a_session_of_another_model_is_refused_until_it_is_reset(
        self, checkpoint, make_checkpoint, tmp_path
    ):
        self.plant(self.open(checkpoint, tmp_path), checkpoint)
        other = make_checkpoint("other", seed=1)
        with pytest.raises(UserError, match=r"session ann was kept by another model.*reset=true"):
            self.open(other, tmp_path)
        assert self.open(other, tmp_path, reset=True).own_records == 0

    def test_two_models_over_one_encoder_have_sessions_of_their_own(
        self, checkpoint, make_checkpoint, tmp_path
    ):
        """As two stages 7d from one stage 7c have, whose encoder is that of 7c."""
        self.plant(self.open(checkpoint, tmp_path), checkpoint)
        trained_on = make_checkpoint("longer", gain=1.5)
        asked_otherwise = make_checkpoint("otherwise", k=4)
        for other in (trained_on, asked_otherwise):
            fingerprints = [memory_of(made).encoder.fingerprint() for made in (checkpoint, other)]
            assert fingerprints[0] == fingerprints[1]
            with pytest.raises(UserError, match="session ann was kept by another model"):
                self.open(other, tmp_path)

    def test_a_session_from_before_models_were_noted_goes_on(self, checkpoint, tmp_path):
        self.plant(self.open(checkpoint, tmp_path), checkpoint)
        settings = tmp_path / "sessions" / "ann" / "settings.json"
        told = json.loads(settings.read_text())
        del told["figures"]["model"]
        settings.write_text(json.dumps(told))
        session = self.open(checkpoint, tmp_path)
        kept = session.own_records
        self.plant(session, checkpoint)
        assert self.open(checkpoint, tmp_path).own_records == 2 * kept > 0

    def test_who_opened_it_before_another_wrote_loses_nothing(self, checkpoint, tmp_path):
        both = [self.open(checkpoint, tmp_path) for _ in range(2)]
        for session in both:
            self.plant(session, checkpoint)
        (one, two), now = both, self.open(checkpoint, tmp_path)
        assert now.own_records == two.own_records == 2 * one.own_records > 0
        assert [path.name for path in now.folder.parent.iterdir()] == ["ann"]

    def test_a_model_without_memory_has_no_sessions(self, expert, tmp_path):
        with pytest.raises(UserError, match=r"no memory to keep a session in.*stage=7d"):
            self.open(expert, tmp_path)

    @pytest.mark.parametrize("name", ["", ".", "..", "../ann", "/ann", "a/b", ".hidden", "a\\b", " x"])
    def test_a_name_cannot_lead_out_of_the_folder_of_sessions(self, tmp_path, name):
        with pytest.raises(UserError, match="names no session"):
            session_folder(tmp_path, name)

    @pytest.mark.parametrize("name", ["ann", "Übung 2", "2026-01-01_notes.v2"])
    def test_ordinary_names_are_folders(self, tmp_path, name):
        assert session_folder(tmp_path, name) == tmp_path / name


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestReadPrompt:
    def test_argument_then_file_then_pipe(self, tmp_path):
        file = tmp_path / "prompt.txt"
        file.write_text("from, [a] = file\n", encoding="utf-8")
        assert read_prompt("typed", None, io.StringIO("piped")) == "typed"
        assert read_prompt("", None, io.StringIO("piped")) == ""
        assert read_prompt(None, str(file), io.StringIO("piped")) == "from, [a] = file\n"
        assert read_prompt(None, None, io.StringIO("piped\n")) == "piped\n"

    def test_a_terminal_is_not_waited_for(self):
        assert read_prompt(None, None, Terminal("never read")) == ""
        assert read_prompt(None, None, None) == ""

    def test_every_job_of_a_sweep_reads_the_same_pipe(self):
        pipe = io.StringIO("piped\n")
        assert [read_prompt(None, None, pipe) for _ in range(2)] == ["piped\n", "piped\n"]

    def test_two_sources_are_refused(self, tmp_path):
        with pytest.raises(UserError, match="not by both"):
            read_prompt("typed", str(tmp_path / "prompt.txt"), io.StringIO())

    def test_unreadable_sources_are_named(self, tmp_path):
        latin = tmp_path / "latin.txt"
        latin.write_bytes("Über".encode("latin-1"))
        for path in (latin, tmp_path / "missing.txt", tmp_path):
            with pytest.raises(UserError, match=r"prompt_file=.*UTF-8"):
                read_prompt(None, str(path), io.StringIO())
        pipe = io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8")
        with pytest.raises(UserError, match=r"standard input.*UTF-8"):
            read_prompt(None, None, pipe)


def test_full_text_is_prompt_and_text():
    made = Continuation("a", "b", [], [], False)
    assert made.as_json()["full_text"] == "ab"
