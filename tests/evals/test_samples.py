"""Prompts that begin documents, and the same prompts and seeds for every model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from nano_think.engine.generate import Generation, generate
from nano_think.engine.sampling import SamplingConfig
from nano_think.evals.samples import PROMPT_TOKENS, diffusion_drafts, prompts_of, sample_sheet
from nano_think.experts.diffuser import DiffuserExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.model import ExpertLM, NanoThink

D, VOCAB, BOS = 16, 259, 256


def row(*fragments: list[int], length: int = 64) -> tuple[list[int], list[int]]:
    """Tokens and segments of a packed row, padded with token 258."""
    tokens = [token for fragment in fragments for token in fragment]
    segments = [i for i, fragment in enumerate(fragments) for _ in fragment]
    pads = length - len(tokens)
    return tokens + [258] * pads, segments + [-1] * pads


def batch_of(domains: list[int], *rows: tuple[list[int], list[int]]) -> dict[str, Tensor]:
    tokens, segments = (torch.tensor(column) for column in zip(*rows, strict=True))
    return {"tokens": tokens, "segments": segments, "domain": torch.tensor(domains)}


def document(first: int, length: int = 30) -> list[int]:
    return [BOS, *range(first, first + length - 1)]


class TestPrompts:
    def test_beginnings_of_documents_come_before_rows_inside_one(self):
        inside = list(range(100, 125))
        batches = [
            batch_of([0, 1], row(inside, document(1)), row(inside)),
            batch_of([0], row(document(40))),
        ]
        found = prompts_of(batches, ["one", "two"], 2, BOS)
        begins = [document(1)[:PROMPT_TOKENS], document(40)[:PROMPT_TOKENS]]
        assert found == [("one", begins[0]), ("one", begins[1]), ("two", inside[:PROMPT_TOKENS])]
        assert prompts_of(batches, ["one", "two"], 1, BOS) == [found[0], found[2]]
        assert prompts_of(batches, ["one", "two"], 3, BOS)[2] == ("one", inside[:PROMPT_TOKENS])

    def test_fragments_shorter_than_a_prompt_and_pads_are_passed_over(self):
        short = document(1, length=PROMPT_TOKENS - 1)
        whole = document(50, length=PROMPT_TOKENS)
        assert prompts_of([batch_of([0], row(short, whole))], ["one"], 2, BOS) == [("one", whole)]
        assert prompts_of([batch_of([0], row(short))], ["one"], 2, BOS) == []
        empty = batch_of([0], ([258] * 64, [-1] * 64))
        assert prompts_of([empty], ["one"], 1, BOS) == []


@pytest.fixture
def models(randomise) -> dict[str, ExpertLM | NanoThink]:
    expert = partial(TransformerExpert, num_layers=1, num_heads=2, ffn_dim=20)
    fused = NanoThink({"a": expert, "b": expert}, VOCAB, D)
    lone = ExpertLM((VOCAB, D), expert)
    return {"fused": randomise(fused).eval(), "a": randomise(lone).eval()}


def test_every_model_continues_every_prompt_with_the_same_draws(models, byte_tokenizer):
    prompts = [("one", [BOS, *b"hello"]), ("two", [BOS, *b"x, [y]"])]
    config = SamplingConfig(temperature=0.8, top_k=50, seed=7)
    sheet = sample_sheet(models, prompts, byte_tokenizer, 12, config)
    assert [(s.domain, s.model, s.prompt) for s in sheet] == [
        (domain, name, text)
        for domain, text in (("one", "hello"), ("two", "x, [y]"))
        for name in ("fused", "a")
    ]
    assert {sample.seed for sample in sheet} == {7}
    assert sheet == sample_sheet(models, prompts, byte_tokenizer, 12, config)
    for sample, (_, prompt) in zip(sheet[::2], prompts, strict=True):
        banned = (byte_tokenizer.bos_id, byte_tokenizer.pad_id)
        made = generate(
            models["fused"], [prompt], 12, config, eos_id=byte_tokenizer.eos_id, banned_ids=banned
        )
        assert sample.text == byte_tokenizer.decode(made.tokens[0])
        lead = [float(weights[0] > weights[1]) for weights in made.weights[0]]
        assert sample.trusted["a"] == pytest.approx(sum(lead) / len(lead))
        assert sum(sample.trusted.values()) == pytest.approx(1)
    assert all(sample.trusted == {} for sample in sheet[1::2])


def test_a_model_with_memory_gets_a_fresh_reader_for_each_prompt(models, byte_tokenizer, monkeypatch):
    given: list[object] = []
    module = "nano_think.evals.samples.generate"
    monkeypatch.setattr(module, lambda *_, memory, **__: given.append(memory) or Generation([[1]], [[0.0]]))
    prompts, config = [("one", [BOS, 1]), ("one", [BOS, 2])], SamplingConfig()
    sample_sheet(models, prompts, byte_tokenizer, 1, config, {"fused": object})
    assert [type(memory) for memory in given] == [object, type(None)] * 2
    assert given[0] is not given[2]


def test_drafts_are_the_diffusers_own_and_repeatable(randomise, byte_tokenizer):
    expert = partial(DiffuserExpert, num_layers=1, num_heads=2, ffn_dim=20, train_T=20, ddim_steps=3)
    model = randomise(ExpertLM((VOCAB, D), expert)).eval()
    model.expert.fit_statistics(torch.randn(20, D, generator=torch.Generator().manual_seed(1)))
    prompt = [BOS, *b"hello"]
    (draft,) = diffusion_drafts(model, [("one", prompt)], byte_tokenizer, 9, seed=3)
    assert (draft.model, draft.domain, draft.prompt) == ("diffuser, full-sequence DDIM", "one", "hello")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        vectors = model.embedding(torch.tensor([prompt]))
        drafted = model.expert.draft(vectors, model.embedding.weight, 9, generator)[0]
    assert draft.text == byte_tokenizer.decode(drafted.tolist())
    assert draft.trusted == {}
    assert diffusion_drafts(model, [("one", prompt)], byte_tokenizer, 9, seed=3) == [draft]
    assert diffusion_drafts(model, [("one", prompt)], byte_tokenizer, 9, seed=4) != [draft]
