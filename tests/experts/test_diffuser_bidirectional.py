"""The leaky option of the diffuser: what it reads, that it is off by default, and where it is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nano_think.experts.diffuser import DiffuserExpert
from nano_think.ops.diffusion import ddim_sample, ddim_timesteps
from nano_think.ops.layout import Layout

D, L = 32, 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def live(randomise: Callable[..., nn.Module]) -> Callable[..., DiffuserExpert]:
    """`live(**options)`: a small expert in eval mode, the same noise in its parameters whatever the options."""

    def make(**options: object) -> DiffuserExpert:
        expert = DiffuserExpert(D, 2, 2, 48, max_positions=64, dropout=0.0, **options).eval()
        expert.fit_statistics(2 * normal(500, D, seed=9) + 1)
        return randomise(expert, scale=0.5)

    return make


def packed() -> Layout:
    """Documents of 5 and 4 tokens, then three pads."""
    segments = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3])
    return Layout(torch.cat([torch.arange(n) for n in (5, 4, 3)]).unsqueeze(0), segments)


def with_mask(layout: Layout, mask: Tensor) -> Layout:
    """The layout with a mask (L, L) in place of what it lets a token see."""

    class Masked(Layout):
        sight = property(lambda _: (mask[None, None], None))

    return Masked(layout.positions, layout.segments)


def moved(expert: DiffuserExpert, x: Tensor, t: int, layout: Layout | None = None, steps: int = 1) -> Tensor:
    """(L,) how far each output moves when token t does."""
    changed = x.clone()
    changed[:, t] += normal(len(x), D, seed=2)
    return (expert(x, layout, steps) - expert(changed, layout, steps)).abs().amax(dim=(0, 2))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("layout", [None, packed()], ids=["plain", "packed"])
def test_off_it_computes_what_the_causal_stream_always_computed(
    live: Callable, layout: Layout | None, steps: int
) -> None:
    """Bit for bit, from the parts of the network and the layout itself."""
    expert, x = live(), normal(1, L, D)
    where = layout or Layout.span(0, L)
    net, context = expert.denoiser, expert.denoiser.context_in(expert.entry(x))
    clean = net.clean_stream(context, where)

    def denoise(latent: Tensor, tau: int) -> Tensor:
        return expert.to_x0(net(latent, tau, context, clean, where), latent, tau)

    start = expert.noise[where.positions]
    x0 = ddim_sample(expert.schedule, denoise, start, ddim_timesteps(steps, 100), grad="last")
    assert torch.equal(expert(x, layout, steps), expert.readout(x0))
    assert torch.equal(expert.predict(start, 40, x, layout), net(start, 40, context, clean, where))
    assert expert.leaks == []
    assert not DiffuserExpert(D, 1, 2, 8).bidirectional


@pytest.mark.parametrize("steps", [1, 4])
def test_on_every_output_of_the_document_feels_every_token(live: Callable, steps: int) -> None:
    x = normal(2, L, D)
    for t in (0, 7, L - 1):
        assert (moved(live(bidirectional=True), x, t, steps=steps) > 0).all()
        causal = moved(live(), x, t, steps=steps)
        assert torch.equal(causal > 0, torch.arange(L) >= t)


def test_on_documents_and_pads_stay_apart(live: Callable) -> None:
    expert, x, layout = live(bidirectional=True), normal(1, L, D), packed()
    assert torch.equal(moved(expert, x, 3, layout) > 0, torch.arange(L) < 5)
    assert torch.equal(moved(expert, x, 8, layout) > 0, (torch.arange(L) >= 5) & (torch.arange(L) < 9))
    assert torch.equal(moved(expert, x, 10, layout) > 0, torch.arange(L) == 10)
    whole = expert(x, layout)
    torch.testing.assert_close(whole[:, :5], expert(x[:, :5]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole[:, 5:9], expert(x[:, 5:9]), atol=1e-5, rtol=1e-5)


def test_on_it_is_the_same_network_under_a_full_mask(live: Callable) -> None:
    """Bit for bit, the mask of every document written down by hand; so in `predict` and with keys known."""
    expert, causal, x, layout = live(bidirectional=True), live(), normal(1, L, D), packed()
    mask = torch.eye(L, dtype=torch.bool)
    mask[:5, :5] = mask[5:9, 5:9] = True
    full, noisy = with_mask(layout, mask), normal(1, L, D, seed=1)
    assert torch.equal(expert(x, layout, 3), causal(x, full, 3))
    assert torch.equal(expert.denoise(noisy, 40, x, layout), causal.denoise(noisy, 40, x, full))
    known = expert.clean_stream(x, layout)
    assert torch.equal(expert.denoise(noisy, 40, x, layout, kv=known), causal.denoise(noisy, 40, x, full))
    everything = with_mask(Layout.span(0, L), torch.ones(L, L, dtype=torch.bool))
    assert torch.equal(expert(x), causal(x, everything))


def test_on_a_single_token_and_a_draft_know_no_difference(live: Callable) -> None:
    expert, causal, x = live(bidirectional=True), live(), normal(2, 1, D)
    torch.testing.assert_close(expert(x), causal(x))
    drafts = [
        some.draft(normal(1, 3, D), normal(20, D, seed=3), 6, torch.Generator().manual_seed(0), steps=2)
        for some in (expert, causal)
    ]
    assert torch.equal(*drafts)


def test_training_and_decoding_refuse_it(live: Callable) -> None:
    expert, x = live(bidirectional=True), normal(1, 4, D)
    with pytest.raises(ValueError, match=r"bidirectional=true reads later tokens and cannot decode"):
        expert.extend(x, expert.init_state(1, 4))
    expert.train()
    for use in (
        lambda: expert(x),
        lambda: expert.predict(x, 5, x),
        lambda: expert.denoise(x, 5, x),
        lambda: expert.clean_stream(x),
    ):
        with pytest.raises(ValueError, match=r"bidirectional=true reads later tokens; train with false"):
            use()
    live().train()(x)
    expert.eval()(x)
