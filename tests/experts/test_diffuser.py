from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nano_think.experts.diffuser import DiffuserExpert
from nano_think.ops.layout import Layout

D = 32
PARAMS = ["posterior", "x0", "v", "eps"]
Randomise = Callable[..., nn.Module]
# one step from an eps network is left out: at the last level it saturates at the clamp
CAUSAL = [*((param, steps) for param in ("posterior", "x0", "v") for steps in (1, 4)), ("eps", 4)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(**options: object) -> DiffuserExpert:
    """A 2-layer expert of width 32 in eval mode, its statistics fitted to invented targets."""
    sizes = {"d_model": D, "num_layers": 2, "num_heads": 2, "ffn_dim": 48, "max_positions": 64}
    expert = DiffuserExpert(**(sizes | options)).eval()
    expert.fit_statistics(2 * normal(500, D, seed=9) + 1)
    return expert


@pytest.fixture
def live(randomise: Randomise) -> Callable[..., DiffuserExpert]:
    """`live(**options)`: a small expert in which no zero initialisation hides a path."""
    return lambda **options: randomise(small(**options), scale=0.5)


def count_calls(module: nn.Module) -> list[int]:
    """A list that grows by one entry at every call of `module`."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def num_parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


class TestSizes:
    def test_parameter_counts_at_defaults(self) -> None:
        expert = DiffuserExpert(self_cond=True)
        net = expert.denoiser
        tables = sum(block.table.numel() for block in net.blocks)
        assert num_parameters(net.blocks, net.norm) - tables == 4_722_048
        assert num_parameters(net.latent_in, net.estimate_in, net.context_in, net.time) == 688_896
        assert num_parameters(net.modulation) + tables == 896_256
        assert net.clean_code.numel() == 384
        assert num_parameters(expert.entry) == num_parameters(net.output) == 384 * 384
        assert num_parameters(expert) == 4_722_048 + 688_896 + 896_256 + 384 + 2 * 384 * 384

    def test_optional_parts_are_absent_unless_asked_for(self) -> None:
        plain = num_parameters(small())
        assert num_parameters(small(self_cond=True)) == plain + D * D
        assert num_parameters(small(target="next_embed")) == plain + D * D + D

    def test_training_defaults(self) -> None:
        expert = DiffuserExpert()
        assert expert.schedule.train_T == 100
        assert expert.schedule.kind == "cosine"
        assert (expert.ddim_steps, expert.fused_steps, len(expert.denoiser.blocks)) == (10, 1, 4)
        assert small(target="next_embed").fused_steps == 1

    @pytest.mark.parametrize("option", ["param", "target", "x_T", "grad"])
    def test_unknown_options_are_refused(self, option: str) -> None:
        with pytest.raises(ValueError, match=f"{option} must be one of"):
            small(**{option: "else"})


class TestStatistics:
    def test_missing_statistics_are_refused(self) -> None:
        expert, x = DiffuserExpert(D, 1, 2, 48), normal(1, 3, D)
        for use in (
            lambda: expert(x),
            lambda: expert.denoise(x, 5, x),
            lambda: expert.extend(x, expert.init_state(1, 3)),
            lambda: expert.standardise(x),
        ):
            with pytest.raises(ValueError, match="fit_statistics"):
                use()

    def test_parts_give_what_the_whole_gives(self) -> None:
        hidden = 3 * normal(7, 11, D) + 5
        whole, parts = small(), small()
        whole.fit_statistics(hidden)
        parts.fit_statistics(hidden[i] for i in range(7))
        rows = hidden.reshape(-1, D)
        torch.testing.assert_close(whole.target_mean, rows.mean(0))
        torch.testing.assert_close(whole.target_std, rows.std(0, correction=0))
        torch.testing.assert_close(parts.target_mean, whole.target_mean)
        torch.testing.assert_close(parts.target_std, whole.target_std)
        latents = whole.standardise(rows)
        torch.testing.assert_close(latents.mean(0), torch.zeros(D), atol=1e-5, rtol=0)
        torch.testing.assert_close(latents.std(0, correction=0), torch.ones(D))
        torch.testing.assert_close(whole.unstandardise(latents), rows)

    def test_constant_features_stay_finite(self) -> None:
        expert, hidden = small(), normal(10, D)
        hidden[:, 3] = 0.1
        expert.fit_statistics(hidden)
        assert expert.target_std[3] == 1
        assert expert.standardise(hidden)[:, 3].abs().max() < 1e-6

    @pytest.mark.parametrize("hidden", [torch.zeros(1, D), torch.full((5, D), float("nan"))])
    def test_unusable_targets_are_refused(self, hidden: Tensor) -> None:
        with pytest.raises(ValueError, match="at least two target vectors"):
            small().fit_statistics(hidden)

    def test_checkpoint_carries_statistics_but_not_the_noise(self, live: Callable) -> None:
        trained, fresh, x = live(), DiffuserExpert(D, 2, 2, 48, max_positions=8).eval(), normal(2, 9, D)
        assert "noise" not in trained.state_dict()
        fresh.load_state_dict(trained.state_dict())
        assert torch.equal(fresh(x), trained(x))


class TestDenoiser:
    @pytest.mark.parametrize("length", [1, 2, 17])
    @pytest.mark.parametrize("tau", [0, 50, 99, 100])
    @pytest.mark.parametrize("param", PARAMS)
    def test_shapes(self, live: Callable, length: int, tau: int, param: str) -> None:
        expert, c = live(param=param), normal(3, length, D)
        levels = torch.full((3,), tau)
        for choice in (tau, torch.tensor(tau), levels, levels.unsqueeze(1).expand(3, length)):
            estimate = expert.denoise(normal(3, length, D, seed=1), choice, c)
            assert estimate.shape == c.shape
            assert estimate.isfinite().all()

    def test_levels_by_position_agree_with_single_levels(self, live: Callable) -> None:
        expert, c, x = live(), normal(4, 40, D), normal(4, 40, D, seed=1)
        tau = torch.randint(0, 101, (4, 40), generator=torch.Generator().manual_seed(0))
        mixed = expert.denoise(x, tau, c)
        for level in tau.unique()[::12].tolist():
            single = expert.denoise(x, level, c)
            torch.testing.assert_close(mixed[tau == level], single[tau == level], atol=1e-5, rtol=1e-4)

    def test_every_level_has_its_own_embedding(self, live: Callable) -> None:
        codes = live().denoiser.time(torch.arange(101))
        distances = torch.cdist(codes, codes) + torch.eye(101)
        assert distances.min() > 1e-3

    def test_first_estimate_is_the_mean(self) -> None:
        expert, x = small(), normal(2, 5, D)
        assert torch.equal(expert.denoise(normal(2, 5, D, seed=1), 100, x), torch.zeros(2, 5, D))
        assert torch.equal(expert(x, steps=1), expert.target_mean.expand(2, 5, D))

    @pytest.mark.parametrize("scale", [1.0, 0.25])
    def test_denoise_returns_x0_for_every_parametrisation(self, live: Callable, scale: float) -> None:
        x, c, tau = normal(2, 5, D), normal(2, 5, D, seed=1), 60
        variance = torch.linspace(0.1, 2, D)
        for param in PARAMS:
            expert = live(param=param, input_scale=scale)
            if param == "posterior":
                expert.variance.copy_(variance)
            a, g = (expert.schedule.abar[tau] ** 0.5).item(), ((1 - expert.schedule.abar[tau]) ** 0.5).item()
            raw = expert.predict(x, tau, c)
            # mean of the normal x0 given x_tau, written with the two precisions
            precisions = 1 / variance, (a * scale / g) ** 2
            expected = {
                "posterior": (raw * precisions[0] + x / (a * scale) * precisions[1]) / sum(precisions),
                "x0": raw,
                "v": (a * x - g * raw) / scale,
                "eps": ((x - g * raw) / (a * scale)).clamp(-4, 4),
            }[param]
            estimate = expert.denoise(x, tau, c)
            torch.testing.assert_close(estimate, expected)
            if param != "eps":  # that one clamps
                torch.testing.assert_close(expert.from_x0(estimate, x, tau), raw, atol=1e-5, rtol=1e-4)

    def test_the_variance_follows_the_error_at_pure_noise_alone(self) -> None:
        expert, T = small(), 100
        x0, error = normal(64, 8, D), torch.linspace(0.1, 2, D).sqrt() * normal(64, 8, D, seed=1).sign()
        tau = torch.where(torch.arange(8) % 2 == 0, T, 40).expand(64, 8)
        valid = torch.arange(8).expand(64, 8) < 6
        estimate = x0 + torch.where((valid & (tau == T)).unsqueeze(-1), error, 100.0)
        assert torch.equal(expert.variance, torch.ones(D))
        for _ in range(500):
            expert.track_variance(estimate, x0, tau, valid)
        torch.testing.assert_close(expert.variance, torch.linspace(0.1, 2, D), atol=1e-3, rtol=0)
        before = expert.variance.clone()
        expert.track_variance(estimate, x0, torch.full_like(tau, 40), valid)
        expert.track_variance(estimate, x0, tau, torch.zeros_like(valid))
        assert torch.equal(expert.variance, before)
        assert "variance" in expert.state_dict()
        assert "variance" not in small(param="x0").state_dict()

    def test_a_training_step_asks_no_tensor_for_a_value(self) -> None:
        """A tensor without values stands for one whose values are still being computed."""
        expert = small()
        expert.readout(expert.standardise(normal(2, 4, D)))  # the statistics are looked at once
        blank = copy.deepcopy(expert).to("meta")
        x0, levels = blank.standardise(torch.zeros(2, 4, D, device="meta")), torch.ones(2, 4, device="meta")
        blank.track_variance(x0, x0, levels, levels.bool())
        expert.load_state_dict(DiffuserExpert(D, 2, 2, 48, max_positions=64).state_dict())
        with pytest.raises(ValueError, match="no target statistics"):
            expert.standardise(normal(2, 4, D))

    def test_eps_keeps_some_signal_at_the_last_level(self) -> None:
        assert small(param="eps").schedule.abar[-1] == 1e-4
        assert small(param="v").schedule.abar[-1] == 0

    def test_a_known_clean_stream_changes_nothing(self, live: Callable) -> None:
        expert, c, x = live(), normal(2, 6, D), normal(2, 6, D, seed=1)
        assert torch.equal(expert.denoise(x, 30, c, kv=expert.clean_stream(c)), expert.denoise(x, 30, c))
        assert torch.equal(expert(c, steps=3, kv=expert.clean_stream(c)), expert(c, steps=3))

    def test_self_conditioning_is_read(self, live: Callable) -> None:
        expert, c, x = live(self_cond=True), normal(2, 6, D), normal(2, 6, D, seed=1)
        without = expert.denoise(x, 30, c)
        assert torch.equal(expert.denoise(x, 30, c, self_cond=torch.zeros_like(x)), without)
        assert not torch.allclose(expert.denoise(x, 30, c, self_cond=x), without)


class TestCausality:
    @pytest.mark.parametrize(("param", "steps"), CAUSAL)
    @pytest.mark.parametrize("packed", [False, True])
    def test_only_later_outputs_feel_a_token(
        self, live: Callable, param: str, steps: int, packed: bool
    ) -> None:
        expert, x, t = live(param=param), normal(2, 12, D), 7
        layout = two_documents(5, 7) if packed else None
        changed = x.clone()
        changed[:, t] += normal(2, D, seed=2)
        moved = (expert(x, layout, steps) - expert(changed, layout, steps)).abs().amax(dim=(0, 2))
        assert torch.equal(moved[:t], torch.zeros(t))
        assert (moved[t:] > 0).all()

    def test_other_documents_feel_nothing(self, live: Callable) -> None:
        expert, x, layout = live(), normal(1, 12, D), two_documents(5, 7)
        changed = x.clone()
        changed[:, 2] += 1
        moved = (expert(x, layout) - expert(changed, layout)).abs().amax(dim=(0, 2))
        assert torch.equal(moved[5:], torch.zeros(7))
        assert (moved[2:5] > 0).all()

    def test_latents_do_not_see_each_other(self, live: Callable) -> None:
        expert, c, x = live(), normal(2, 9, D), normal(2, 9, D, seed=1)
        changed = x.clone()
        changed[:, 4] += 1
        moved = (expert.denoise(x, 40, c) - expert.denoise(changed, 40, c)).abs().amax(dim=(0, 2))
        assert moved[4] > 0
        assert moved.sum() == moved[4]

    def test_level_noise_and_context_are_live(self, live: Callable) -> None:
        expert, c, x = live(), normal(2, 9, D), normal(2, 9, D, seed=1)
        base = expert.denoise(x, 40, c)
        for other in (
            expert.denoise(x, 41, c),
            expert.denoise(x + 0.1, 40, c),
            expert.denoise(x, 40, c + normal(2, 9, D, seed=2)),
        ):
            assert ((other - base).abs().amax(dim=-1) > 0).all()
        twin = live(noise_seed=1)
        assert ((twin(c) - expert(c)).abs().amax(dim=-1) > 0).all()

    def test_packed_documents_are_their_own_results(self, live: Callable) -> None:
        expert, x = live(), normal(1, 14, D)
        segments = torch.tensor([[0] * 4 + [1] * 7 + [-1] * 3])
        positions = torch.cat((torch.arange(4), torch.arange(7), torch.arange(3))).unsqueeze(0)
        packed = expert(x, Layout(positions, segments))
        assert packed.isfinite().all()
        torch.testing.assert_close(packed[:, :4], expert(x[:, :4]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed[:, 4:11], expert(x[:, 4:11]), atol=1e-5, rtol=1e-5)

    def test_rows_are_independent_and_interchangeable(self, live: Callable) -> None:
        expert, x = live(), normal(4, 9, D)
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(expert(x[order]), expert(x)[order], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(expert(x[:1]), expert(x)[:1], atol=1e-5, rtol=1e-5)


def two_documents(first: int, second: int) -> Layout:
    positions = torch.cat((torch.arange(first), torch.arange(second))).unsqueeze(0)
    segments = torch.tensor([[0] * first + [1] * second])
    return Layout(positions, segments)


class TestDecoding:
    @pytest.mark.parametrize("steps", [1, 4, 10])
    @pytest.mark.parametrize("param", PARAMS)
    @pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 4, 1]])
    def test_cached_is_full(self, live: Callable, steps: int, param: str, pieces: list[int]) -> None:
        expert, x = live(param=param, fused_steps=steps), normal(2, 12, D)
        state = expert.init_state(2, 12)
        cached = torch.cat([expert.extend(piece, state) for piece in x.split(pieces, dim=1)], dim=1)
        # eps at the last level, where 1% of the amplitude is signal, multiplies rounding by 100
        tolerance = 1e-3 if param == "eps" else 1e-5
        torch.testing.assert_close(cached, expert(x), atol=tolerance, rtol=1e-5)
        assert state.length == 12

    def test_rollback_and_reorder(self, live: Callable) -> None:
        expert, x, wrong = live(), normal(2, 8, D), normal(2, 3, D, seed=1)
        state = expert.init_state(2, 10)
        expert.extend(x[:, :5], state)
        expert.extend(wrong, state)
        state.rollback(3)
        torch.testing.assert_close(expert.extend(x[:, 5:7], state), expert(x)[:, 5:7], atol=1e-5, rtol=1e-5)
        swap = torch.tensor([1, 0])
        state.reorder(swap)
        torch.testing.assert_close(
            expert.extend(x[swap, 7:], state), expert(x)[swap, 7:], atol=1e-5, rtol=1e-5
        )

    def test_cache_holds_keys_and_values_of_the_clean_stream_only(self, live: Callable) -> None:
        expert = live()
        for steps in (1, 10):
            state = expert.init_state(3, 20)
            expert.extend(normal(3, 7, D), state, steps)
            assert state.num_bytes == 3 * 7 * 2 * D * 2 * 4

    def test_outputs_do_not_depend_on_the_size_of_the_noise_table(self, live: Callable) -> None:
        roomy, tight, x = live(max_positions=2048), live(max_positions=1), normal(1, 1030, D)
        assert len(tight.noise) < 1030 < len(roomy.noise)
        state = tight.init_state(1, 1030)
        tight.extend(x[:, :1020], state, 1)
        last = tight.extend(x[:, 1020:], state, 1)
        torch.testing.assert_close(last, roomy(x, steps=1)[:, 1020:], atol=1e-5, rtol=1e-5)
        assert torch.equal(live(max_positions=1)(x, steps=1), roomy(x, steps=1))

    def test_other_starts(self, live: Callable) -> None:
        x = normal(2, 6, D)
        zeros = live(x_T="zeros")
        start = torch.zeros(2, 6, D)
        assert torch.equal(zeros(x, steps=1), zeros.readout(zeros.denoise(start, 100, x)))
        fresh = live(x_T="rng")
        runs = [fresh(x, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])

    def test_one_step_is_one_estimate_from_the_table(self, live: Callable) -> None:
        for target in ("hidden_same", "next_embed"):
            expert, x = live(target=target), normal(2, 6, D)
            start = expert.noise[:6].expand(2, 6, D)
            torch.testing.assert_close(expert(x, steps=1), expert.readout(expert.denoise(start, 100, x)))

    @pytest.mark.parametrize("steps", [1, 4, 10])
    def test_sampler_calls_the_noisy_stream_once_a_step(self, live: Callable, steps: int) -> None:
        expert, x = live(fused_steps=steps), normal(2, 6, D)
        noisy, clean = count_calls(expert.denoiser), count_calls(expert.denoiser.context_in)
        keys = count_calls(expert.denoiser.blocks[0].mixer.k_proj)
        expert(x)
        assert (len(noisy), len(clean), len(keys)) == (steps, 1, 1)
        expert.extend(x[:, :1], expert.init_state(2, 6))
        assert (len(noisy), len(clean), len(keys)) == (2 * steps, 2, 2)

    @pytest.mark.parametrize("steps", [0, 101])
    def test_impossible_step_counts_are_refused(self, live: Callable, steps: int) -> None:
        with pytest.raises(ValueError, match="between 1 and 100"):
            live()(normal(1, 2, D), steps=steps)

    def test_half_precision_inputs_keep_their_dtype(self, live: Callable) -> None:
        expert, x = live(), normal(2, 6, D)
        half = copy.deepcopy(expert).to(torch.bfloat16)(x.bfloat16())
        assert half.dtype == torch.bfloat16
        # bf16 keeps 8 bits and four steps add up
        assert (half.float() - expert(x)).norm() < 0.1 * expert(x).norm()


class TestGradients:
    def gradient(self, expert: DiffuserExpert, steps: int) -> Tensor:
        x = normal(2, 6, D).requires_grad_()
        (expert(x, steps=steps) * normal(2, 6, D, seed=5) + x * 0).sum().backward()
        return x.grad

    def test_modes(self, live: Callable) -> None:
        last, every, none = live(grad="last"), live(grad="all"), live(grad="none")
        torch.testing.assert_close(self.gradient(last, 1), self.gradient(every, 1))
        assert self.gradient(last, 4).abs().sum() > 0
        assert not torch.allclose(self.gradient(last, 4), self.gradient(every, 4))
        for steps in (1, 4):
            assert torch.equal(self.gradient(none, steps), torch.zeros(2, 6, D))

    def test_all_is_the_derivative_of_the_whole_sampler(self, live: Callable) -> None:
        expert, weights = live(grad="all"), normal(1, 3, D, seed=2)
        x = normal(1, 3, D).requires_grad_()
        (slope,) = torch.autograd.grad((expert(x, steps=3) * weights).sum(), x)
        latent = expert.noise[:3].unsqueeze(0)
        for tau, tau_next in ((100, 67), (67, 33)):
            latent = expert.schedule.ddim_step(latent, expert.denoise(latent, tau, x), tau, tau_next)
        output = expert.readout(expert.denoise(latent, 33, x))
        torch.testing.assert_close(expert(x, steps=3), output, atol=1e-5, rtol=1e-5)
        (expected,) = torch.autograd.grad((output * weights).sum(), x)
        torch.testing.assert_close(slope, expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("param", PARAMS)
    @pytest.mark.parametrize("target", ["hidden_same", "next_embed", "hidden_next"])
    def test_every_parameter_learns(self, live: Callable, param: str, target: str) -> None:
        expert, c, x = (
            live(param=param, target=target, self_cond=True),
            normal(2, 6, D),
            normal(2, 6, D, seed=1),
        )
        expert.readout(expert.denoise(x, 50, c, self_cond=x)).square().sum().backward()
        for name, parameter in expert.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name

    def test_training_after_inference_mode(self, live: Callable) -> None:
        expert, x = live(param="v", max_positions=1), normal(1, 1100, D)
        with torch.inference_mode():
            expert(x, steps=2)
        expert(x, steps=2).sum().backward()
        assert expert.denoiser.latent_in.weight.grad.abs().sum() > 0
