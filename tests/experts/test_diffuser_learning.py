from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nano_think.experts.diffuser import DiffuserExpert
from nano_think.ops.diffusion import sample_timesteps

D = 32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(**options: object) -> DiffuserExpert:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiffuserExpert(
            d_model=D, num_layers=2, num_heads=2, ffn_dim=48, max_positions=64, dropout=0.0, **options
        )


class Toy:
    """A language in which each token has one successor; targets are the successor's vector plus noise.

    The noise is private to each target, so the context explains a share 1 / (1 + spread^2) of the variance:
    pure noise cannot be denoised better than that, little noise can.
    """

    def __init__(self, spread: float = 0.5) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.table = normal(16, D, seed=1)
        self.successor = torch.randperm(16, generator=self.generator)
        self.spread = spread

    def batch(self, rows: int = 16, length: int = 12) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, 16, (rows, length), generator=self.generator)
        private = torch.randn(rows, length, D, generator=self.generator)
        return self.table[tokens], self.table[self.successor[tokens]] + self.spread * private

    def train(self, expert: DiffuserExpert, steps: int) -> DiffuserExpert:
        expert.fit_statistics(self.batch(200)[1])
        optimizer = torch.optim.AdamW(expert.parameters(), lr=3e-3, weight_decay=0.0)
        warmup_and_decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(steps):
            c, hidden = self.batch()
            x0 = expert.standardise(hidden)
            tau = sample_timesteps(x0.shape[:2], expert.schedule.train_T, self.generator)
            eps = torch.randn(x0.shape, generator=self.generator)
            estimate = expert.denoise(expert.schedule.add_noise(x0, eps, tau), tau, c)
            optimizer.zero_grad()
            expert.track_variance(estimate, x0, tau, torch.ones_like(tau, dtype=torch.bool))
            (estimate - x0).square().mean().backward()
            optimizer.step()
            warmup_and_decay.step()
        return expert

    @torch.no_grad()
    def errors(self, expert: DiffuserExpert, levels: list[int]) -> list[float]:
        """Squared error of x0 per feature; predicting the mean has 1."""
        c, hidden = self.batch(200)
        x0 = expert.standardise(hidden)
        eps = torch.randn(x0.shape, generator=self.generator)
        return [
            (expert.denoise(expert.schedule.add_noise(x0, eps, tau), tau, c) - x0).square().mean().item()
            for tau in levels
        ]


class TestLearning:
    @pytest.fixture(scope="class")
    def toy(self) -> Toy:
        return Toy()

    @pytest.fixture(scope="class")
    def trained(self, toy: Toy) -> DiffuserExpert:
        return toy.train(small(), steps=400)

    def test_beats_the_mean_at_pure_noise_and_improves_with_signal(
        self, toy: Toy, trained: DiffuserExpert
    ) -> None:
        errors = toy.errors(trained, [100, 80, 60, 40, 20, 5])
        assert errors[0] < 0.7
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < errors[0] / 2

    def test_beats_handing_back_its_input(self, toy: Toy, trained: DiffuserExpert) -> None:
        abar = trained.schedule.abar
        # x_tau itself as the estimate errs by (1 - a)^2 + g^2
        identity = [((1 - abar[t].sqrt()) ** 2 + 1 - abar[t]).item() for t in (100, 60, 30)]
        for error, baseline in zip(toy.errors(trained, [100, 60, 30]), identity, strict=True):
            assert error < baseline

    def test_sampler_finds_the_predictable_part(self, toy: Toy, trained: DiffuserExpert) -> None:
        c, hidden = toy.batch(50)
        with torch.no_grad():
            outputs = trained(c)
        assert (outputs - hidden).square().mean() < 0.7 * (hidden - trained.target_mean).square().mean()

    def test_draft_follows_the_chain(self, toy: Toy, trained: DiffuserExpert) -> None:
        calls: list[int] = []
        hook = trained.denoiser.register_forward_hook(lambda *_: calls.append(1))
        first = torch.arange(16)
        drafts = [
            trained.draft(
                toy.table[first].unsqueeze(1), toy.table, 6, torch.Generator().manual_seed(seed), steps=10
            )
            for seed in (1, 1)
        ]
        hook.remove()
        assert len(calls) == 20
        assert torch.equal(drafts[0], drafts[1])
        expected, token = [], first
        for _ in range(6):
            token = toy.successor[token]
            expected.append(token)
        accuracy = (drafts[0] == torch.stack(expected, dim=1)).float().mean()
        assert accuracy > 0.9
        blind = trained.draft(
            toy.table[first].unsqueeze(1), toy.table, 6, torch.Generator().manual_seed(1), steps=1
        )
        # one step reads zero vectors as context: only the first token can be right on purpose
        assert (blind[:, 0] == expected[0]).float().mean() > 0.9
        assert (blind[:, 1:] == torch.stack(expected[1:], dim=1)).float().mean() < 0.5

    @pytest.mark.slow
    @pytest.mark.parametrize("param", ["x0", "v", "eps"])
    def test_other_parametrisations_learn(self, param: str) -> None:
        toy = Toy()
        errors = toy.errors(toy.train(small(param=param), 400), [100, 60, 40, 20, 5])
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < (errors[0] / 2 if param == "x0" else 0.1)
        # an eps network cannot start from noise: its loss gives that level no weight
        assert errors[0] > 1 if param == "eps" else errors[0] < 0.7
