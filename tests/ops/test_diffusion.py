from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from nano_think.ops.diffusion import (
    NoiseSchedule,
    ddim_sample,
    ddim_timesteps,
    noise_table,
    sample_timesteps,
)

KINDS = ["cosine", "linear", "sqrt"]
PARAMS = ["x0", "eps", "v"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def linear_abar(betas: list[float]) -> list[float]:
    """abar of DDPM betas, its square root moved to end at 0, in plain floats."""
    product, roots = 1.0, []
    for beta in betas:
        product *= 1 - beta
        roots.append(math.sqrt(product))
    first, last = roots[0], roots[-1]
    return [1.0] + [((root - last) * first / (first - last)) ** 2 for root in roots]


def ddpm_betas(train_T: int) -> list[float]:
    return [(1e-4 + (2e-2 - 1e-4) * i / (train_T - 1)) * 1000 / train_T for i in range(train_T)]


class TestGain:
    @pytest.mark.parametrize("scale", [1.0, 0.25])
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_reaches_the_least_possible_error(self, kind: str, scale: float) -> None:
        """Against the regression of x0 on x_tau over 200,000 draws, and the closed form of its error."""
        schedule, variance = NoiseSchedule(kind, input_scale=scale), torch.tensor([0.1, 2.0]).double()
        mean = torch.tensor([3.0, -1.0]).double()
        x0 = mean + variance.sqrt() * normal(200_000, 2)
        for tau in (1, 30, 70, 100):
            x = schedule.add_noise(x0, normal(200_000, 2, seed=1), tau)
            a, g = schedule.levels(tau, x0)
            deviation = x - a * scale * mean
            slope = (deviation * (x0 - mean)).mean(0) / deviation.square().mean(0)
            gain = schedule.gain(variance, tau, x)
            # the regression's own standard error: residual deviation over that of the regressor
            least = variance * g**2 / ((a * scale) ** 2 * variance + g**2)
            error = (least / ((a * scale) ** 2 * variance + g**2) / 200_000).sqrt()
            assert ((gain - slope).abs() < 5 * error + 1e-12).all()
            reached = (mean + gain * deviation - x0).square().mean(0)
            torch.testing.assert_close(reached, least.flatten(), rtol=0.02, atol=0)

    def test_pure_noise_says_nothing(self) -> None:
        schedule = NoiseSchedule()
        assert torch.equal(schedule.gain(torch.ones(3), 100, torch.zeros(1, 1, 3)), torch.zeros(1, 1, 3))


class TestSchedule:
    def test_cosine_closed_form(self) -> None:
        f = [math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(100)]
        expected = torch.tensor([value / f[0] for value in f] + [0.0], dtype=torch.float64)
        torch.testing.assert_close(NoiseSchedule("cosine").abar, expected, atol=1e-12, rtol=0)

    def test_linear_closed_form(self) -> None:
        expected = torch.tensor(linear_abar(ddpm_betas(100)), dtype=torch.float64)
        torch.testing.assert_close(NoiseSchedule("linear").abar, expected, atol=1e-12, rtol=0)

    def test_linear_with_swapped_betas_is_another_schedule(self) -> None:
        swapped = torch.tensor(linear_abar(ddpm_betas(100)[::-1]), dtype=torch.float64)
        assert (NoiseSchedule("linear").abar - swapped).abs().max() > 0.1

    def test_sqrt_closed_form(self) -> None:
        expected = [1.0] + [1 - math.sqrt(t / 100 + 1e-4) for t in range(1, 100)] + [0.0]
        torch.testing.assert_close(
            NoiseSchedule("sqrt").abar, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0
        )

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("train_T", [25, 100, 1000])
    @pytest.mark.parametrize("terminal", [0.0, 1e-4])
    def test_falls_from_one_to_terminal(self, kind: str, train_T: int, terminal: float) -> None:
        abar = NoiseSchedule(kind, train_T, terminal).abar
        assert abar.shape == (train_T + 1,)
        assert abar[0] == 1
        assert abar[-1] == terminal
        steps = abar.diff()
        assert (steps <= 0).all()
        if train_T == 100:
            assert (steps < 0).all()

    def test_snr_is_signal_over_noise_power(self) -> None:
        schedule = NoiseSchedule("cosine", input_scale=0.5)
        x0, eps = normal(200_000, seed=1), normal(200_000, seed=2)
        for tau in (10, 50, 90):
            zero = torch.zeros_like(x0)
            signal, noise = schedule.add_noise(x0, zero, tau), schedule.add_noise(zero, eps, tau)
            assert (signal.var() / noise.var()).item() == pytest.approx(schedule.snr()[tau].item(), rel=0.02)
        assert schedule.snr()[0] == math.inf
        assert schedule.snr()[-1] == 0

    def test_unusable_schedules_are_refused(self) -> None:
        with pytest.raises(ValueError, match="train_T above 20"):
            NoiseSchedule("linear", train_T=20)
        with pytest.raises(ValueError, match="'cosine', 'linear' or 'sqrt'"):
            NoiseSchedule("quadratic")


class TestForwardProcess:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tau", [1, 50, 99, 100])
    def test_mean_and_variance(self, kind: str, tau: int) -> None:
        schedule = NoiseSchedule(kind, input_scale=0.7)
        x0 = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
        samples = schedule.add_noise(x0.expand(100_000, 3), normal(100_000, 3), tau)
        a = math.sqrt(schedule.abar[tau])
        torch.testing.assert_close(samples.mean(0), a * 0.7 * x0, atol=0.02, rtol=0)
        torch.testing.assert_close(samples.var(0), (1 - schedule.abar[tau]).expand(3), atol=0.02, rtol=0)

    def test_levels_by_row_and_by_position_agree_with_single_levels(self) -> None:
        schedule, x0, eps = NoiseSchedule(), normal(3, 4, 5), normal(3, 4, 5, seed=1)
        by_position = torch.randint(0, 101, (3, 4), generator=seeded())
        noisy = schedule.add_noise(x0, eps, by_position)
        by_row = schedule.add_noise(x0, eps, by_position[:, 0])
        for b in range(3):
            assert torch.equal(by_row[b], schedule.add_noise(x0[b], eps[b], int(by_position[b, 0])))
            for t in range(4):
                expected = schedule.add_noise(x0[b, t], eps[b, t], int(by_position[b, t]))
                assert torch.equal(noisy[b, t], expected)

    def test_first_use_in_inference_mode_leaves_training_possible(self) -> None:
        schedule = NoiseSchedule()
        with torch.inference_mode():
            schedule.add_noise(torch.ones(1, 2, 3), torch.ones(1, 2, 3), 5)
        prediction = torch.ones(1, 2, 3, requires_grad=True)
        schedule.to_x0(prediction, torch.ones(1, 2, 3), 5, "v").sum().backward()
        assert prediction.grad is not None


class TestParametrisations:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("scale", [1.0, 0.25])
    @pytest.mark.parametrize("param", PARAMS)
    def test_round_trip(self, kind: str, scale: float, param: str) -> None:
        schedule = NoiseSchedule(kind, terminal=1e-4 if param == "eps" else 0.0, input_scale=scale)
        tau = torch.arange(1, 101)
        x0, eps = normal(100, 2, 8), normal(100, 2, 8, seed=1)
        x = schedule.add_noise(x0, eps, tau)
        prediction = schedule.from_x0(x0, x, tau, param)
        torch.testing.assert_close(schedule.to_x0(prediction, x, tau, param), x0, atol=1e-9, rtol=0)

    @pytest.mark.parametrize("scale", [1.0, 0.25])
    def test_predictions_are_what_they_are_called(self, scale: float) -> None:
        schedule, tau = NoiseSchedule(input_scale=scale), torch.arange(1, 101)
        x0, eps = normal(100, 2, 8), normal(100, 2, 8, seed=1)
        x = schedule.add_noise(x0, eps, tau)
        a = schedule.abar[1:].sqrt().reshape(-1, 1, 1)
        g = (1 - schedule.abar[1:]).sqrt().reshape(-1, 1, 1)
        v = a * eps - g * scale * x0
        torch.testing.assert_close(schedule.from_x0(x0, x, tau, "eps"), eps, atol=1e-9, rtol=0)
        torch.testing.assert_close(schedule.from_x0(x0, x, tau, "v"), v, atol=1e-9, rtol=0)
        torch.testing.assert_close(g * x + a * v, eps, atol=1e-9, rtol=0)

    def test_squared_errors_are_one_loss_with_three_weights(self) -> None:
        schedule, tau = NoiseSchedule(input_scale=0.5), torch.arange(1, 100)
        x0, guess, eps = normal(99, 1, 8), normal(99, 1, 8, seed=1), normal(99, 1, 8, seed=2)
        x = schedule.add_noise(x0, eps, tau)

        def error(param: str) -> Tensor:
            difference = schedule.from_x0(x0, x, tau, param) - schedule.from_x0(guess, x, tau, param)
            return difference.square().mean(dim=(1, 2))

        snr = schedule.snr()[1:-1]
        torch.testing.assert_close(error("eps"), snr * error("x0"))
        torch.testing.assert_close(error("v"), (0.25 + snr) * error("x0"))


class TestDDIM:
    def test_timesteps_trail_evenly_from_the_top(self) -> None:
        assert ddim_timesteps(1, 100) == [100]
        assert ddim_timesteps(4, 100) == [100, 75, 50, 25]
        assert ddim_timesteps(10, 100) == list(range(100, 0, -10))
        assert ddim_timesteps(100, 100) == list(range(100, 0, -1))
        for count in range(1, 101):
            steps = ddim_timesteps(count, 100)
            gaps = {high - low for high, low in zip(steps, [*steps[1:], 0], strict=True)}
            assert len(steps) == count
            assert steps[0] == 100
            assert max(gaps) - min(gaps) <= 1
            assert min(gaps) >= 1

    @pytest.mark.parametrize("count", [0, -1, 101])
    def test_impossible_step_counts_are_refused(self, count: int) -> None:
        with pytest.raises(ValueError, match="between 1 and 100"):
            ddim_timesteps(count, 100)

    @pytest.mark.parametrize("scale", [1.0, 0.25])
    def test_step_against_the_general_formula(self, scale: float) -> None:
        """x' = x sqrt(abar'/abar) + (sqrt(1/abar' - 1) - sqrt(1/abar - 1)) sqrt(abar') eps, in x0's scale."""
        schedule = NoiseSchedule(input_scale=scale)
        x, x0 = normal(2, 3, 4), normal(2, 3, 4, seed=1)
        for tau, tau_next in ((99, 98), (80, 40), (10, 3)):
            now, then = schedule.abar[tau].item(), schedule.abar[tau_next].item()
            eps = (x - math.sqrt(now) * scale * x0) / math.sqrt(1 - now)
            slope = math.sqrt(1 / then - 1) - math.sqrt(1 / now - 1)
            expected = (x / math.sqrt(now) + slope * eps) * math.sqrt(then)
            torch.testing.assert_close(schedule.ddim_step(x, x0, tau, tau_next), expected)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("scale", [1.0, 0.25])
    def test_exact_eps_recovers_x0_in_every_number_of_steps(self, kind: str, scale: float) -> None:
        schedule = NoiseSchedule(kind, input_scale=scale)
        x0, eps = normal(2, 3, 4), normal(2, 3, 4, seed=1)
        start = schedule.add_noise(x0, eps, 99)
        for count in (1, 10, 99):
            sampled = ddim_sample(
                schedule, lambda x, tau: schedule.to_x0(eps, x, tau, "eps"), start, ddim_timesteps(count, 99)
            )
            torch.testing.assert_close(sampled, x0, atol=1e-8, rtol=0)

    def test_denoiser_is_called_once_a_level_and_its_last_answer_returned(self) -> None:
        seen: list[int] = []

        def denoise(x: Tensor, tau: int) -> Tensor:
            seen.append(tau)
            return torch.full_like(x, tau)

        sampled = ddim_sample(NoiseSchedule(), denoise, normal(1, 2, 3), [100, 60, 20])
        assert seen == [100, 60, 20]
        assert torch.equal(sampled, torch.full_like(sampled, 20))

    def test_clamp_reaches_the_trajectory(self) -> None:
        inputs: list[Tensor] = []

        def denoise(x: Tensor, tau: int) -> Tensor:
            inputs.append(x)
            return 3 * torch.ones_like(x)

        schedule, x = NoiseSchedule(), normal(1, 2, 3)
        sampled = ddim_sample(schedule, denoise, x, [100, 50], clamp=lambda z: z.clamp(-1, 1))
        assert torch.equal(sampled, torch.ones_like(x))
        torch.testing.assert_close(inputs[1], schedule.ddim_step(x, torch.ones_like(x), 100, 50))

    def test_gradient_of_the_last_step_alone(self) -> None:
        schedule, x = NoiseSchedule(), normal(1, 2, 3)

        def run(grad: str, steps: list[int]) -> Tensor:
            w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
            ddim_sample(schedule, lambda x, tau: w * x + w, x, steps, grad=grad).sum().backward()
            return w.grad

        assert torch.equal(run("last", [100]), run("all", [100]))
        before = schedule.ddim_step(x, 0.5 * x + 0.5, 100, 50)
        torch.testing.assert_close(run("last", [100, 50]), (before + 1).sum())
        assert not torch.isclose(run("last", [100, 50]), run("all", [100, 50]))


class TestCategoricalOracle:
    """The exact posterior mean of 16 tokens with Zipf frequencies in the network's place."""

    def setup_method(self) -> None:
        self.schedule = NoiseSchedule("cosine", input_scale=0.25)
        self.table = normal(16, 64)
        weights = 1 / torch.arange(1, 17, dtype=torch.float64)
        self.prior = weights / weights.sum()

    def denoise(self, x: Tensor, tau: int) -> Tensor:
        abar = self.schedule.abar[tau]
        centres = abar.sqrt() * self.schedule.input_scale * self.table
        log_likelihood = (x @ centres.T - centres.square().sum(-1) / 2) / (1 - abar)
        return (self.prior.log() + log_likelihood).softmax(-1) @ self.table

    def sample(self, count: int, rows: int = 20_000) -> Tensor:
        start = normal(1, rows, 64, seed=4)
        return ddim_sample(self.schedule, self.denoise, start, ddim_timesteps(count, 100))

    def test_one_step_is_the_posterior_mean_and_loses_no_likelihood(self) -> None:
        estimate = self.sample(1, rows=5)
        torch.testing.assert_close(estimate, (self.prior @ self.table).expand_as(estimate))
        # 16 vectors in 64 dimensions are independent, so the mixture weights can be read back
        weights = torch.linalg.lstsq(self.table.T, estimate[0].T).solution.T
        entropy = -(self.prior * self.prior.log()).sum()
        torch.testing.assert_close(-(weights.log() @ self.prior), entropy.expand(5), atol=1e-6, rtol=0)

    def test_more_steps_sample_the_prior_better(self) -> None:
        distances = []
        for count in (1, 2, 5, 10, 20):
            tokens = torch.cdist(self.sample(count)[0], self.table).argmin(-1)
            shares = torch.bincount(tokens, minlength=16).double() / len(tokens)
            distances.append((shares - self.prior).abs().sum().item() / 2)
        assert distances == sorted(distances, reverse=True)
        # the mean's nearest token is the most frequent one, so one step never draws anything else
        assert distances[0] == pytest.approx(1 - self.prior[0].item(), abs=1e-9)
        # 20,000 draws of the prior itself lie about 0.008 away from it
        for distance, bound in zip(distances[1:], (0.2, 0.05, 0.03, 0.02), strict=True):
            assert distance < bound

    def test_a_wrong_direction_is_noticed(self) -> None:
        """Keeping the old noise level's share of eps, an off-by-one of the step, does not sample the prior."""
        x = normal(1, 20_000, 64, seed=4)
        steps = ddim_timesteps(10, 100)
        for tau, tau_next in pairwise(steps):
            x0 = self.denoise(x, tau)
            a_next = self.schedule.abar[tau_next].sqrt() * self.schedule.input_scale
            x = a_next * x0 + (x - self.schedule.add_noise(x0, torch.zeros_like(x), tau))
        tokens = torch.cdist(self.denoise(x, steps[-1])[0], self.table).argmin(-1)
        shares = torch.bincount(tokens, minlength=16).double() / len(tokens)
        assert (shares - self.prior).abs().sum().item() / 2 > 0.1


class TestTimesteps:
    def test_uniform_with_an_emphasised_last_level(self) -> None:
        tau = sample_timesteps((400, 500), 100, seeded())
        counts = torch.bincount(tau.flatten(), minlength=101)
        assert tau.shape == (400, 500)
        assert counts[0] == 0
        assert counts[100].item() / 200_000 == pytest.approx(0.3, abs=0.005)
        expected = (200_000 - counts[100].item()) / 99
        chi_square = ((counts[1:100] - expected) ** 2 / expected).sum().item()
        assert chi_square < 98 + 4 * math.sqrt(2 * 98)

    def test_seed_is_uniform_over_all_levels(self) -> None:
        counts = torch.bincount(sample_timesteps((200_000,), 100, seeded(), "seed"), minlength=101)
        chi_square = ((counts[1:] - 2000) ** 2 / 2000).sum().item()
        assert counts[0] == 0
        assert chi_square < 99 + 4 * math.sqrt(2 * 99)

    def test_logit_normal_quantiles(self) -> None:
        tau = sample_timesteps((100_000,), 100, seeded(), "logit_normal", terminal_prob=0.0)
        assert tau.min() >= 1
        assert tau.max() <= 99
        for quantile, z in ((0.1587, -1.0), (0.5, 0.0), (0.8413, 1.0)):
            expected = 1 + 99 / (1 + math.exp(-z))
            assert tau.double().quantile(quantile).item() == pytest.approx(expected, abs=1.5)

    def test_warp_follows_its_weights(self) -> None:
        weights = torch.arange(1.0, 10.0)
        tau = sample_timesteps((50_000,), 10, seeded(), "warp", terminal_prob=0.0, weights=weights)
        shares = torch.bincount(tau, minlength=11)[1:10] / 50_000
        torch.testing.assert_close(shares, weights / weights.sum(), atol=0.01, rtol=0)

    def test_same_generator_same_levels(self) -> None:
        draws = [sample_timesteps((3, 4), 100, seeded(seed)) for seed in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])

    def test_unusable_arguments_are_refused(self) -> None:
        with pytest.raises(ValueError, match="one weight for each"):
            sample_timesteps((2,), 10, seeded(), "warp")
        with pytest.raises(ValueError, match="time sampler must be"):
            sample_timesteps((2,), 10, seeded(), "cosine")


class TestNoiseTable:
    def test_longer_tables_start_with_shorter_ones(self) -> None:
        short, long = noise_table(10, 7, seed=5), noise_table(3000, 7, seed=5)
        assert len(short) >= 10
        assert len(long) >= 3000
        assert torch.equal(long[: len(short)], short)
        assert not torch.equal(noise_table(10, 7, seed=6), short)

    def test_rows_are_unit_normal_and_unlike_each_other(self) -> None:
        table = noise_table(4096, 64, seed=0)
        assert table.mean().item() == pytest.approx(0, abs=0.01)
        assert table.std().item() == pytest.approx(1, abs=0.01)
        assert len(table.unique(dim=0)) == len(table)
