"""A planted denoiser whose errors are known in closed form; steps, KL and times of a real one."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nano_think.evals.denoiser import (
    Stopwatch,
    decode_seconds,
    denoising_errors,
    restoration,
    steps_curve,
    token_kl,
)
from nano_think.experts.diffuser import DiffuserExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.model import ExpertLM
from nano_think.ops.diffusion import NoiseSchedule
from nano_think.ops.layout import Layout

VOCAB, D, OPEN = 30, 16, 0.3


def make_batches(count=2, rows=8, length=40, vocab=VOCAB):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(count):
        tokens = torch.randint(0, vocab, (rows, length), generator=generator)
        labels = tokens.roll(-1, dims=1)
        labels[:, -1] = -100
        batches.append({
            "tokens": tokens,
            "labels": labels,
            "positions": torch.arange(length).expand(rows, -1).contiguous(),
            "segments": torch.zeros_like(tokens),
            "doc_uid": (number * rows + torch.arange(rows)).unsqueeze(1).expand(-1, length),
        })  # fmt: skip
    return batches


class Planted(nn.Module):
    """x0 = the embedding of the token plus normal noise of variance OPEN: the exact posterior is known."""

    d_model = D

    def __init__(self):
        super().__init__()
        self.schedule = NoiseSchedule()

    def standardise(self, x):
        return x

    def readout(self, x):
        return x

    def clean_stream(self, c, layout):
        return []

    def denoise(self, x_tau, tau, c, layout, kv):
        a, _ = self.schedule.levels(tau, x_tau)
        return c + self.schedule.gain(torch.full((D,), OPEN), tau, x_tau) * (x_tau - a * c)


@pytest.fixture(scope="module")
def planted():
    """Latents of variance 1: a table of variance 1 - OPEN and the rest."""
    network = ExpertLM((VOCAB, D), Planted())
    with torch.no_grad():
        table = torch.randn(VOCAB, D, generator=torch.Generator().manual_seed(1))
        table = (table - table.mean(0)) / table.std(0, correction=0) * (1 - OPEN) ** 0.5
        network.embedding.weight.copy_(table)

    def targets(batch):
        generator = torch.Generator().manual_seed(int(batch["tokens"].sum()))
        noise = torch.randn(*batch["tokens"].shape, D, generator=generator)
        return table[batch["tokens"]] + OPEN**0.5 * noise, batch["labels"] >= 0

    return network, targets


def test_restoration_of_planted_latents_has_the_errors_of_the_formulas(planted):
    network, targets = planted
    found = restoration(network, targets, make_batches(rows=60), levels=(20, 60, 90, 100))
    json.dumps(found, allow_nan=False)
    assert found["tokens"] == 2 * 60 * 39
    for row in found["levels"]:
        signal = row["signal_power"]
        noise = 1 - signal
        assert signal == pytest.approx(float(NoiseSchedule().abar[row["tau"]]))
        exact = OPEN * noise / (signal * OPEN + noise)
        assert row["error"]["context_only"] == pytest.approx(OPEN, rel=0.05)
        assert row["error"]["shrinkage"] == pytest.approx(noise, rel=0.05)
        assert row["error"]["network"] == pytest.approx(exact, rel=0.05)
        assert row["error"]["combined"] == pytest.approx(exact, rel=0.05)
    clear, _, _, pure = found["levels"]
    assert clear["agreement"]["network"] > 0.9
    assert pure["agreement"]["shrinkage"] < 0.2  # nothing but the most frequent answer
    assert pure["error"]["network"] == pytest.approx(pure["error"]["context_only"])
    buckets = found["buckets"]
    assert buckets["levels"][0] == [1, 10]
    assert buckets["levels"][-1] == [91, 100]
    assert buckets["relative_error"] == sorted(buckets["relative_error"])


def test_errors_by_level_are_fixed_by_the_batch_number(planted):
    network, targets = planted
    error, pure = denoising_errors(network, targets, make_batches(rows=20))
    assert float(pure.compute()["mse_relative"]) == pytest.approx(OPEN, rel=0.06)
    again, _ = denoising_errors(network, targets, make_batches(rows=20))
    assert again.compute() == error.compute()


def test_kl_by_hand():
    table = torch.eye(3)
    p, q = (
        torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]),
        torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]),
    )
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert token_kl(p.log(), table, q.log(), table).tolist() == pytest.approx([expected, 0], abs=1e-6)
    assert token_kl(p.log() + 7, table, q.log(), table)[0] == pytest.approx(expected, abs=1e-6)


def test_kl_in_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    p, q, table = (torch.randn(*shape, generator=generator) for shape in ((9, 4), (9, 4), (11, 4)))
    whole = token_kl(p, table, q, table)
    monkeypatch.setattr("nano_think.evals.denoiser._PIECE", 22)
    assert torch.allclose(token_kl(p, table, q, table), whole, atol=1e-6)
    expected = F.kl_div(
        (q @ table.T).log_softmax(-1), (p @ table.T).log_softmax(-1), log_target=True, reduction="none"
    )
    assert torch.allclose(whole, expected.sum(-1), atol=1e-6)


@pytest.fixture(scope="module")
def pair(randomise):
    teacher = ExpertLM((VOCAB, D), partial(TransformerExpert, num_layers=1, num_heads=2, ffn_dim=20))
    randomise(teacher).eval()
    expert = partial(DiffuserExpert, num_layers=2, num_heads=2, ffn_dim=20, train_T=20, max_positions=64)
    network = randomise(ExpertLM((VOCAB, D), expert), seed=1).eval()
    network.expert.fit_statistics(torch.randn(50, D, generator=torch.Generator().manual_seed(2)))
    return network, teacher


def test_curve_of_steps_equals_separate_passes(pair):
    network, teacher = pair
    batches, passes = make_batches(rows=3, length=12), []
    handle = network.expert.denoiser.register_forward_hook(lambda *_: passes.append(1))
    found = steps_curve(network, teacher, batches, (1, 4), decode_tokens=2, n_resamples=50)
    handle.remove()
    json.dumps(found, allow_nan=False)
    # a batch each: K noisy passes; decoding: K a token, after the prompt
    assert len(passes) == 2 * (1 + 4) + 3 * (1 + 4)
    assert found["tokens"] == 2 * 3 * 11
    assert found["documents"] == 6
    with torch.no_grad():
        for row in found["curve"]:
            own, theirs, kl = [], [], []
            for batch in batches:
                layout = Layout(batch["positions"], batch["segments"])
                hidden = network.expert(network.embedding(batch["tokens"]), layout, steps=row["steps"])
                q = F.linear(hidden, network.embedding.weight)[:, :-1].log_softmax(-1)
                p = teacher(batch["tokens"], layout).logits[:, :-1].log_softmax(-1)
                label = batch["labels"][:, :-1, None]
                own.append(-q.gather(-1, label).mean())
                theirs.append(-p.gather(-1, label).mean())
                kl.append((p.exp() * (p - q)).sum(-1).mean())
            own, theirs, kl = (float(torch.stack(some).mean()) for some in (own, theirs, kl))
            assert row["loss"]["estimate"] == pytest.approx(own, abs=1e-4)
            assert row["gap"]["estimate"] == pytest.approx(own - theirs, abs=1e-4)
            assert row["kl"] == pytest.approx(kl, abs=1e-4)
            assert row["helps"] == (own - theirs < kl)
    one, four = found["curve"]
    assert one["minus_one_step"]["estimate"] == 0
    assert four["minus_one_step"]["estimate"] == pytest.approx(
        four["loss"]["estimate"] - one["loss"]["estimate"]
    )
    assert four["network_passes"] == 5
    assert min(one["seconds_per_token"], one["decode_seconds_per_token"]) > 0


def test_more_steps_take_longer(pair):
    network, teacher = pair
    found = decode_seconds(network, teacher, make_batches(1, rows=1)[0], (1, 20), 5)
    assert found[20][1] > 3 * found[1][1]
    assert min(found["teacher"]) > 0


def test_stopwatch_adds_up():
    ticks = iter([1.0, 3.0, 10.0, 11.5])
    watch = Stopwatch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "nano_think.evals.denoiser.time",
            SimpleNamespace(perf_counter=lambda: next(ticks), process_time=lambda: 0.0),
        )
        for _ in range(2):
            with watch.running():
                pass
    assert watch.seconds == 3.5
    assert watch.cpu_seconds == 0
