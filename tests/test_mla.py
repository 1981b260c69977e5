"""The context block and the router: identities, causality, decoding, and a task that routing must solve."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nano_think.mla import ExpertRouter, MultiHeadLatentAttention
from nano_think.ops.layout import Layout
from nano_think.ops.pooling import pool_nll

CAUSAL_POOLS = ["cummean", "token", "ema", "window", "cummean+token", "prefix"]


@dataclass(frozen=True)
class Memory:
    values: Tensor
    valid: Tensor
    index: Tensor


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def router(pool: str = "cummean", **options) -> ExpertRouter:
    made = ExpertRouter(d_model=8, pool=pool, span=3, **options)
    for i, parameter in enumerate(made.parameters()):
        parameter.data = noise(*parameter.shape, seed=i)
    return made


def packed(lengths: list[int], pads: int = 0) -> Layout:
    positions = torch.cat([torch.arange(n) for n in [*lengths, pads]])
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((pads,), -1)])
    return Layout(positions.unsqueeze(0), segments.unsqueeze(0))


def literal_mean_pool(made: ExpertRouter, context: Tensor) -> Tensor:
    """softmax(W_r MeanPool(normed context) + b_r) of one whole document (L, d)."""
    normed = context / (context.square().mean(-1, keepdim=True) + made.norm.eps).sqrt()
    return ((made.weight @ normed.mean(0) + made.bias) / made.tau).softmax(-1)


class TestContext:
    @pytest.mark.parametrize("kv", ["latent", "full", "seed_bottleneck"])
    def test_starts_as_the_identity(self, kv):
        e = noise(2, 5, 12)
        assert torch.equal(MultiHeadLatentAttention(12, 3, kv=kv)(e), e)

    def test_fresh_gradient_reaches_the_output_projection(self):
        mla = MultiHeadLatentAttention(12, 3)
        (mla(noise(2, 5, 12)) * noise(2, 5, 12, seed=1)).sum().backward()
        assert mla.attention.out_proj.weight.grad.abs().sum() > 0

    def test_parameter_counts_at_seed_size(self):
        def count(**options) -> int:
            return sum(p.numel() for p in MultiHeadLatentAttention(384, 6, **options).parameters())

        assert count(latent_dim=128, rope_dim=32) == count() == 528_896
        assert count(kv="full") == 589_824 + 384
        assert count(memory=True) == 528_896 + 2 * 384 + 6
        assert sum(p.numel() for p in ExpertRouter(384).parameters()) == 1_155

    def test_post_norms(self):
        e = 3 + noise(2, 5, 12)
        centred = MultiHeadLatentAttention(12, 3, post_norm="layer")(e)
        torch.testing.assert_close(centred, torch.nn.functional.layer_norm(e, (12,)))
        scaled = MultiHeadLatentAttention(12, 3, post_norm="rms")(e)
        torch.testing.assert_close(scaled, e / e.square().mean(-1, keepdim=True).sqrt(), atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="post_norm"):
            MultiHeadLatentAttention(12, 3, post_norm="batch")

    def test_memory_changes_the_context_but_not_its_length(self):
        mla = MultiHeadLatentAttention(12, 3, memory=True)
        mla.attention.out_proj.weight.data = noise(12, 12)
        e = noise(1, 4, 12)
        for k in (0, 1, 4):
            memory = Memory(
                noise(1, 1, k, 12), torch.ones(1, 1, k, dtype=torch.bool), torch.tensor([[-1, 0, 0, 0]])
            )
            context = mla(e, None, memory)
            assert context.shape == e.shape
            assert torch.equal(context, mla(e)) == (k == 0)
            real, null = mla.slot_mass(e, None, memory)
            assert real.shape == null.shape == (1, 3, 4)


class TestRouter:
    def test_last_position_is_the_seeds_mean_pool(self):
        made, context = router(tau=0.7), noise(2, 9, 8, seed=3)
        weights = made(context)
        for b in range(2):
            torch.testing.assert_close(
                weights[b, -1], literal_mean_pool(made, context[b]), atol=1e-6, rtol=1e-6
            )
        for t in range(9):
            torch.testing.assert_close(
                weights[0, t], literal_mean_pool(made, context[0, : t + 1]), atol=1e-6, rtol=1e-6
            )

    def test_norm_makes_the_scale_of_the_context_irrelevant(self):
        made, context = router(), noise(1, 6, 8)
        torch.testing.assert_close(made(100 * context), made(context), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("pool", [*CAUSAL_POOLS, "sequence"])
    def test_packed_documents_equal_a_loop_over_documents(self, pool):
        made, context, lengths = router(pool).eval(), noise(1, 14, 8), [5, 1, 6]
        weights, start = made(context, packed(lengths, pads=2)), 0
        for n in lengths:
            alone = made(context[:, start : start + n])
            torch.testing.assert_close(weights[:, start : start + n], alone, atol=1e-6, rtol=1e-6)
            start += n
        assert weights.isfinite().all()

    @pytest.mark.parametrize("pool", CAUSAL_POOLS)
    def test_meaning_of_every_pool(self, pool):
        made, context = router(pool), noise(1, 7, 8)
        normed = made.norm(context)[0]
        for t in range(7):
            past = normed[: t + 1]
            mean = {
                "cummean": past.mean(0),
                "cummean+token": past.mean(0),
                "token": past[-1],
                "window": past[-3:].mean(0),
                "prefix": past[:3].mean(0),
                "ema": torch.stack([0.9 ** (t - j) * past[j] for j in range(t + 1)]).sum(0)
                / sum(0.9**i for i in range(t + 1)),
            }[pool]
            z = made.weight @ mean + made.bias
            if pool == "cummean+token":
                z = z + made.token_weight @ past[-1]
            torch.testing.assert_close(made(context)[0, t], z.softmax(-1), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("pool", CAUSAL_POOLS)
    def test_decoding_equals_the_full_pass_with_rollback_and_reorder(self, pool):
        made, rng = router(pool), random.Random(1)
        state, read = made.init_state(2, 40, max_rollback=3), torch.empty(2, 0, 8)
        for step in range(40):
            n = rng.randint(1, 5)
            new = noise(2, n, 8, seed=step)
            read = torch.cat((read, new), dim=1)
            got = made.extend(new, state)
            torch.testing.assert_close(got, made(read)[:, -n:], atol=1e-5, rtol=1e-5)
            back = rng.randint(0, min(3, n))
            state.rollback(back)
            read = read[:, : read.shape[1] - back]
            if rng.random() < 0.3:
                state.reorder(torch.tensor([1, 1]))
                read = read[[1, 1]]
            assert state.length == read.shape[1]

    @pytest.mark.parametrize("pool", CAUSAL_POOLS)
    def test_no_later_token_matters_and_earlier_ones_do(self, pool):
        made, context = router(pool), noise(1, 8, 8)
        changed = context.clone()
        changed[:, 2] += 1.0
        before, after = made(context), made(changed)
        assert torch.equal(before[:, :2], after[:, :2])
        moved = (before != after).any(-1)[0]
        assert moved[2]
        reach = {"token": 3, "window": 5}.get(pool, 8)
        assert moved[2:reach].all()

    def test_sequence_pool_sees_the_future_and_is_refused_in_training(self):
        made, context = router("sequence"), noise(1, 6, 8)
        with pytest.raises(ValueError, match="sequence"):
            made.train()(context)
        weights = made.eval()(context)
        for t in range(6):
            torch.testing.assert_close(
                weights[0, t], literal_mean_pool(made, context[0]), atol=1e-6, rtol=1e-6
            )
        with pytest.raises(ValueError, match="cannot decode"):
            made.extend(context, made.init_state(1, 8))

    @pytest.mark.parametrize("pool", [*CAUSAL_POOLS, "sequence"])
    @pytest.mark.parametrize("floor", [0.0, 0.1])
    def test_weights_are_positive_sum_to_one_and_respect_the_floor(self, pool, floor):
        made = router(pool, floor=floor).eval()
        made.weight.data *= 50
        for context in (noise(2, 6, 8), noise(2, 6, 8).bfloat16()):
            weights = made(context)
            assert weights.dtype == torch.float32
            assert weights.shape == (2, 6, 3)
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6))
            assert weights.min() >= floor - 1e-6

    def test_bf16_autocast_keeps_fp32_sums(self):
        """A bf16 sum of equal terms would stop growing after some 256 of them."""
        made, context = router(), noise(1, 1, 8).expand(1, 2000, 8)
        with torch.autocast("cpu", torch.bfloat16):
            weights, state = made(context), made.init_state(1, 2000)
            made.extend(context, state)
        assert weights.dtype == state["sum"].dtype == torch.float32
        torch.testing.assert_close(weights[:, -1], weights[:, 0], atol=1e-5, rtol=1e-5)
        assert state["count"].item() == 2000

    @pytest.mark.parametrize(("tau", "floor"), [(1.0, 0.0), (0.5, 0.0), (2.0, 0.02)])
    def test_static_weights(self, tau, floor):
        made = router("cummean+token", tau=tau, floor=floor)
        target = torch.tensor([0.7, 0.25, 0.05])
        made.set_static(target)
        torch.testing.assert_close(made(noise(2, 5, 8)), target.expand(2, 5, 3))
        made.set_static(torch.tensor([1.0, 0.0, 0.0]))
        assert made(noise(1, 2, 8)).isfinite().all()

    def test_fresh_router_is_uniform(self):
        torch.testing.assert_close(ExpertRouter(8)(noise(1, 4, 8)), torch.full((1, 4, 3), 1 / 3))

    def test_memory_can_join_the_mean(self):
        """A visible slot counts like one more token of the normed mean; unseen and empty ones do not."""
        made, context = router(pool_includes_memory=True), noise(1, 4, 8)
        valid = torch.tensor([[[True, False], [True, True]]])
        memory = Memory(noise(1, 2, 2, 8, seed=4), valid, torch.tensor([[-1, -1, 0, 1]]))
        weights = made(context, None, memory)
        torch.testing.assert_close(weights[:, :2], made(context)[:, :2])
        third = torch.cat((context[0, :3], memory.values[0, 0, :1]))
        last = torch.cat((context[0], memory.values[0, 1]))
        torch.testing.assert_close(weights[0, 2], literal_mean_pool(made, third), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(weights[0, 3], literal_mean_pool(made, last), atol=1e-6, rtol=1e-6)
        assert torch.equal(router()(context, None, memory), router()(context))

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match=r"router\.pool"):
            ExpertRouter(8, pool="median")
        with pytest.raises(ValueError, match="floor"):
            ExpertRouter(8, floor=0.4)


def test_router_learns_two_domains_and_beats_static_weights():
    """Expert 0 is right on domain A, expert 1 on domain B; tokens of a domain share a noisy direction."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, 8, generator=generator)

    def batch(rows: int = 32, length: int = 12):
        domain = torch.randint(2, (rows,), generator=generator)
        context = 0.7 * directions[domain].unsqueeze(1) + torch.randn(rows, length, 8, generator=generator)
        labels = torch.randint(5, (rows, length), generator=generator)
        logits = torch.zeros(rows, length, 2, 5)
        own = torch.nn.functional.one_hot(labels, 5).float()
        wrong = torch.nn.functional.one_hot((labels + 1) % 5, 5).float()
        for e in range(2):
            right = (domain == e).view(-1, 1, 1)
            logits[:, :, e] = 4 * torch.where(right, own, wrong)
        return context, logits, labels, domain

    made = ExpertRouter(8, num_experts=2)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.1)
    for _ in range(80):
        context, logits, labels, _ = batch()
        optimizer.zero_grad()
        pool_nll(logits, made(context), labels).mean().backward()
        optimizer.step()
    context, logits, labels, domain = batch(rows=200)
    weights = made(context)
    accuracy = (weights[:, -1].argmax(-1) == domain).float().mean()
    assert accuracy >= 0.95
    grid = [torch.tensor([w / 20, 1 - w / 20]) for w in range(21)]
    static = min(pool_nll(logits, w, labels).mean().item() for w in grid)
    assert pool_nll(logits, weights, labels).mean().item() < 0.7 * static
