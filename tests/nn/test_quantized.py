"""Coarse weights: what is stored, what is computed of it, what stays as it was, and that the audit passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from nano_think.errors import UserError
from nano_think.evals.audit.live import live_copy, strengthened
from nano_think.evals.audit.plan import Plan
from nano_think.evals.audit.run import audit
from nano_think.mla import MultiHeadLatentAttention
from nano_think.model import NanoThink
from nano_think.nn.quantized import CoarseEmbedding, CoarseLinear, CoarseMatrix, Kind, quantize, weight_bytes

KINDS: tuple[Kind, ...] = ("int8", "bf16")
EXPERTS = ("transformer", "state_space", "diffuser")


@pytest.fixture
def expert(expert_lm) -> Callable[[str], nn.Module]:
    """A stand-alone expert with every path alive, in eval mode."""
    return lambda name: strengthened(live_copy(expert_lm(name))[0])


@pytest.fixture
def mixture(expert_lm) -> Callable[[], NanoThink]:
    """All three experts behind an MLA."""

    def make() -> NanoThink:
        experts = {name: expert_lm(name, seed).expert for seed, name in enumerate(EXPERTS)}
        model = NanoThink(experts, 259, 32, mla=partial(MultiHeadLatentAttention, num_heads=2, memory=True))
        return strengthened(live_copy(model)[0])

    return make


def tokens(rows: int = 2, length: int = 20) -> Tensor:
    return torch.randint(259, (rows, length), generator=torch.Generator().manual_seed(1))


def rounded(weight: Tensor, kind: Kind) -> Tensor:
    """The formula, written apart."""
    if kind == "bf16":
        return weight.bfloat16().float()
    rows = []
    for row in weight.tolist():
        scale = max(abs(value) for value in row) / 127
        rows.append([round(value / scale) * scale if scale else 0.0 for value in row])
    return torch.tensor(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_is_the_formula(kind: Kind) -> None:
    weight = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    matrix, x = CoarseMatrix(weight, kind), torch.randn(2, 3, 12)
    want = rounded(weight, kind)
    torch.testing.assert_close(matrix.dense(), want, atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix.product(x), x @ want.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(matrix.pick(torch.tensor([[6, 3]])), want[[6, 3]].unsqueeze(0))


def test_int8_is_within_half_a_step_of_every_row() -> None:
    weight = torch.randn(50, 30) * torch.logspace(-3, 3, 50).unsqueeze(1)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((CoarseMatrix(weight, "int8").dense() - weight).abs() <= 0.501 * step).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXPERTS)
@torch.no_grad()
def test_an_expert_equals_the_plain_one_with_rounded_weights(expert, name: str, kind: Kind) -> None:
    plain = expert(name)
    coarse = quantize(copy.deepcopy(plain), kind)
    for module in plain.modules():
        if type(module) is nn.Embedding or (type(module) is nn.Linear and module.bias is None):
            module.weight.copy_(rounded(module.weight, kind))
    torch.testing.assert_close(coarse(tokens()).logits, plain(tokens()).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_mixture_decodes_what_it_reads_in_one_pass(mixture, kind: Kind) -> None:
    model = quantize(mixture(), kind)
    whole = model(tokens())
    state = model.init_state(2, 20)
    parts = [model.extend(piece, state) for piece in tokens().split([11, 1, 1, 7], dim=1)]
    torch.testing.assert_close(torch.cat([p.logits for p in parts], 1), whole.logits, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(torch.cat([p.weights for p in parts], 1), whole.weights, atol=1e-4, rtol=0)


@torch.no_grad()
def test_losses_follow_the_logits(mixture) -> None:
    model, labels = quantize(mixture(), "int8"), tokens().roll(-1, 1)
    want = -model(tokens()).logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(model.token_nll(tokens(), labels), want, atol=1e-4, rtol=1e-4)


def test_what_decides_over_long_times_stays_as_it_was(mixture) -> None:
    plain = mixture()
    model = quantize(copy.deepcopy(plain), "int8")
    kept, before = dict(model.named_parameters()), dict(plain.named_parameters())
    for part in ("router.weight", "experts.state_space.blocks.0.mixer.dt_weight"):
        assert torch.equal(kept[part], before[part])
    for part in ("mixer.A_log", "mixer.D", "mixer.conv_weight", "mixer_norm.weight"):
        name = f"experts.state_space.blocks.0.{part}"
        assert torch.equal(kept[name], before[name])
    left = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    levels = "experts.diffuser.denoiser"
    assert left == {f"{levels}.time.hidden", f"{levels}.time.output", f"{levels}.modulation"}
    assert isinstance(model.embedding, CoarseEmbedding)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_shared_table_stays_shared(expert_lm) -> None:
    one = expert_lm("transformer")
    both = nn.ModuleList([one, expert_lm("state_space", table=one.embedding)])
    quantize(both, "int8")
    assert both[0].embedding is both[1].embedding
    pair = nn.Module()
    pair.a = pair.b = nn.Linear(3, 3, bias=False)
    quantize(pair, "bf16")
    assert pair.a is pair.b
    assert isinstance(pair.b, CoarseLinear)


def test_bytes_shrink_to_a_quarter_and_a_half(expert_lm) -> None:
    full = weight_bytes(expert_lm("transformer"))
    assert full == 4 * sum(parameter.numel() for parameter in expert_lm("transformer").parameters())
    assert 1.9 < full / weight_bytes(quantize(expert_lm("transformer"), "bf16")) < 2
    assert 3 < full / weight_bytes(quantize(expert_lm("transformer"), "int8")) < 4


def test_bad_input_is_named(expert_lm) -> None:
    with pytest.raises(ValueError, match="int8, bf16, not 'int4'"):
        quantize(expert_lm("transformer"), "int4")  # type: ignore[arg-type]
    broken = expert_lm("transformer")
    with torch.no_grad():
        broken.expert.blocks[1].ffn.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"expert\.blocks\.1\.ffn\.up_proj holds weights .* not finite"):
        quantize(broken, "int8")


@pytest.mark.parametrize("kind", KINDS)
def test_the_audit_passes(mixture, kind: Kind) -> None:
    """On a mixture whose paths all carry signal; a planted leak in the same model is found."""
    checks = ("A1", "A2", "A3", "A4", "A5", "A6")
    model = quantize(mixture(), kind)
    plan = Plan(259, length=29, border=8)
    found = {finding.check: finding.verdict for finding in audit(model, plan=plan, checks=checks).findings}
    assert found == dict.fromkeys(checks, "pass")


def test_the_audit_finds_a_scale_over_the_sequence(expert) -> None:
    """Activations rounded with one scale a tensor, the mistake that this module does not make."""

    class PerTensor(CoarseLinear):
        def forward(self, x: Tensor) -> Tensor:
            scale = x.abs().max() / 127
            return super().forward((x / scale).round() * scale)

    model = quantize(expert("transformer"), "int8")
    model.expert.blocks[0].ffn.up_proj.__class__ = PerTensor
    plan = Plan(259, length=29, border=8)
    found = {f.check: f.verdict for f in audit(model, plan=plan, checks=("A1", "A5")).findings}
    assert found == {"A1": "fail", "A5": "fail"}
