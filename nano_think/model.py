"""NanoThink: embed, attend to the shared context and to memory, route, run every expert, fuse, read out.

    tokens -> embedding -> MLA (+ memory slots) -> router weights
                                 |-> expert 1 .. N -> sum_e w_e s_e o_e -> tied head -> logits

`forward` is pure: it writes nothing and draws no random numbers in eval mode. Letters: B rows, L positions,
N experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_think.cache import Cache, State
from nano_think.mla import ExpertRouter
from nano_think.nn.slots import Slots
from nano_think.ops.cross_entropy import IGNORED, linear_cross_entropy
from nano_think.ops.layout import Layout

Fusion = Literal["hidden", "prob", "logit"]
ExpertInput = Literal["context", "raw"]
Part: TypeAlias = nn.Module | Callable[..., nn.Module]


@dataclass(frozen=True)
class LMOutput:
    """What a language model says about every position.

    logits: (B, L, V) fp32, log-probabilities where fusion is `prob`; None where they were not asked for.
    weights: (B, L, N) fp32 trust in the experts, in the order of `expert_hidden`; None of a single expert.
    hidden: (B, L, d) what the head reads; None where fusion is `prob`, which has no such vector.
    context: (B, L, d) what the router reads. expert_hidden: (B, L, d) of every expert, by name.
    """

    logits: Tensor | None
    weights: Tensor | None
    hidden: Tensor | None
    context: Tensor
    expert_hidden: dict[str, Tensor] = field(default_factory=dict)


class ExpertLM(nn.Module):
    """One expert between an embedding table and the same table as head, without bias.

    embedding: a table to share, or its (vocab_size, d_model). expert: a network, or a factory receiving d_model.
    """

    def __init__(self, embedding: nn.Embedding | Sequence[int], expert: Part) -> None:
        super().__init__()
        self.embedding = embedding if isinstance(embedding, nn.Embedding) else _table(*embedding)
        self.expert = _build(expert, self.embedding.embedding_dim)

    @property
    def vocab_size(self) -> int:
        """Rows of the table, tokens of the head."""
        return self.embedding.num_embeddings

    def forward(self, tokens: Tensor, layout: Layout | None = None, with_logits: bool = True) -> LMOutput:
        """tokens (B, L) int64."""
        e = self.embedding(tokens)
        return self._output(e, self.expert(e, Layout.of(tokens, layout)), with_logits)

    def nll(self, output: LMOutput, labels: Tensor) -> Tensor:
        """-log p(label) (B, L) in nats, 0 where the label is -100."""
        return linear_cross_entropy(output.expert_hidden["expert"], self.embedding.weight, labels)

    def token_nll(self, tokens: Tensor, labels: Tensor, layout: Layout | None = None) -> Tensor:
        """`nll` of a forward pass that never holds all logits."""
        return self.nll(self(tokens, layout, with_logits=False), labels)

    def init_state(self, batch: int, max_len: int, max_rollback: int = 0) -> State:
        """The expert's state."""
        return self.expert.init_state(batch, max_len, max_rollback)

    def extend(self, tokens: Tensor, state: State, last_only: bool = False) -> LMOutput:
        """Read n new tokens (B, n). last_only: logits (B, 1, V) of the last alone."""
        e = self.embedding(tokens)
        return self._output(e, self.expert.extend(e, state), with_logits=True, last_only=last_only)

    def _output(self, e: Tensor, hidden: Tensor, with_logits: bool, last_only: bool = False) -> LMOutput:
        read_out = hidden[:, -1:] if last_only else hidden
        logits = F.linear(read_out, self.embedding.weight).float() if with_logits else None
        return LMOutput(logits, None, hidden, e, {"expert": hidden})


class NanoThink(nn.Module):
    """Experts of different kinds over one embedding, mixed token by token by a causal router.

    experts: networks by name, or factories receiving d_model. mla, router: likewise; without an mla the
    context is the embedding itself, without a router a default one is made.
    fusion: `hidden` sums w_e s_e o_e before the tied head, a geometric pool of the experts; `logit` is the same
    function, since a linear head commutes with the sum; `prob` averages probabilities.
    expert_input: what experts read, the MLA's `context` or the `raw` embedding.
    tables: private embeddings (in and out) of experts that were trained with their own; such experts can
    neither read the context nor share logits, so they need expert_input="raw" and fusion="prob".
    """

    def __init__(
        self,
        experts: Mapping[str, Part],
        vocab_size: int,
        d_model: int,
        mla: Part | None = None,
        router: Part | None = None,
        fusion: Fusion = "hidden",
        expert_input: ExpertInput = "context",
        tables: Mapping[str, nn.Embedding] | None = None,
    ) -> None:
        super().__init__()
        _check(experts, fusion, expert_input, tables or {})
        self.fusion, self.expert_input = fusion, expert_input
        self.embedding = _table(vocab_size, d_model)
        self.mla = _build(mla, d_model) if mla else None
        self.router = _build(router or ExpertRouter, d_model, num_experts=len(experts))
        self.experts = nn.ModuleDict({name: _build(part, d_model) for name, part in experts.items()})
        self.tables = nn.ModuleDict(tables or {})
        self.expert_gain = nn.Parameter(torch.ones(len(experts)))
        self.experts_frozen = False

    @property
    def vocab_size(self) -> int:
        """Rows of the table, tokens of the head."""
        return self.embedding.num_embeddings

    @property
    def expert_names(self) -> list[str]:
        """Experts in the order of the routing weights."""
        return list(self.experts)

    def forward(
        self,
        tokens: Tensor,
        layout: Layout | None = None,
        memory: Slots | None = None,
        weights: Tensor | None = None,
        knock_out: Collection[str] = (),
        with_logits: bool = True,
    ) -> LMOutput:
        """tokens (B, L) int64 to logits (B, L, V) and routing weights (B, L, N).

        memory: slots that the MLA may attend to. weights: forced weights that broadcast to (B, L, N), used as
        they are. knock_out: experts whose weight becomes 0 while the others are scaled up to sum to 1.
        """
        layout = Layout.of(tokens, layout)
        context, hidden = self.expert_outputs(tokens, layout, memory)
        routed = self.router(context, layout, memory)
        return self._output(context, hidden, self._choose(routed, weights, knock_out), with_logits)

    def expert_outputs(
        self, tokens: Tensor, layout: Layout | None = None, memory: Slots | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The context and every expert's output by name, (B, L, d) each: all that is there before routing."""
        layout = Layout.of(tokens, layout)
        e = self.embedding(tokens)
        context = self.mla(e, layout, memory) if self.mla else e
        hidden = {
            name: expert(self._expert_input(name, tokens, e, context), layout)
            for name, expert in self._networks()
        }
        return context, hidden

    def nll(self, output: LMOutput, labels: Tensor) -> Tensor:
        """-log p(label) (B, L) in nats, 0 where the label is -100."""
        if output.hidden is not None:
            return linear_cross_entropy(output.hidden, self.embedding.weight, labels)
        assert output.weights is not None
        return self.pooled_nll(output.weights, self.expert_nll(output.expert_hidden, labels), labels)

    def expert_nll(self, expert_hidden: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """-log p(label) by every expert alone, (B, L, N) in nats, 0 where the label is -100."""
        # a token counts for an expert as much as the pool trusts it there
        per_expert = [
            linear_cross_entropy(gain * expert_hidden[name], self._head(name), labels, uniform=False)
            for name, gain in zip(self.experts, self.expert_gain, strict=True)
        ]
        return torch.stack(per_expert, dim=-1)

    @staticmethod
    def pooled_nll(weights: Tensor, expert_nll: Tensor, labels: Tensor) -> Tensor:
        """-log sum_e w_e p_e(label) (B, L) of weights and losses (B, L, N), 0 where the label is -100."""
        pooled = -(_log(weights) - expert_nll).logsumexp(dim=-1)
        return pooled.masked_fill(labels == IGNORED, 0.0)

    def token_nll(
        self,
        tokens: Tensor,
        labels: Tensor,
        layout: Layout | None = None,
        memory: Slots | None = None,
        weights: Tensor | None = None,
        knock_out: Collection[str] = (),
    ) -> Tensor:
        """`nll` of a forward pass that never holds all logits."""
        return self.nll(self(tokens, layout, memory, weights, knock_out, with_logits=False), labels)

    def init_state(self, batch: int, max_len: int, max_rollback: int = 0) -> Cache:
        """States of the MLA, the router and every expert."""
        parts = {"mla": self.mla, "router": self.router, **self.experts}
        return Cache(**{
            name: part.init_state(batch, max_len, max_rollback) for name, part in parts.items() if part
        })  # fmt: skip

    def extend(
        self,
        tokens: Tensor,
        state: Cache,
        memory: Slots | None = None,
        weights: Tensor | None = None,
        knock_out: Collection[str] = (),
        last_only: bool = False,
    ) -> LMOutput:
        """Read n new tokens (B, n); memory.index speaks of these alone. Knocked-out experts keep reading.

        last_only: logits (B, 1, V) and hidden (B, 1, d) of the last token alone.
        """
        e = self.embedding(tokens)
        context = self.mla.extend(e, state["mla"], memory) if self.mla else e
        routed = self.router.extend(context, state["router"], memory)
        hidden = {
            name: expert.extend(self._expert_input(name, tokens, e, context), state[name])
            for name, expert in self._networks()
        }
        return self._output(context, hidden, self._choose(routed, weights, knock_out), True, last_only)

    def freeze_experts(self) -> None:
        """No gradients and no dropout in the experts and their private tables, whatever `train` says later."""
        self.experts_frozen = True
        self.experts.requires_grad_(False).eval()
        self.tables.requires_grad_(False)

    def train(self, mode: bool = True) -> NanoThink:
        """As for any module; frozen experts stay in eval mode."""
        super().train(mode)
        if self.experts_frozen:
            self.experts.eval()
        return self

    def fuse(self, expert_hidden: Mapping[str, Tensor], weights: Tensor) -> tuple[Tensor | None, Tensor]:
        """What the head reads (None for `prob`) and the logits, of hidden states and weights (B, L, N)."""
        if self.fusion == "prob":
            return None, self._linear_pool(expert_hidden, weights)
        hidden, table = self.mix(expert_hidden, weights), self.embedding.weight
        # mixed with weights in fp32, whatever the table is kept in
        return hidden, F.linear(hidden.to(table.dtype), table).float()

    def _output(
        self,
        context: Tensor,
        hidden: dict[str, Tensor],
        weights: Tensor,
        with_logits: bool,
        last_only: bool = False,
    ) -> LMOutput:
        if with_logits:
            kept = slice(-1, None) if last_only else slice(None)
            fused, logits = self.fuse({name: h[:, kept] for name, h in hidden.items()}, weights[:, kept])
            return LMOutput(logits, weights, fused, context, hidden)
        fused = None if self.fusion == "prob" else self.mix(hidden, weights)
        return LMOutput(None, weights, fused, context, hidden)

    def _networks(self) -> list[tuple[str, Any]]:
        return list(self.experts.items())

    def _expert_input(self, name: str, tokens: Tensor, e: Tensor, context: Tensor) -> Tensor:
        if name in self.tables:
            return self.tables[name](tokens)
        return context if self.expert_input == "context" else e

    def _head(self, name: str) -> Any:
        return (self.tables[name] if name in self.tables else self.embedding).weight

    def _choose(self, routed: Tensor, forced: Tensor | None, knock_out: Collection[str]) -> Tensor:
        """Forced weights in place of the router's, and nothing for knocked-out experts."""
        weights = routed if forced is None else forced.to(routed).expand_as(routed)
        unknown = set(knock_out) - set(self.experts)
        if unknown:
            raise ValueError(f"cannot knock out {sorted(unknown)}: the experts are {self.expert_names}")
        if not knock_out:
            return weights
        kept = weights * weights.new_tensor([name not in knock_out for name in self.experts])
        total = kept.sum(dim=-1, keepdim=True)
        if bool((total == 0).any()):
            raise ValueError(f"without {sorted(knock_out)} no expert with a weight is left; keep one")
        return kept / total

    def mix(self, expert_hidden: Mapping[str, Tensor], weights: Tensor) -> Tensor:
        """sum_e w_e s_e o_e. No norm and no bias follow: they would break the geometric pool."""
        scale = weights * self.expert_gain
        first, *others = (expert_hidden[name] for name in self.experts)
        mixed = scale[..., :1] * first
        for i, hidden in enumerate(others, start=1):
            mixed = torch.addcmul(mixed, scale[..., i, None], hidden)
        return mixed

    def _linear_pool(self, expert_hidden: Mapping[str, Tensor], weights: Tensor) -> Tensor:
        """log sum_e w_e softmax(s_e l_e), added up expert by expert so that two tables of logits are held."""
        return reduce(torch.logaddexp, self._weighted_log_probs(expert_hidden, weights))

    def _weighted_log_probs(self, expert_hidden: Mapping[str, Tensor], weights: Tensor) -> Iterator[Tensor]:
        for i, name in enumerate(self.experts):
            logits = F.linear(self.expert_gain[i] * expert_hidden[name], self._head(name)).float()
            yield _log(weights[..., i, None]) + logits.log_softmax(dim=-1)


def _log(weights: Tensor) -> Tensor:
    """log w with the weight 0 of a knocked-out expert kept finite: its gradient would be NaN."""
    return weights.clamp_min(torch.finfo(weights.dtype).tiny).log()


def _table(vocab_size: int, d_model: int) -> nn.Embedding:
    return nn.Embedding(vocab_size, d_model, _weight=torch.empty(vocab_size, d_model).normal_(std=0.02))


def _build(part: Part, d_model: int, **more: int) -> Any:
    """`part` itself, or the module a factory makes of the dimensions."""
    return part if isinstance(part, nn.Module) else part(d_model=d_model, **more)


def _check(
    experts: Mapping[str, Part], fusion: str, expert_input: str, tables: Mapping[str, nn.Embedding]
) -> None:
    if not experts:
        raise ValueError("NanoThink needs at least one expert")
    if reserved := {"mla", "router"} & set(experts):
        raise ValueError(f"an expert cannot be named {reserved.pop()!r}: the decode state uses that name")
    if fusion not in ("hidden", "prob", "logit"):
        raise ValueError(f"fusion must be hidden, prob or logit, not {fusion!r}")
    if expert_input not in ("context", "raw"):
        raise ValueError(f"expert_input must be context or raw, not {expert_input!r}")
    if unknown := set(tables) - set(experts):
        raise ValueError(f"private tables of unknown experts: {sorted(unknown)}")
    if tables and (fusion != "prob" or expert_input != "raw"):
        raise ValueError("experts with private tables need fusion='prob' and expert_input='raw'")
