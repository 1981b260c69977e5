"""Models that are not ours, audited with a few lines of user code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nano_think.evals.audit.run import audit

transformers = pytest.importorskip("transformers")
VOCAB, D = 64, 32
TABLE = torch.randn(VOCAB, D, generator=torch.Generator().manual_seed(0))


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **options,
    )
    return transformers.LlamaForCausalLM(config)


def running_mean(tokens: Tensor) -> Tensor:
    """A language model of nothing but torch: the mean of the embeddings so far against the table."""
    count = torch.arange(1, tokens.shape[1] + 1).unsqueeze(-1)
    return (TABLE[tokens].cumsum(1) / count) @ TABLE.T


class Recurrent(nn.Module):
    """An LSTM that answers with a dictionary and a state that has no positions."""

    def __init__(self, both_ways: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, D)
        self.lstm = nn.LSTM(D, D // (1 + both_ways), batch_first=True, bidirectional=both_ways)
        self.head = nn.Linear(D, VOCAB)

    def forward(self, tokens: Tensor) -> dict[str, object]:
        hidden, state = self.lstm(self.table(tokens))
        return {"logits": self.head(hidden), "hidden": hidden, "state": state, "loss": None}


class TestHuggingFace:
    def test_a_causal_model_passes(self):
        found = audit(llama())
        assert found.passed, str(found)
        verdicts = {finding.check: finding.verdict for finding in found.findings}
        for check in ("A1", "A2", "A3", "A5", "A10"):
            assert verdicts[check] == "pass"
        for check in ("A4", "A6", "A7"):
            assert verdicts[check] == "not applicable"

    def test_without_its_causal_mask_it_fails_with_position_and_component(self):
        model = llama()
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        found = audit(model, VOCAB)
        assert not found.passed
        for check in ("A1", "A2", "A3"):
            assert found[check].verdict == "fail"
            assert found[check].component == "model.layers.0.self_attn"
        # token 1 is the first that the audit changes, and token 0 sees it
        assert found["A1"].position == 0
        assert "after token 1 was changed" in found["A1"].note

    def test_a_mask_removed_in_the_second_layer_is_found_there(self):
        model = llama()
        model.model.layers[1].self_attn.is_causal = False
        assert audit(model, checks=("A1",))["A1"].component == "model.layers.1.self_attn"

    def test_a_mask_that_is_never_made_is_found(self, monkeypatch):
        from transformers.models.llama import modeling_llama

        model = llama(attn_implementation="eager")
        assert audit(model, checks=("A1",)).passed
        monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **_: None)
        finding = audit(model, checks=("A1",))["A1"]
        assert (finding.verdict, finding.component) == ("fail", "model.layers.0.self_attn")


class TestFunctions:
    def test_a_function_from_tokens_to_logits_passes(self):
        found = audit(running_mean, VOCAB, name="running mean")
        assert found.passed, str(found)
        assert "running mean" in str(found)
        assert found["A1"].verdict == found["A3"].verdict == "pass"
        assert found["A2"].verdict == found["A4"].verdict == "not applicable"

    def test_the_mean_of_the_whole_row_fails(self):
        def mean(tokens: Tensor) -> Tensor:
            return TABLE[tokens].mean(1, keepdim=True).expand(-1, tokens.shape[1], -1) @ TABLE.T

        found = audit(mean, VOCAB)
        assert [found[check].verdict for check in ("A1", "A3")] == ["fail", "fail"]
        assert found["A1"].position == 0
        assert found["A1"].component == "model"

    def test_a_model_that_ignores_its_input_is_a_test_of_nothing(self):
        found = audit(lambda tokens: TABLE[: tokens.shape[1]].expand(len(tokens), -1, -1), VOCAB)
        assert not found.passed
        assert found["A1"].verdict == "vacuous"
        assert "logits" in found["A1"].note

    def test_without_a_way_from_token_to_token_there_is_nothing_to_test(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB))
        found = audit(model, VOCAB, checks=("A1", "A2"))
        assert [finding.verdict for finding in found.findings] == ["vacuous", "vacuous"]


class TestAnswers:
    @pytest.fixture
    def recurrent(self):
        torch.manual_seed(0)
        return Recurrent()

    def test_a_dictionary_with_logits_passes(self, recurrent):
        found = audit(recurrent, VOCAB)
        assert found.passed, str(found)
        assert found["A2"].verdict == "pass"

    def test_whatever_else_it_says_about_a_token_is_audited_too(self, recurrent):
        def answers(tokens: Tensor) -> dict[str, Tensor]:
            said = recurrent(tokens)
            return {**said, "next": said["hidden"].roll(-1, dims=1)}

        found = audit(answers, VOCAB, checks=("A1",))["A1"]
        assert (found.verdict, found.component) == ("fail", "next")

    def test_a_constant_among_the_answers_is_no_alarm(self, recurrent):
        def answers(tokens: Tensor) -> SimpleNamespace | dict[str, Tensor]:
            return {**recurrent(tokens), "kept": torch.ones(tokens.shape)}

        assert audit(answers, VOCAB, checks=("A1", "A3")).passed

    def test_tokens_that_are_forbidden_with_minus_infinity_are_no_alarm(self):
        forbidden = torch.arange(VOCAB) == 3

        def answers(tokens: Tensor) -> Tensor:
            return running_mean(tokens).masked_fill(forbidden, -torch.inf)

        assert audit(answers, VOCAB, checks=("A1", "A3", "A5", "A10")).passed

    def test_a_recurrence_in_both_directions_fails(self):
        torch.manual_seed(0)
        finding = audit(Recurrent(both_ways=True), VOCAB, checks=("A1",))["A1"]
        assert (finding.verdict, finding.component) == ("fail", "lstm")

    def test_no_logits_are_an_error_that_says_so(self):
        with pytest.raises(TypeError, match="neither logits nor has them"):
            audit(lambda tokens: {"scores": running_mean(tokens)}, VOCAB)

    def test_a_model_of_unknown_vocabulary_is_an_error_that_says_so(self):
        with pytest.raises(ValueError, match="vocab_size"):
            audit(running_mean)

    def test_the_model_is_left_as_it_was(self, recurrent):
        before = {name: value.clone() for name, value in recurrent.state_dict().items()}
        recurrent.train()
        generator = torch.get_rng_state()
        audit(recurrent, VOCAB)
        assert recurrent.training
        assert all(parameter.requires_grad for parameter in recurrent.parameters())
        assert all(torch.equal(before[name], value) for name, value in recurrent.state_dict().items())
        assert torch.equal(generator, torch.get_rng_state())
