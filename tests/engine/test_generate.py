from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from nano_think.cache import Cache
from nano_think.chunks import ChunkEncoder, chunk_records
from nano_think.engine.generate import generate
from nano_think.engine.sampling import SamplingConfig
from nano_think.experts.transformer import TransformerExpert
from nano_think.mla import MultiHeadLatentAttention
from nano_think.model import NanoThink
from nano_think.retrieval import Retriever
from nano_think.vector_store import VectorStore

VOCAB, WIDTH, EXPERTS = 31, 32, 3
GREEDY = SamplingConfig(temperature=0.0)


@dataclass
class Output:
    logits: Tensor
    weights: Tensor | None


class TinyLM(nn.Module):
    """Embedding, Transformer expert, tied head, and a stand-in router that reads the hidden state."""

    def __init__(self, routed: bool = True) -> None:
        super().__init__()
        self.vocab_size, self.lengths, self.options = VOCAB, [], []
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.expert = TransformerExpert(WIDTH, num_layers=2, num_heads=2, ffn_dim=48)
        self.router = nn.Linear(WIDTH, EXPERTS) if routed else None

    def head(self, hidden: Tensor) -> Output:
        weights = None if self.router is None else self.router(hidden).softmax(dim=-1)
        return Output(hidden @ self.embedding.weight.T, weights)

    def forward(self, tokens: Tensor) -> Output:
        return self.head(self.expert(self.embedding(tokens)))

    def init_state(self, batch: int, max_len: int, max_rollback: int = 0) -> Cache:
        return self.expert.init_state(batch, max_len, max_rollback)

    def extend(self, tokens: Tensor, state: Cache, **options) -> Output:
        assert not self.training
        self.lengths.append(tokens.shape[1])
        self.options.append(options)
        return self.head(self.expert.extend(self.embedding(tokens), state))


@pytest.fixture
def model(randomise) -> TinyLM:
    return randomise(TinyLM(), scale=1.5).eval()


def prompts(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 2, 7])
def test_greedy_equals_full_recomputation(model: TinyLM, length: int) -> None:
    tokens = prompts(3, length)
    result = generate(model, tokens, 12, GREEDY)
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), dim=1)
        full = model(tokens)
    assert result.tokens == tokens[:, length:].tolist()
    picked = full.logits[:, length - 1 : -1].log_softmax(-1).gather(-1, tokens[:, length:, None])
    torch.testing.assert_close(torch.tensor(result.logprobs), picked.squeeze(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.stack(result.prompt_weights), full.weights[:, :length])
    torch.testing.assert_close(
        torch.stack(result.weights), full.weights[:, length - 1 : -1], atol=1e-5, rtol=0
    )


def test_prompt_in_one_pass_then_one_position_a_step(model: TinyLM) -> None:
    generate(model, prompts(2, 9), 6, GREEDY)
    assert model.lengths == [9, 1, 1, 1, 1, 1]


def test_rows_of_a_batch_equal_the_rows_alone(model: TinyLM) -> None:
    tokens, config = prompts(4, 3), SamplingConfig(1.0, 20, 0.95, seed=5)
    together = generate(model, tokens, 10, config)
    for row in range(4):
        alone = generate(model, tokens[row : row + 1], 10, config, row_ids=[row])
        assert alone.tokens == [together.tokens[row]]
    assert generate(model, tokens, 10, config).tokens == together.tokens
    assert generate(model, tokens, 10, SamplingConfig(1.0, 20, 0.95, seed=6)).tokens != together.tokens


def test_rows_stop_at_their_own_end_token(model: TinyLM) -> None:
    tokens, config = prompts(6, 2), SamplingConfig(seed=1)
    endless = generate(model, tokens, 30, config)
    eos = endless.tokens[0][9]
    result = generate(model, tokens, 30, config, eos_id=eos)
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in endless.tokens]
    assert result.tokens == cut
    assert len({len(row) for row in cut}) > 1
    for row in range(6):
        assert len(result.logprobs[row]) == len(result.weights[row]) == len(cut[row])


def test_generation_ends_when_every_row_has_ended(model: TinyLM) -> None:
    first = generate(model, prompts(1, 4), 1, GREEDY).tokens[0][0]
    model.lengths.clear()
    assert generate(model, prompts(1, 4), 50, GREEDY, eos_id=first).tokens == [[first]]
    assert model.lengths == [4]


def test_callback_sees_what_the_result_holds(model: TinyLM) -> None:
    seen: dict[int, list] = {0: [], 1: []}

    def on_token(row: int, token: int, weights: Tensor) -> None:
        seen[row].append((token, weights))

    result = generate(model, prompts(2, 3), 8, SamplingConfig(seed=2), eos_id=3, on_token=on_token)
    for row in (0, 1):
        assert [token for token, _ in seen[row]] == result.tokens[row]
        assert torch.equal(torch.stack([w for _, w in seen[row]]), result.weights[row])


def test_banned_tokens_never_appear(model: TinyLM) -> None:
    banned = list(range(0, VOCAB, 2))
    result = generate(model, prompts(8, 2), 30, SamplingConfig(2.0), banned_ids=banned)
    assert not {token for row in result.tokens for token in row} & set(banned)


def test_context_ends_generation_with_the_last_position_predicted(model: TinyLM) -> None:
    result = generate(model, prompts(1, 5), 100, GREEDY, context=8)
    assert len(result.tokens[0]) == 4
    assert sum(model.lengths) == 8


def test_prompt_longer_than_the_context_is_refused_with_both_numbers(model: TinyLM) -> None:
    with pytest.raises(ValueError, match=r"9 tokens .* at most 8"):
        generate(model, prompts(1, 9), 1, context=8)
    assert model.lengths == []


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[]], "at least one token"),
        ([], "at least one token"),
        ([[1, 2], [3]], r"one length, these have \[1, 2\]"),
        ([[VOCAB]], "outside the vocabulary of 31"),
        ([[-1]], "outside the vocabulary of 31"),
    ],
)
def test_bad_prompts_are_refused(model: TinyLM, tokens, message) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, tokens, 3)


def test_zero_new_tokens_are_refused(model: TinyLM) -> None:
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, [[1]], 0)


def test_training_modes_come_back_also_after_an_error(model: TinyLM) -> None:
    model.train()
    model.expert.eval()
    before = [module.training for module in model.modules()]
    generate(model, [[1]], 2)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ZeroDivisionError):
        generate(model, [[1]], 2, on_token=lambda *_: 1 / 0)
    assert [module.training for module in model.modules()] == before


def test_model_without_router_has_no_weights(randomise) -> None:
    result = generate(randomise(TinyLM(routed=False)), [[1, 2]], 3, GREEDY)
    assert result.weights is None
    assert result.prompt_weights is None
    assert len(result.tokens[0]) == 3


def test_options_and_memory_slots_reach_every_call(model: TinyLM) -> None:
    class Log:
        def __init__(self) -> None:
            self.read: list[Tensor] = []

        def step(self, tokens: Tensor) -> str:
            self.read.append(tokens)
            return f"slots of {tokens.shape[1]}"

    memory = Log()
    result = generate(model, [[1, 2, 3]], 4, GREEDY, memory=memory, options={"knock_out": [0]})
    assert [options["memory"] for options in model.options] == ["slots of 3"] + ["slots of 1"] * 3
    assert all(options["knock_out"] == [0] for options in model.options)
    assert torch.cat(memory.read, dim=1).tolist() == [[1, 2, 3, *result.tokens[0][:-1]]]


def fused(randomise) -> NanoThink:
    expert = partial(TransformerExpert, num_layers=1, num_heads=2, ffn_dim=24)
    mla = partial(MultiHeadLatentAttention, num_heads=2, memory=True)
    return randomise(NanoThink({"a": expert, "b": expert}, VOCAB, WIDTH, mla=mla)).eval()


def retriever(model: NanoThink, chunk: int) -> Retriever:
    """Over a store of random documents, encoded with the model's own embedding."""
    documents = prompts(8, 4 * chunk, seed=3)
    encoder = ChunkEncoder.fit(model.embedding.weight.detach(), torch.ones(VOCAB), documents)
    hidden = torch.randn(8, 4 * chunk, WIDTH, generator=torch.Generator().manual_seed(4))
    uid = torch.arange(8).unsqueeze(1).expand_as(documents)
    records = chunk_records(encoder, documents, hidden, chunk=chunk, doc_uid=uid, cluster=uid + 50)
    store = VectorStore(WIDTH, chunk=chunk, fingerprint=encoder.fingerprint(), near_duplicate=None)
    store.add(records.keys, records.values, **records.meta)
    return Retriever(store, encoder, chunk=chunk, k=2)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 9])
@torch.no_grad()
def test_memory_is_refreshed_at_chunk_borders_as_in_the_full_forward(randomise, length) -> None:
    model = fused(randomise)
    search, tokens = retriever(model, chunk=4), prompts(2, length)
    result = generate(model, tokens, 11, GREEDY, memory=search.init_state(2))
    whole = torch.cat((tokens, torch.tensor(result.tokens)), dim=1)[:, :-1]
    slots = search.retrieve(whole)
    assert (slots.index >= 0).any()
    full = model(whole, memory=slots)
    assert full.logits[:, length - 1 :].argmax(dim=-1).tolist() == result.tokens
    weights = torch.cat((torch.stack(result.prompt_weights)[:, :-1], torch.stack(result.weights)), dim=1)
    torch.testing.assert_close(weights, full.weights, atol=1e-4, rtol=0)
    without = model(whole).logits
    assert not torch.allclose(without, full.logits, atol=1e-3)


@torch.no_grad()
def test_knock_out_and_forced_weights_equal_the_full_forward(randomise) -> None:
    model, tokens = fused(randomise), prompts(2, 4)
    for options in ({"knock_out": ["a"]}, {"weights": torch.tensor([0.25, 0.75])}):
        result = generate(model, tokens, 5, GREEDY, options=options)
        whole = torch.cat((tokens, torch.tensor(result.tokens)), dim=1)[:, :-1]
        full = model(whole, **options)
        assert full.logits[:, 3:].argmax(dim=-1).tolist() == result.tokens
        torch.testing.assert_close(torch.stack(result.weights), full.weights[:, 3:])


@pytest.mark.parametrize(
    "options", [{"banned_ids": [-1]}, {"banned_ids": [VOCAB]}, {"row_ids": [0]}], ids=str
)
def test_ids_that_mean_nothing_are_refused(model, options) -> None:
    with pytest.raises(ValueError, match=r"outside the vocabulary|row_ids must name 2 rows"):
        generate(model, [[1], [2]], 2, **options)
