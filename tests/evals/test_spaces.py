"""Closed forms: rotations, planted maps, independent noise; and the bypass of the entry adaptors."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from nano_think.evals.spaces import (
    States,
    collect_states,
    compare_spaces,
    entry_adaptors_bypassed,
    linear_cka,
    mean_cosine,
    probe,
    ridge,
    shared_spaces,
)
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.model import NanoThink

RNG = np.random.default_rng(0)
VOCAB, D = 40, 16


def rotation(d, seed=1):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


class TestCka:
    def test_rotated_scaled_and_shifted_copies_agree(self):
        x = RNG.normal(size=(200, 12)) * np.arange(1, 13)
        assert linear_cka(x, x) == pytest.approx(1)
        assert linear_cka(x, 3.0 * x @ rotation(12) + 50) == pytest.approx(1)

    def test_it_is_the_unbiased_estimate_of_whole_kernel_matrices(self):
        x, y = RNG.normal(size=(30, 5)), RNG.normal(size=(30, 7))
        y[:, :3] += x[:, :3]

        def hsic(k, m):
            n, one = len(k), np.ones(len(k))
            k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
            both = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
            return (np.trace(k @ m) + both - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))

        k, m = x @ x.T, y @ y.T
        assert linear_cka(x, y) == pytest.approx(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)))

    def test_independent_noise_is_at_zero_where_the_plain_estimate_is_not(self):
        pairs = [(RNG.normal(size=(100, 60)), RNG.normal(size=(100, 60))) for _ in range(20)]
        x, y = (some - some.mean(0) for some in pairs[0])
        plain = np.square(x.T @ y).sum() / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
        assert plain > 0.3
        assert np.mean([linear_cka(a, b) for a, b in pairs]) == pytest.approx(0, abs=0.02)

    def test_half_the_features_in_common(self):
        common = RNG.normal(size=(4000, 10))
        x, y = (np.concatenate([common, RNG.normal(size=(4000, 10))], axis=1) for _ in range(2))
        # HSIC is a sum of squared covariances: 10 of 20 on both sides
        assert linear_cka(x, y) == pytest.approx(0.5, abs=0.02)

    def test_a_space_that_does_not_vary_has_none(self):
        assert np.isnan(linear_cka(np.ones((10, 3)), RNG.normal(size=(10, 3))))


def test_cosine_sees_the_basis_that_cka_does_not():
    x = RNG.normal(size=(300, 20))
    assert mean_cosine(x, 7 * x) == pytest.approx(1)
    assert mean_cosine(x, -x) == pytest.approx(-1)
    assert abs(mean_cosine(x, x @ rotation(20))) < 0.3


def test_ridge_recovers_a_planted_map_whatever_the_scale():
    x, weights, bias = RNG.normal(size=(500, 8)), RNG.normal(size=(8, 3)), np.array([1.0, -2.0, 0.5])
    for scale in (1e-3, 1.0, 1e3):
        found, offset = ridge(scale * x, x @ weights + bias, 1e-8)
        assert scale * found == pytest.approx(weights, abs=1e-5)
        assert offset == pytest.approx(bias, abs=1e-5)
    shrunk, _ = ridge(x, x @ weights, 1.0)
    assert np.abs(shrunk).sum() < 0.7 * np.abs(weights).sum()


def states(documents=120, length=20, seed=3):
    """b is a linear map of a, c is a plus as much noise, d is noise; a shows class and domain."""
    rng = np.random.default_rng(seed)
    document = np.repeat(np.arange(documents), length)
    domain, token_class = document % 3, rng.choice([0, 2, 7], size=documents * length, p=[0.5, 0.3, 0.2])
    a = rng.normal(size=(len(document), 10))
    a[:, 0] += 8 * domain
    a[:, 1] += 12 * (token_class == 2)
    a[:, 2] += 12 * (token_class == 7)
    centred = a - a.mean(0)
    noise = rng.normal(size=a.shape) * centred.std(0)
    spaces = {"a": a, "b": a @ rng.normal(size=(10, 10)) + 1, "c": a + noise, "d": rng.normal(size=a.shape)}
    return States(spaces, {"b": 1.0}, document, domain, token_class)


class TestProbes:
    def test_planted_maps_and_answers(self):
        made = states()
        found = probe(made, made.document % 2 == 0, 1e-6, n_resamples=100)
        assert found["r2"]["a"]["b"]["estimate"] == pytest.approx(1, abs=1e-3)
        assert found["r2"]["b"]["a"]["estimate"] == pytest.approx(1, abs=1e-3)
        assert found["r2"]["a"]["c"]["estimate"] == pytest.approx(0.5, abs=0.05)
        assert (
            found["r2"]["a"]["c"]["low"] < found["r2"]["a"]["c"]["estimate"] < found["r2"]["a"]["c"]["high"]
        )
        assert found["r2"]["a"]["c"]["documents"] == 60
        for pair in (("a", "d"), ("d", "a")):
            assert found["r2"][pair[0]][pair[1]]["estimate"] == pytest.approx(0, abs=0.03)
        assert found["class_accuracy"]["a"]["estimate"] > 0.98
        assert found["class_majority"] == pytest.approx(0.5, abs=0.03)
        assert found["class_accuracy"]["d"]["estimate"] == pytest.approx(0.5, abs=0.03)
        assert found["domain_accuracy"]["d"]["estimate"] == pytest.approx(1 / 3, abs=0.05)
        # three levels on one line: a linear map finds the outer two
        assert found["domain_accuracy"]["a"]["estimate"] > 0.6

    def test_memorised_noise_explains_nothing_on_other_documents(self):
        rng = np.random.default_rng(4)
        document = np.repeat(np.arange(20), 6)
        spaces = {"x": rng.normal(size=(120, 50)), "y": rng.normal(size=(120, 50))}
        made = States(spaces, {}, document, document % 2, document % 3)
        weights, bias = ridge(spaces["x"][:60], spaces["y"][:60], 1e-6)
        error = np.square(spaces["x"][:60] @ weights + bias - spaces["y"][:60]).sum()
        assert error < 0.5 * np.square(spaces["y"][:60]).sum()
        assert probe(made, document < 10, 1e-6, n_resamples=10)["r2"]["x"]["y"]["estimate"] < 0

    def test_both_halves_hold_whole_documents_of_every_domain(self):
        made = states(documents=9)
        found = compare_spaces(made, 1e-3, n_resamples=20, seed=0)
        assert found["r2"]["a"]["b"]["documents"] == 4
        assert found["cka"]["a"]["a"] == pytest.approx(1)
        assert abs(found["cka_shuffled"]["a"]["a"]) < 0.1
        assert found["cka"]["a"]["d"] == pytest.approx(found["cka"]["d"]["a"])
        lone = States({"a": np.ones((3, 2))}, {}, np.zeros(3, int), np.zeros(3, int), np.zeros(3, int))
        with pytest.raises(ValueError, match="give two"):
            compare_spaces(lone, 1e-3, n_resamples=5, seed=0)


def mixture(adaptor: bool) -> NanoThink:
    experts = {
        "transformer": partial(TransformerExpert, num_layers=1, num_heads=2, ffn_dim=20, adaptor=adaptor),
        "state_space": partial(StateSpaceExpert, num_layers=1, d_inner=16, d_state=4, adaptor=adaptor),
    }
    return NanoThink(experts, VOCAB, D).eval()


@pytest.fixture
def model(randomise) -> NanoThink:
    return randomise(mixture(adaptor=True))


def make_batches():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (6, 20), generator=generator)
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = -100
    uid = torch.arange(6).unsqueeze(1).expand(-1, 20)
    rest = {"positions": torch.arange(20).expand(6, -1), "segments": torch.zeros(6, 20, dtype=torch.long)}
    whole = {"tokens": tokens, "labels": labels, "doc_uid": uid, "domain": torch.arange(6) % 2, **rest}
    return [{name: value[part] for name, value in whole.items()} for part in (slice(0, 3), slice(3, 6))]


class TestModel:
    def test_the_bypass_is_an_identity_adaptor_and_leaves_no_trace(self, model):
        batches, classes = make_batches(), np.arange(VOCAB) % 5
        before = collect_states(model, batches, classes)
        twin = copy.deepcopy(model)
        for expert in twin.experts.values():
            nn.init.eye_(expert.entry.adaptor.weight)
        with entry_adaptors_bypassed(model):
            bypassed = collect_states(model, batches, classes)
        expected = collect_states(twin, batches, classes)
        for name in model.expert_names:
            assert np.allclose(bypassed.spaces[name], expected.spaces[name], atol=1e-5)
            assert not np.allclose(bypassed.spaces[name], before.spaces[name], atol=1e-2)
            assert np.array_equal(collect_states(model, batches, classes).spaces[name], before.spaces[name])
        with pytest.raises(RuntimeError, match="inside"), entry_adaptors_bypassed(model):
            raise RuntimeError("inside")
        assert all(isinstance(expert.entry.adaptor, nn.Linear) for expert in model.experts.values())

    def test_states_are_those_of_the_scored_tokens(self, model):
        batches, classes = make_batches(), np.arange(VOCAB) % 5
        made = collect_states(model, batches, classes)
        scored = torch.cat([b["labels"] for b in batches]) >= 0
        tokens = torch.cat([b["tokens"] for b in batches])
        labels = torch.cat([b["labels"] for b in batches])[scored]
        assert np.array_equal(made.spaces["input"], model.embedding(tokens)[scored].detach().numpy())
        with torch.no_grad():
            output = model(tokens)
            hidden = output.expert_hidden["state_space"]
            nll = model.token_nll(
                tokens, torch.cat([b["labels"] for b in batches]), weights=torch.tensor([0.0, 1.0])
            )
        assert np.allclose(made.spaces["state_space"], hidden[scored].numpy(), atol=1e-5)
        assert made.loss["state_space"] == pytest.approx(float(nll[scored].mean()), abs=1e-4)
        assert (made.token_class == labels.numpy() % 5).all()
        assert (made.document == torch.cat([b["doc_uid"] for b in batches])[scored].numpy()).all()
        with pytest.raises(ValueError, match="no scored token"):
            collect_states(model, [], classes)

    def test_the_whole_is_plain_and_names_both_settings(self, model):
        found = shared_spaces(model, make_batches(), np.arange(VOCAB) % 5, ["one", "two"], n_resamples=20)
        json.dumps(found, allow_nan=False)
        assert found["spaces"] == ["input", "transformer", "state_space"]
        assert found["documents"] == 6
        assert found["adaptor_distance"]["transformer"] > 0.5
        off, on = found["without_adaptors"], found["with_adaptors"]
        assert off["cka"]["input"]["input"] == on["cka"]["input"]["input"] == pytest.approx(1)
        assert off["loss"] != on["loss"]

    def test_a_model_built_without_adaptors_is_the_same_with_its_adaptors_bypassed(self, model):
        bare, arguments = mixture(adaptor=False), (make_batches(), np.arange(VOCAB) % 5, ["one", "two"])
        kept = {name: value for name, value in model.state_dict().items() if "adaptor" not in name}
        bare.load_state_dict(kept)
        expected, found = (shared_spaces(one, *arguments, n_resamples=20) for one in (model, bare))
        assert found["adaptor_distance"] == {}
        assert "with_adaptors" not in found
        assert found["without_adaptors"] == expected["without_adaptors"]
