"""The fused model: what it computes, what it must not see, and that decoding repeats it."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_think.cache import RingState
from nano_think.experts.transformer import TransformerExpert
from nano_think.mla import ExpertRouter, MultiHeadLatentAttention
from nano_think.model import ExpertLM, LMOutput, NanoThink
from nano_think.nn.block import ExpertInput
from nano_think.nn.norm import RMSNorm
from nano_think.ops.layout import Layout
from nano_think.ops.pooling import fit_static_weights, pool_nll
from nano_think.retrieval import MemorySlots

D, VOCAB, LENGTH = 16, 23, 9
NAMES = ["transformer", "recurrent", "tokenwise"]
FUSIONS = ["hidden", "prob", "logit"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class Recurrent(nn.Module):
    """An expert with an overwritten state: h_t = 0.5 h_{t-1} + tanh(W x_t), restarting with each document."""

    def __init__(self, d_model: int, memory: bool = True) -> None:
        super().__init__()
        self.memory = memory
        self.entry, self.proj = ExpertInput(d_model), nn.Linear(d_model, d_model)
        self.dropout, self.norm = nn.Dropout(0.5), RMSNorm(d_model)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        positions = Layout.of(x, layout).positions.expand(x.shape[:2])
        h, rows = torch.zeros_like(x[:, 0]), []
        for t, u in enumerate(self._drive(x).unbind(1)):
            h = 0.5 * self.memory * h * (positions[:, t] > 0).unsqueeze(-1) + u
            rows.append(h)
        return self.norm(torch.stack(rows, dim=1))

    def init_state(self, batch: int, max_len: int, max_rollback: int = 0) -> RingState:
        return RingState(max_rollback, h=torch.zeros(batch, self.proj.in_features))

    def extend(self, x: Tensor, state: RingState) -> Tensor:
        rows = []
        for u in self._drive(x).unbind(1):
            state.advance(1, h=0.5 * self.memory * state["h"] + u)
            rows.append(state["h"])
        return self.norm(torch.stack(rows, dim=1))

    def _drive(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.proj(self.entry(x))))


def parts() -> dict[str, partial]:
    transformer = partial(TransformerExpert, num_layers=2, num_heads=2, ffn_dim=20)
    return {
        "transformer": transformer,
        "recurrent": partial(Recurrent),
        "tokenwise": partial(Recurrent, memory=False),
    }


def noisy(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with every parameter replaced by noise, so that no initial value hides a path."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def build(memory: bool = False, audit: bool = False, **options) -> NanoThink:
    """A fresh model, or with `audit` one whose parameters are all noise; in eval mode."""
    torch.manual_seed(0)
    mla = partial(MultiHeadLatentAttention, num_heads=2, memory=memory)
    router = options.pop("router", partial(ExpertRouter, pool="cummean+token"))
    model = NanoThink(parts(), VOCAB, D, mla=mla, router=router, **options).eval()
    return noisy(model) if audit else model


def some_tokens(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def some_labels(tokens: Tensor) -> Tensor:
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = -100
    return labels


def some_memory(rows: int = 2, k: int = 3) -> MemorySlots:
    generator = torch.Generator().manual_seed(5)
    index = torch.tensor([-1, -1, -1, 0, 0, 0, 1, 1, 1]).expand(rows, LENGTH)
    return MemorySlots(
        torch.randn(rows, 2, k, D, generator=generator), torch.ones(rows, 2, k, dtype=torch.bool), index
    )


def packed(lengths: list[int]) -> Layout:
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    return Layout(positions, torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).unsqueeze(0))


def one_hot(name: str) -> Tensor:
    return F.one_hot(torch.tensor(NAMES.index(name)), 3).float()


class TestExpertLM:
    def test_is_the_expert_between_a_tied_table(self):
        lm = noisy(ExpertLM((VOCAB, D), parts()["transformer"])).eval()
        tokens = some_tokens()
        output = lm(tokens)
        hidden = lm.expert(lm.embedding.weight[tokens])
        assert torch.equal(output.logits, hidden @ lm.embedding.weight.T)
        assert output.weights is None
        assert sum(p.numel() for p in lm.parameters()) == VOCAB * D + sum(
            p.numel() for p in lm.expert.parameters()
        )

    def test_token_nll_and_shared_table(self):
        table = nn.Embedding(VOCAB, D)
        lm = ExpertLM(table, Recurrent(D)).eval()
        assert lm.embedding is table
        tokens = some_tokens()
        labels = some_labels(tokens)
        want = F.cross_entropy(lm(tokens).logits.flatten(0, 1), labels.flatten(), reduction="none")
        torch.testing.assert_close(lm.token_nll(tokens, labels), want.view(labels.shape), **CLOSE)

    def test_cached_equals_full(self):
        lm, tokens = noisy(ExpertLM((VOCAB, D), parts()["transformer"])).eval(), some_tokens()
        state = lm.init_state(2, LENGTH)
        pieces = [lm.extend(part, state).logits for part in tokens.split([4, 1, 1, 3], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), lm(tokens).logits, **CLOSE)

    def test_logits_of_the_last_token_alone(self):
        lm, tokens = noisy(ExpertLM((VOCAB, D), parts()["transformer"])).eval(), some_tokens()
        last = lm.extend(tokens, lm.init_state(2, LENGTH), last_only=True)
        torch.testing.assert_close(last.logits, lm(tokens).logits[:, -1:], **CLOSE)


class TestFusion:
    @pytest.mark.parametrize("fusion", FUSIONS)
    @pytest.mark.parametrize("name", NAMES)
    def test_vertex_of_a_fresh_model_is_the_expert_alone(self, fusion, name):
        model, tokens = build(fusion=fusion), some_tokens()
        alone = ExpertLM(model.embedding, model.experts[name]).eval()
        output = model(tokens, weights=one_hot(name))
        want, got = alone(tokens).logits, output.logits
        if fusion == "prob":
            want = want.log_softmax(-1)
        torch.testing.assert_close(got, want, **CLOSE)
        if fusion == "hidden":
            assert torch.equal(output.hidden, output.expert_hidden[name])

    def test_hidden_fusion_is_the_weighted_sum_under_the_tied_head(self):
        model, tokens = build(audit=True), some_tokens()
        output = model(tokens)
        fused = sum(
            output.weights[..., i : i + 1] * model.expert_gain[i] * output.expert_hidden[name]
            for i, name in enumerate(NAMES)
        )
        torch.testing.assert_close(output.hidden, fused, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(output.logits, fused @ model.embedding.weight.T, **CLOSE)

    @pytest.mark.parametrize("fusion", FUSIONS)
    def test_fusion_is_the_pool_of_the_experts(self, fusion):
        model, tokens = build(audit=True, fusion=fusion), some_tokens()
        labels = some_labels(tokens)
        output = model(tokens)
        logits = torch.stack(
            [
                gain * (output.expert_hidden[name] @ model.embedding.weight.T)
                for name, gain in zip(NAMES, model.expert_gain, strict=True)
            ],
            dim=-2,
        )
        want = pool_nll(logits, output.weights, labels.clamp_min(0), "prob" if fusion == "prob" else "hidden")
        want = want.masked_fill(labels == -100, 0.0)
        torch.testing.assert_close(model.token_nll(tokens, labels), want, **CLOSE)
        from_logits = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="none")
        torch.testing.assert_close(from_logits.view(labels.shape), want, **CLOSE)
        torch.testing.assert_close(model.fuse(output.expert_hidden, output.weights)[1], output.logits)

    def test_order_of_experts_does_not_matter(self):
        model = build(audit=True)
        order = [2, 0, 1]
        torch.manual_seed(1)
        other = NanoThink(
            {NAMES[i]: model.experts[NAMES[i]] for i in order}, VOCAB, D, model.mla, ExpertRouter(D)
        ).eval()
        other.embedding = model.embedding
        with torch.no_grad():
            other.expert_gain.copy_(model.expert_gain[order])
        tokens, weights = some_tokens(), torch.tensor([0.2, 0.3, 0.5])
        torch.testing.assert_close(
            other(tokens, weights=weights[order]).logits, model(tokens, weights=weights).logits, **CLOSE
        )

    @pytest.mark.parametrize("fusion", FUSIONS)
    def test_step_zero_equals_the_static_pool(self, fusion):
        model, tokens = build(fusion=fusion), some_tokens(rows=8)
        labels = some_labels(tokens)
        hidden = {name: h.flatten(0, 1) for name, h in model(tokens).expert_hidden.items()}
        space = "prob" if fusion == "prob" else "hidden"
        fit = fit_static_weights(hidden, model.embedding.weight, labels.flatten(), space)
        model.router.set_static(fit.weights)
        fused = model.token_nll(tokens, labels).sum() / (labels != -100).sum()
        assert fused.item() == pytest.approx(fit.nll, abs=1e-4)

    @pytest.mark.parametrize("fusion", ["hidden", "prob"])
    def test_knock_out_scales_the_others_up(self, fusion):
        model, tokens = build(audit=True, fusion=fusion), some_tokens()
        weights = model(tokens).weights
        output = model(tokens, knock_out=["recurrent"])
        kept = weights * torch.tensor([1.0, 0.0, 1.0])
        torch.testing.assert_close(output.weights, kept / kept.sum(-1, keepdim=True))
        torch.testing.assert_close(output.logits, model(tokens, weights=output.weights).logits)
        alone = model(tokens, knock_out=["recurrent", "tokenwise"])
        torch.testing.assert_close(alone.logits, model(tokens, weights=one_hot("transformer")).logits)
        model.token_nll(tokens, some_labels(tokens), knock_out=["recurrent"]).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        with pytest.raises(ValueError, match="keep one"):
            model(tokens, knock_out=NAMES)
        with pytest.raises(ValueError, match="the experts are"):
            model(tokens, knock_out=["mamba"])

    def test_private_tables(self):
        tables = {name: nn.Embedding(VOCAB, D) for name in NAMES[1:]}
        with pytest.raises(ValueError, match="private tables need"):
            NanoThink(parts(), VOCAB, D, tables=tables)
        model = NanoThink(parts(), VOCAB, D, fusion="prob", expert_input="raw", tables=tables).eval()
        tokens = some_tokens()
        for name in NAMES:
            table = tables.get(name, model.embedding)
            alone = ExpertLM(table, model.experts[name]).eval()(tokens).logits.log_softmax(-1)
            torch.testing.assert_close(model(tokens, weights=one_hot(name)).logits, alone, **CLOSE)
        model.freeze_experts()
        assert not any(p.requires_grad for p in model.tables.parameters())

    def test_raw_input_keeps_the_context_from_the_experts(self):
        model, tokens = build(audit=True, expert_input="raw"), some_tokens()
        output = model(tokens)
        e = model.embedding(tokens)
        assert not torch.allclose(output.context, e)
        for name in NAMES:
            assert torch.equal(output.expert_hidden[name], model.experts[name](e))


class TestStructure:
    def test_output_shapes_and_names(self):
        output = build()(some_tokens())
        assert isinstance(output, LMOutput)
        assert output.logits.shape == (2, LENGTH, VOCAB)
        assert output.logits.dtype == output.weights.dtype == torch.float32
        assert output.weights.shape == (2, LENGTH, 3)
        assert list(output.expert_hidden) == NAMES
        torch.testing.assert_close(output.weights.sum(-1), torch.ones(2, LENGTH))
        for memory in (some_memory(k=0), some_memory(k=1), some_memory(k=4)):
            assert build(memory=True)(some_tokens(), memory=memory).logits.shape == (2, LENGTH, VOCAB)

    def test_head_is_the_embedding_and_nothing_else(self):
        model = build()
        inside = [model.mla, model.router, *model.experts.values()]
        counted = sum(p.numel() for part in inside for p in part.parameters())
        assert sum(p.numel() for p in model.parameters()) == counted + VOCAB * D + 3
        tokens = some_tokens()
        before = model(tokens).logits
        with torch.no_grad():
            model.embedding.weight[VOCAB - 1] += 1.0
        assert not torch.equal(model(tokens).logits[..., VOCAB - 1], before[..., VOCAB - 1])
        clone = build(audit=True)
        clone.load_state_dict(model.state_dict())
        assert torch.equal(clone(tokens).logits, model(tokens).logits)

    def test_stages_run_in_order_and_once(self):
        model, calls = build(memory=True), []
        stages = {"embedding": model.embedding, "mla": model.mla, "router": model.router, **model.experts}
        for name, stage in stages.items():
            stage.register_forward_hook(lambda *_, name=name: calls.append(name))
        output = model(some_tokens(), memory=some_memory())
        assert calls == ["embedding", "mla", *NAMES, "router"]
        assert torch.equal(model.router(output.context), output.weights)

    def test_forward_is_pure(self):
        model, tokens = build(memory=True, audit=True), some_tokens()
        memory, state = some_memory(), torch.get_rng_state()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        first, second = (model(tokens, memory=memory).logits for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_without_logits_nothing_else_changes(self):
        model, tokens = build(audit=True), some_tokens()
        short, full = model(tokens, with_logits=False), model(tokens)
        assert short.logits is None
        assert torch.equal(short.hidden, full.hidden)
        assert torch.equal(short.weights, full.weights)

    def test_minimal_model_and_bad_arguments(self):
        model = NanoThink({"only": Recurrent(D)}, VOCAB, D)
        assert model(some_tokens()).weights.unique().tolist() == [1.0]
        for wrong, message in [
            ({"experts": {}}, "at least one"),
            ({"experts": {"mla": Recurrent(D)}}, "decode state"),
            ({"fusion": "sum"}, "fusion must"),
            ({"expert_input": "both"}, "expert_input must"),
            ({"tables": {"x": nn.Embedding(2, D)}}, "unknown experts"),
        ]:
            with pytest.raises(ValueError, match=message):
                NanoThink(**{"experts": parts(), "vocab_size": VOCAB, "d_model": D, **wrong})


class TestLeaks:
    @pytest.mark.parametrize("fusion", ["hidden", "prob"])
    @pytest.mark.parametrize("filled", [False, True])
    def test_a_later_token_changes_later_outputs_only(self, fusion, filled):
        model = build(memory=True, audit=True, fusion=fusion)
        tokens, memory = some_tokens(), some_memory() if filled else None
        before = model(tokens, memory=memory)
        for t in (1, 4, LENGTH - 1):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 1) % VOCAB
            after = model(changed, memory=memory)
            for name in ("logits", "weights", "context"):
                a, b = getattr(before, name), getattr(after, name)
                assert torch.equal(a[:, :t], b[:, :t]), name
                assert (a[:, t:] != b[:, t:]).any(-1).all(), name

    def test_slots_matter_to_their_tokens_and_to_later_ones(self):
        model, tokens, memory = build(memory=True, audit=True), some_tokens(), some_memory()
        before = model(tokens, memory=memory)
        values = memory.values.clone()
        values[:, 1] += 1.0
        after = model(tokens, memory=replace(memory, values=values))
        assert torch.equal(before.logits[:, :6], after.logits[:, :6])
        assert (before.logits[:, 6:] != after.logits[:, 6:]).any(-1).all()

    def test_empty_memory_is_no_memory_bit_for_bit(self):
        model, tokens, memory = build(memory=True, audit=True), some_tokens(), some_memory()
        empty = replace(memory, valid=torch.zeros_like(memory.valid))
        assert torch.equal(model(tokens, memory=empty).logits, model(tokens).logits)
        assert not torch.allclose(model(tokens, memory=memory).logits, model(tokens).logits)

    def test_packed_documents_equal_separate_ones(self):
        model, tokens = build(audit=True), some_tokens(rows=1)
        together = model(tokens, packed([4, 5]))
        for part in (slice(0, 4), slice(4, 9)):
            alone = model(tokens[:, part])
            torch.testing.assert_close(together.logits[:, part], alone.logits, **CLOSE)
            torch.testing.assert_close(together.weights[:, part], alone.weights, **CLOSE)

    def test_rows_do_not_meet(self):
        model, tokens = build(audit=True), some_tokens(rows=3)
        torch.testing.assert_close(model(tokens[1:2]).logits, model(tokens).logits[1:2], **CLOSE)


class TestTraining:
    def test_gradients_reach_everything_trainable_through_frozen_experts(self):
        model = build(memory=True, audit=True, fusion="prob")
        model.freeze_experts()
        tokens = some_tokens()
        for fusion in ("hidden", "prob"):
            model.fusion = fusion
            model.zero_grad()
            model.token_nll(tokens, some_labels(tokens), memory=some_memory()).mean().backward()
            for name, parameter in model.named_parameters():
                if name.startswith("experts."):
                    assert parameter.grad is None, name
                else:
                    assert parameter.grad.isfinite().all(), name
                    assert parameter.grad.abs().sum() > 0, name

    def test_frozen_experts_stay_frozen_and_in_eval_mode(self):
        model, tokens = build(), some_tokens()
        model.freeze_experts()
        model.train()
        assert model.mla.training
        assert not any(part.training for part in model.experts.modules())
        assert torch.equal(model(tokens).logits, model(tokens).logits)
        before = [p.clone() for p in model.experts.parameters()]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model.token_nll(tokens, some_labels(tokens)).mean().backward()
        assert model.embedding.weight.grad.abs().sum() > 0
        assert model.mla.attention.out_proj.weight.grad.abs().sum() > 0
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, model.experts.parameters(), strict=True))

    def test_experts_train_like_any_module_before_freezing(self):
        model = build()
        model.train()
        assert all(expert.training for expert in model.experts.values())

    @pytest.mark.parametrize("fusion", ["hidden", "prob"])
    def test_nll_matches_token_nll_and_ignores_masked_labels(self, fusion):
        model, tokens = build(audit=True, fusion=fusion), some_tokens(rows=8)
        labels = some_labels(tokens)
        output = model(tokens, with_logits=False)
        assert torch.equal(model.nll(output, labels), model.token_nll(tokens, labels))
        assert (model.nll(output, torch.full_like(labels, -100)) == 0).all()


class TestDecoding:
    @pytest.mark.parametrize("fusion", ["hidden", "prob"])
    def test_cached_equals_full_at_every_prefill_length(self, fusion):
        model, tokens, memory = build(memory=True, audit=True, fusion=fusion), some_tokens(), some_memory()
        full = model(tokens, memory=memory)
        for prefill in range(1, LENGTH):
            state, outputs = model.init_state(2, LENGTH), []
            for part in [slice(0, prefill), *(slice(t, t + 1) for t in range(prefill, LENGTH))]:
                own = replace(memory, index=memory.index[:, part])
                outputs.append(model.extend(tokens[:, part], state, own))
            for name in ("logits", "weights", "context"):
                got = torch.cat([getattr(o, name) for o in outputs], dim=1)
                torch.testing.assert_close(got, getattr(full, name), **CLOSE)

    @pytest.mark.parametrize("fusion", ["hidden", "prob"])
    def test_logits_of_the_last_token_alone(self, fusion):
        model, tokens = build(audit=True, fusion=fusion), some_tokens()
        full, state = model(tokens), model.init_state(2, LENGTH)
        last = model.extend(tokens, state, last_only=True)
        torch.testing.assert_close(last.logits, full.logits[:, -1:], **CLOSE)
        torch.testing.assert_close(last.weights, full.weights, **CLOSE)
        if fusion == "hidden":
            torch.testing.assert_close(last.hidden, full.hidden[:, -1:], **CLOSE)

    def test_random_programs_of_extend_rollback_and_reorder_equal_recomputation(self):
        model, rng = build(audit=True), random.Random(0)
        state, read = model.init_state(2, 40, max_rollback=4), torch.empty(2, 0, dtype=torch.int64)
        for step in range(25):
            n = rng.randint(1, 5)
            new = some_tokens(length=n, seed=step)
            if state.length + n > 40:
                break
            read = torch.cat((read, new), dim=1)
            got = model.extend(new, state).logits
            torch.testing.assert_close(got, model(read).logits[:, -n:], **CLOSE)
            back = rng.randint(0, min(4, n))
            state.rollback(back)
            read = read[:, : read.shape[1] - back]
            if rng.random() < 0.3:
                state.reorder(torch.tensor([1, 0]))
                read = read[[1, 0]]
            assert state.length == read.shape[1]

    def test_each_step_feeds_one_position_to_every_part(self):
        model, seen = build(), {}
        for name, part in {"mla": model.mla, "router": model.router, **model.experts}.items():

            def watched(x, *args, name=name, extend=part.extend):
                seen.setdefault(name, []).append(x.shape[1])
                return extend(x, *args)

            part.extend = watched
        state = model.init_state(1, 8)
        for n in (4, 1, 1):
            model.extend(some_tokens(rows=1, length=n), state)
        assert seen == {name: [4, 1, 1] for name in ("mla", "router", *NAMES)}

    def test_cache_bytes_follow_the_formula(self):
        model = build()
        state = model.init_state(2, 12)
        model.extend(some_tokens(length=5), state)
        latent, rope, layers = D // 3, D // 2 // 2, 2
        per_token = latent + rope + layers * 2 * D
        constant = (3 + 1) + 2 * D  # router sum and count, two recurrent experts
        assert state.num_bytes == 4 * 2 * (5 * per_token + constant)
        assert set(state.states) == {"mla", "router", *NAMES}

    def test_knock_out_and_forced_weights_while_decoding(self):
        model, tokens = build(audit=True), some_tokens()
        forced = torch.tensor([0.1, 0.2, 0.7])
        for options in ({"knock_out": ["recurrent"]}, {"weights": forced}):
            state = model.init_state(2, LENGTH)
            parts_ = [model.extend(part, state, **options).logits for part in tokens.split([5, 1, 3], dim=1)]
            torch.testing.assert_close(torch.cat(parts_, dim=1), model(tokens, **options).logits, **CLOSE)


@pytest.mark.parametrize("fusion", ["hidden", "prob"])
def test_a_model_in_bf16_throughout_decodes(expert_lm, fusion) -> None:
    """Routing and mixing stay fp32 inside; 0.05 of the logits' range."""
    experts = {name: expert_lm(name, i).expert for i, name in enumerate(("transformer", "state_space"))}
    model = NanoThink(
        experts, 259, 32, mla=partial(MultiHeadLatentAttention, num_heads=2), fusion=fusion
    ).eval()
    tokens = torch.randint(259, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(tokens).logits
        model.bfloat16()
        got = model(tokens).logits
        state = model.init_state(2, 9)
        steps = torch.cat([model.extend(tokens[:, t : t + 1], state).logits for t in range(9)], dim=1)
    for logits in (got, steps):
        assert float((logits - want).abs().max()) <= 0.05 * float(want.max() - want.min())
