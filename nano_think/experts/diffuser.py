"""The diffusion expert: denoises, at every position, a latent that stands for what comes next.

Three kinds of latent x0[t] (`target`), all standardised by frozen statistics:
  hidden_same   final hidden state of a frozen Transformer at t. Given the context it is a fixed vector, so
                any number of denoising steps aims at one point.
  next_embed    frozen embedding of token t + 1.
  hidden_next   final hidden state of the Transformer at t + 1. Both are random given the context. A sample of
                such a vector is not their distribution, so likelihoods read the one-step estimate, which is
                the posterior mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from nano_think.cache import Cache
from nano_think.experts.denoiser_block import KeysValues, TwoStreamDenoiser, WholeDocuments
from nano_think.nn.block import ExpertInput
from nano_think.nn.flops import Product, Reach, products_of
from nano_think.nn.norm import RMSNorm
from nano_think.ops.diffusion import (
    NoiseSchedule,
    ScheduleKind,
    ddim_sample,
    ddim_timesteps,
    noise_table,
)
from nano_think.ops.layout import Layout
from nano_think.ops.processes import summed

Param = Literal["posterior", "x0", "eps", "v"]
Target = Literal["hidden_same", "next_embed", "hidden_next"]
StartNoise = Literal["table", "zeros", "rng"]
GradMode = Literal["last", "none", "all"]

EPS_TERMINAL = 1e-4
EPS_CLAMP = 4.0
BIDIRECTIONAL = "experts.diffuser.bidirectional=true reads later tokens"


class DiffuserExpert(nn.Module):
    """num_layers two-stream blocks and a DDIM sampler; (B, L, d_model) in and out, causal like every expert.

    A training step, `hidden` being the target vectors (B, L, d_model):

        x0 = expert.standardise(hidden)
        x_tau = expert.schedule.add_noise(x0, eps, tau)
        x0_hat = expert.denoise(x_tau, tau, x, layout)        # squared error against x0
        o = expert.readout(x0_hat)                            # cross-entropy of o @ embedding.T

    `fit_statistics` must have seen the targets before; forward and denoise raise ValueError otherwise.

    param: what the network predicts; `denoise` always returns x0. `posterior`: a mean of x0, into which the
        latent is then weighed by `NoiseSchedule.gain` with the variance that `track_variance` measures.
        `x0`, `v`, `eps`: that quantity. With `eps` the last noise level keeps 1e-4 of the signal and x0 is
        clamped to 4 standard deviations.
    ddim_steps: for stand-alone sampling.
    fused_steps: inside `forward`. One step from pure noise is the posterior mean, which a likelihood needs;
        further ones turn it into a sample. More than 1 is for target=hidden_same alone.
    x_T: start of sampling: a noise table by position, `zeros`, or fresh noise (`rng`, never cacheable).
    grad: what `forward` differentiates: the `last` step, `all`, or the last step without its input (`none`).
    max_positions: rows of the noise table held in memory; it grows on demand without changing.
    self_cond: feed the previous estimate back; only then is its input map (d_model^2 weights) there.
    bidirectional: both streams attend to all of a document, later tokens included, as the plan's denoiser does:
        for analysis in eval mode, refused in training and in `extend`. A `draft` stays causal.
    adaptor: see `ExpertInput`.
    """

    target_mean: Tensor
    target_std: Tensor
    stats_ready: Tensor
    variance: Tensor
    noise: Tensor

    def __init__(
        self,
        d_model: int = 384,
        num_layers: int = 4,
        num_heads: int = 6,
        ffn_dim: int = 512,
        train_T: int = 100,
        schedule: ScheduleKind = "cosine",
        param: Param = "posterior",
        target: Target = "hidden_same",
        ddim_steps: int = 10,
        fused_steps: int = 1,
        x_T: StartNoise = "table",
        grad: GradMode = "last",
        max_positions: int = 4096,
        noise_seed: int = 0,
        self_cond: bool = False,
        dropout: float = 0.1,
        input_scale: float = 1.0,
        bidirectional: bool = False,
        adaptor: bool = True,
    ) -> None:
        super().__init__()
        for name, value, kind in (
            ("param", param, Param),
            ("target", target, Target),
            ("x_T", x_T, StartNoise),
            ("grad", grad, GradMode),
        ):
            if value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {value!r}")
        self.d_model, self.param, self.target, self.x_T, self.grad = d_model, param, target, x_T, grad
        self.ddim_steps, self.noise_seed, self.bidirectional = ddim_steps, noise_seed, bidirectional
        self.fused_steps = fused_steps if target == "hidden_same" else 1
        ddim_timesteps(self.fused_steps, train_T)
        self.schedule = NoiseSchedule(
            schedule, train_T, terminal=EPS_TERMINAL if param == "eps" else 0.0, input_scale=input_scale
        )
        self.entry = ExpertInput(d_model, adaptor)
        self.denoiser = TwoStreamDenoiser(
            d_model, num_layers, num_heads, ffn_dim, train_T, self_cond=self_cond, dropout=dropout
        )
        if param == "posterior":
            # standardised latents vary by 1 as long as nothing is known of them
            self.register_buffer("variance", torch.ones(d_model))
        if target != "hidden_same":
            self.readout_proj = nn.Linear(d_model, d_model, bias=False)
            self.readout_norm = RMSNorm(d_model)
            nn.init.eye_(self.readout_proj.weight)
        self.register_buffer("target_mean", torch.zeros(d_model))
        self.register_buffer("target_std", torch.ones(d_model))
        self.register_buffer("stats_ready", torch.tensor(False))
        self._seen_ready = False
        self.register_buffer("noise", noise_table(max_positions, d_model, noise_seed), persistent=False)

    @property
    def leaks(self) -> list[str]:
        """Leaky options that are on, see `nano_think.nn.leaks`."""
        return [BIDIRECTIONAL] if self.bidirectional else []

    @torch.no_grad()
    def fit_statistics(self, hidden: Tensor | Iterable[Tensor]) -> None:
        """Freeze mean and deviation per feature of targets (..., d_model), given at once or in parts.

        Leave out pads. A feature that never varies gets the standard deviation 1.
        Raises ValueError for fewer than two vectors or values that are not finite.
        """
        count = 0
        total = square = torch.zeros(self.d_model, dtype=torch.float64, device=self.target_mean.device)
        for part in [hidden] if isinstance(hidden, Tensor) else hidden:
            rows = part.reshape(-1, self.d_model).to(total)
            count, total, square = count + len(rows), total + rows.sum(0), square + rows.square().sum(0)
        if count < 2 or not bool(square.isfinite().all()):
            raise ValueError("fit_statistics needs at least two target vectors, all of them finite")
        mean = total / count
        variance = (square / count - mean.square()).clamp(min=0)
        # below this the difference of the two sums is rounding
        varies = variance > 1e-12 * mean.square()
        self.target_mean.copy_(mean)
        self.target_std.copy_(torch.where(varies, variance, 1.0).sqrt())
        self.stats_ready.fill_(True)

    @torch.no_grad()
    def track_variance(self, x0_hat: Tensor, x0: Tensor, tau: Tensor, valid: Tensor) -> None:
        """Follow the variance that the context leaves in x0, per feature: a training step calls this.

        It is the squared error of estimates x0_hat (B, L, d_model) made from pure noise, so only positions
        count where tau (B, L) is the last level and `valid` (B, L) holds. A running mean over 50 steps, which
        leaves out what is not finite: it would never be so again. Does nothing unless param=posterior. Of several
        processes, all follow what they see together.
        """
        if self.param != "posterior":
            return
        pure = valid & (tau == self.schedule.train_T)
        # nothing here is asked of a value, which would wait for the whole step of a GPU
        errors = torch.where(pure.unsqueeze(-1), x0_hat - x0, 0.0).float().square().flatten(0, -2).sum(0)
        totals = summed(torch.cat([errors, pure.sum(dtype=torch.float32).view(1)]))
        error = (totals[:-1] / totals[-1]).to(self.variance)  # NaN without a position that counts
        self.variance.lerp_(torch.where(error.isfinite(), error, self.variance), 0.02)

    def standardise(self, hidden: Tensor) -> Tensor:
        """Target vectors (..., d_model) to latents x0 of zero mean and unit variance."""
        self._require_statistics()
        return (hidden - self.target_mean) / self.target_std

    def unstandardise(self, x0: Tensor) -> Tensor:
        """Inverse of `standardise`."""
        return x0 * self.target_std + self.target_mean

    def readout(self, x0: Tensor) -> Tensor:
        """Latents (..., d_model) to the vectors whose product with the embedding table is the logits."""
        if self.target == "hidden_same":
            return self.unstandardise(x0)
        return self.readout_norm(self.readout_proj(x0))

    def clean_stream(self, c: Tensor, layout: Layout | None = None) -> list[KeysValues]:
        """Keys and values of every layer for expert inputs c (B, L, d_model): all that a noisy pass reads."""
        return self.denoiser.clean_stream(self._context(c), self._layout(c, layout))

    def predict(
        self,
        x_tau: Tensor,
        tau: int | Tensor,
        c: Tensor,
        layout: Layout | None = None,
        kv: list[KeysValues] | None = None,
        self_cond: Tensor | None = None,
    ) -> Tensor:
        """The network's own output, of kind `param`, at latents x_tau and levels tau (), (B,) or (B, L).

        c: expert inputs (B, L, d_model); kv: their `clean_stream` where it is known already;
        self_cond: an earlier estimate of x0 (B, L, d_model), without gradient; None stands for zeros.
        """
        self._require_statistics()
        layout, context = self._layout(c, layout), self._context(c)
        kv = self.denoiser.clean_stream(context, layout) if kv is None else kv
        return self.denoiser(x_tau, tau, context, kv, layout, self_cond)

    def to_x0(self, prediction: Tensor, x_tau: Tensor, tau: int | Tensor) -> Tensor:
        """x0 that a prediction of kind `param` stands for."""
        if self.param == "posterior":
            a, _ = self.schedule.levels(tau, x_tau)
            gain = self.schedule.gain(self.variance.to(x_tau.dtype), tau, x_tau)
            return prediction + gain * (x_tau - a * self.schedule.input_scale * prediction)
        x0 = self.schedule.to_x0(prediction, x_tau, tau, self.param)
        return x0.clamp(-EPS_CLAMP, EPS_CLAMP) if self.param == "eps" else x0

    def from_x0(self, x0: Tensor, x_tau: Tensor, tau: int | Tensor) -> Tensor:
        """The prediction of kind `param` that stands for x0 at level tau >= 1: inverse of `to_x0`."""
        if self.param != "posterior":
            return self.schedule.from_x0(x0, x_tau, tau, self.param)
        a, _ = self.schedule.levels(tau, x_tau)
        gain = self.schedule.gain(self.variance.to(x_tau.dtype), tau, x_tau)
        return (x0 - gain * x_tau) / (1 - gain * a * self.schedule.input_scale)

    def denoise(
        self,
        x_tau: Tensor,
        tau: int | Tensor,
        c: Tensor,
        layout: Layout | None = None,
        kv: list[KeysValues] | None = None,
        self_cond: Tensor | None = None,
    ) -> Tensor:
        """Estimate of x0 (B, L, d_model) from one noisy pass; arguments as in `predict`."""
        return self.to_x0(self.predict(x_tau, tau, c, layout, kv, self_cond), x_tau, tau)

    def forward(
        self,
        x: Tensor,
        layout: Layout | None = None,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        kv: list[KeysValues] | None = None,
    ) -> Tensor:
        """(B, L, d_model) token vectors to output vectors of the same shape, by `steps` noisy passes.

        steps: `fused_steps` where not given. generator: for x_T=rng. kv: the `clean_stream` of x where it is
        known already. Positions must lie below L.
        """
        self._require_statistics()
        layout = self._layout(x, layout)
        context = self._context(x.detach() if self.grad == "none" else x)
        clean = self.denoiser.clean_stream(context, layout) if kv is None else kv
        start = self._start(context, layout.positions, x.shape[1], generator)
        return self.readout(self._sample(start, context, clean, layout, steps)).to(x.dtype)

    def init_state(self, batch: int, max_len: int, max_rollback: int = 0) -> Cache:
        """Clean-stream keys and values of every layer; latents are never cached."""
        mixers = [block.mixer for block in self.denoiser.blocks]
        return Cache.stack([mixer.init_state(batch, max_len, max_rollback) for mixer in mixers])

    def extend(
        self,
        x: Tensor,
        state: Cache,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Output vectors (B, n, d_model) of n new positions: one clean pass and `steps` noisy ones."""
        self._require_statistics()
        if self.bidirectional:
            raise ValueError(f"{BIDIRECTIONAL} and cannot decode; choose false")
        end = state[0].reach(x.shape[1])
        layout = state[0].layout(x.shape[1], x.device)
        context = self._context(x)
        clean = self.denoiser.clean_stream(context, layout, state)
        start = self._start(context, layout.positions, end, generator)
        return self.readout(self._sample(start, context, clean, layout, steps)).to(x.dtype)

    @torch.no_grad()
    def draft(
        self,
        prompt: Tensor,
        table: Tensor,
        length: int,
        generator: torch.Generator,
        steps: int | None = None,
    ) -> Tensor:
        """`length` tokens (B, length) after a prompt, all positions denoised at once. Not a likelihood.

        prompt: (B, P, d_model) with P >= 1, rows of the embedding table (V, d_model); a lone document start
        stands for "no prompt". Latents do not see each other. Drafted tokens depend on each other only because
        every step re-reads the nearest tokens of the step before as its context (zero vectors in the first),
        so news travels one position a step and a token may rest on a guess that was revised since.
        Positions stay causal: a draft is parallel, not bidirectional.
        """
        self._require_statistics()
        first = prompt.shape[1] - 1
        everywhere = Layout.span(0, first + length, prompt.device)
        drafted = Layout.span(first, length, prompt.device)
        words = prompt.new_zeros(prompt.shape[0], length - 1, self.d_model)
        x0: Tensor | None = None

        def nearest(x0: Tensor) -> Tensor:
            return (self.readout(x0).to(table.dtype) @ table.T).argmax(dim=-1)

        def denoise(x: Tensor, tau: int) -> Tensor:
            nonlocal words, x0
            context = self._context(torch.cat((prompt, words), dim=1))
            clean = self.denoiser.clean_stream(context, everywhere)
            x0 = self.to_x0(self.denoiser(x, tau, context[:, first:], clean, drafted, x0), x, tau)
            words = table[nearest(x0)[:, :-1]]
            return x0

        shape = (prompt.shape[0], length, self.d_model)
        noise = torch.randn(shape, generator=generator, device=generator.device).to(prompt.device)
        timesteps = self._timesteps(self.ddim_steps if steps is None else steps)
        return nearest(ddim_sample(self.schedule, denoise, noise, timesteps))

    def products(self, reach: Reach) -> Iterator[Product]:
        """Of `forward`: one clean stream and `reach.passes` noisy passes. See `nano_think.nn.flops`."""
        passes = self.fused_steps if reach.passes is None else reach.passes
        if self.grad == "none":
            yield Product(0.0, cut=True)
        yield from self._clean_products(reach)
        for step in range(1, passes + 1):
            recorded, drawn = self.grad == "all" or step == passes, step == 1 or self.grad != "all"
            for product in self.denoiser.pass_products(reach, drawn=drawn):
                yield replace(product, recorded=recorded)
        yield from self._readout_products(reach)

    def denoising_products(self, reach: Reach) -> Iterator[Product]:
        """Of a training step: `predict` at a noise level of each position's own, and `readout`."""
        levels = min(self.schedule.train_T + 1, 1 / reach.per_call)
        yield from self._clean_products(reach)
        yield from self.denoiser.pass_products(reach, levels)
        yield from self._readout_products(reach)

    def _clean_products(self, reach: Reach) -> Iterator[Product]:
        for part in (self.entry, self.denoiser.context_in):
            yield from products_of(part, reach)
        yield from self.denoiser.clean_products(reach)

    def _readout_products(self, reach: Reach) -> Iterator[Product]:
        if self.target != "hidden_same":
            for part in (self.readout_proj, self.readout_norm):
                yield from products_of(part, reach)

    def _layout(self, c: Tensor, layout: Layout | None) -> Layout:
        """The layout that both streams attend by."""
        layout = Layout.of(c, layout)
        if not self.bidirectional:
            return layout
        if self.training:
            raise ValueError(f"{BIDIRECTIONAL}; train with false")
        return WholeDocuments(layout.positions, layout.segments)

    def _context(self, c: Tensor) -> Tensor:
        return self.denoiser.context_in(self.entry(c))

    def _timesteps(self, steps: int) -> list[int]:
        return ddim_timesteps(steps, self.schedule.train_T)

    def _sample(
        self, start: Tensor, context: Tensor, clean: list[KeysValues], layout: Layout, steps: int | None
    ) -> Tensor:
        x0: Tensor | None = None

        def denoise(x: Tensor, tau: int) -> Tensor:
            nonlocal x0
            x0 = self.to_x0(self.denoiser(x, tau, context, clean, layout, x0), x, tau)
            return x0

        timesteps = self._timesteps(self.fused_steps if steps is None else steps)
        return ddim_sample(
            self.schedule, denoise, start, timesteps, grad="all" if self.grad == "all" else "last"
        )

    def _start(
        self, context: Tensor, positions: Tensor, end: int, generator: torch.Generator | None
    ) -> Tensor:
        """x_T (B, L, d_model), at least fp32: the sampler's differences are small beside its terms."""
        dtype = torch.promote_types(context.dtype, torch.float32)
        if self.x_T == "zeros":
            return torch.zeros_like(context, dtype=dtype)
        if self.x_T == "rng":
            device = context.device if generator is None else generator.device
            return torch.randn(context.shape, generator=generator, device=device).to(context.device, dtype)
        if end > len(self.noise):
            with torch.inference_mode(False):
                longer = noise_table(max(end, 2 * len(self.noise)), self.d_model, self.noise_seed)
                self.noise = longer.to(self.noise)
        return self.noise[positions].to(dtype).expand_as(context)

    def _require_statistics(self) -> None:
        # a compiler cannot branch on a tensor: whoever compiles has run the model once before
        if torch.compiler.is_compiling() or self._seen_ready:
            return
        if not self.stats_ready:
            raise ValueError(
                "the diffuser has no target statistics: call fit_statistics(hidden) on training targets"
            )
        # looked at once: each look at a GPU waits for all that it was asked before
        self._seen_ready = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """As for any module; what is loaded may have no statistics."""
        self._seen_ready = False
        super()._load_from_state_dict(*args, **kwargs)
