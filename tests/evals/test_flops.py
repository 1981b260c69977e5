"""Counts equal those of torch's counter, on the plain paths: it sees no kernel of ours and no fused attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import nano_think.model as model_module
import nano_think.tasks.denoise as denoise_module
from nano_think.evals.flops import (
    ADAMW_FLOPS,
    both_ways,
    filling_flops,
    forward_flops,
    optimizer_flops,
    training_flops,
)
from nano_think.experts.diffuser import DiffuserExpert
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.mla import ExpertRouter, MultiHeadLatentAttention
from nano_think.model import ExpertLM, NanoThink
from nano_think.nn.flops import Product, Reach, products_of
from nano_think.nn.mixers.attention import CausalSelfAttention
from nano_think.nn.mixers.latent_attention import LatentAttention
from nano_think.nn.mixers.s6 import S6
from nano_think.nn.mixers.ssd import SSD
from nano_think.ops import attention_cpp
from nano_think.ops.cross_entropy import linear_cross_entropy_reference
from nano_think.ops.layout import Layout
from nano_think.ops.selective_scan import ScanInputs, reference_scan
from nano_think.optim.groups import adamw
from nano_think.optim.muon import muon
from nano_think.tasks.route import set_trainable

V, D, L, ROWS = 259, 32, 12, 3
SQUARE = {"causal": False}


@contextmanager
def counted() -> Iterator[SimpleNamespace]:
    """What torch counts inside, over one row, on paths made of plain products: `.flops` a token of ROWS rows."""
    found = SimpleNamespace()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield found
    found.total = counter.get_total_flops()
    found.flops = found.total / (ROWS * L)


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    """Torch counts its own products alone, so no compiled kernel may do them."""
    monkeypatch.setenv("NANO_THINK_SCAN", "ref")
    monkeypatch.setattr(attention_cpp, "fits", lambda *_: False)
    monkeypatch.setattr(
        model_module, "linear_cross_entropy", lambda h, w, y, **_: linear_cross_entropy_reference(h, w, y)
    )


def seen(products: Iterator[Product]) -> float:
    """The part of the products that torch's counter knows."""
    return sum(product.flops for product in products if not product.elementwise)


def some_tokens(seed: int = 0) -> Tensor:
    return torch.randint(V, (ROWS, L), generator=torch.Generator().manual_seed(seed))


def slots_of(chunk: int, k: int) -> SimpleNamespace:
    """Full memory slots of every chunk but the first."""
    groups = -(-L // chunk) - 1
    index = (torch.arange(L) // chunk - 1).expand(ROWS, L)
    values = torch.randn(ROWS, groups, k, D, generator=torch.Generator().manual_seed(1))
    valid = torch.ones(ROWS, groups, k, dtype=torch.bool)
    return SimpleNamespace(values=values, valid=valid, index=index, scores=None)


MIXERS = {
    "attention": partial(CausalSelfAttention, num_heads=4),
    "grouped": partial(CausalSelfAttention, num_heads=4, num_kv_heads=2, head_dim=6),
    "latent": partial(LatentAttention, num_heads=4, latent_dim=10, rope_dim=6),
    "full": partial(LatentAttention, num_heads=2, kv="full"),
    "bottleneck": partial(LatentAttention, num_heads=2, kv="seed_bottleneck", latent_dim=5),
    "s6": partial(S6, d_inner=48, d_state=5),
    "s6 without gate": partial(S6, gate=False, dt_rank=3),
    "ssd": partial(SSD, d_inner=64, d_state=7, head_dim=16),
}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("length", [L, 70])
def test_every_mixer_as_torch_counts_it(name, length):
    """Forward, and forward with backward: every factor has a gradient. 70: a chunk and a piece of SSD."""
    mixer = MIXERS[name](d_model=D)
    x = torch.randn(1, length, D, requires_grad=True)
    layout = Layout(torch.arange(length).unsqueeze(0), torch.zeros(1, length, dtype=torch.int64))
    products = list(products_of(mixer, Reach(length, causal=False)))
    with counted() as found:
        out = mixer(x, layout)
    assert found.total / length == pytest.approx(seen(products))
    with counted() as found:
        mixer(x, layout).sum().backward()
    ids = {id(parameter) for parameter in mixer.parameters()}
    plain = [product for product in products if not product.elementwise]
    assert found.total / length == pytest.approx(both_ways(plain, True, ids, recompute=False)[0])
    assert out.shape == x.shape


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_costs_what_autograd_does_where_it_is_frozen(name):
    mixer = MIXERS[name](d_model=D).requires_grad_(False)
    x = torch.randn(ROWS, L, D, requires_grad=True)
    with counted() as found:
        mixer(x, Layout.of(x, None)).sum().backward()
    plain = [p for p in products_of(mixer, Reach(L, causal=False)) if not p.elementwise]
    assert found.flops == pytest.approx(both_ways(plain, True, (), recompute=False)[0])


def test_causal_attention_meets_half_of_the_keys_and_its_own():
    """A query of position t meets t + 1 keys: by hand over all positions."""
    mixer = CausalSelfAttention(D, 4)
    met = sum(t + 1 for t in range(L)) / L
    projections = 4 * 2 * D * D
    assert sum(p.flops for p in products_of(mixer, Reach(L))) == projections + 2 * 2 * D * met
    mean = (3 * 3 + 9 * 9) / 12  # documents of 3 and of 9 tokens, by token
    both = (3 * sum(t + 1 for t in range(3)) / 3 + 9 * sum(t + 1 for t in range(9)) / 9) / 12
    assert Reach(mean).keys == pytest.approx(both)


class Elementwise(TorchDispatchMode):
    """Counts multiplications, additions and products of the tensors' own numbers; exponentials are free."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor):
            self.flops += out.numel()
        elif func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
            self.flops += 2 * out.numel() * args[0].shape[-1]
        return out


def test_the_scan_is_counted_operation_by_operation():
    d, n = 6, 5
    mixer = S6(D, d_inner=d, d_state=n)
    x, dt, B, C = (torch.rand(ROWS, L, size) for size in (d, d, n, n))
    inputs = ScanInputs(x, dt, -torch.rand(d, n), B, C, torch.rand(d))
    with Elementwise() as counter:
        reference_scan(inputs, None, torch.zeros(ROWS, d, n))
    scan = [p for p in products_of(mixer, Reach(L)) if p.flops and p.weight is None]
    assert counter.flops / (ROWS * L) == sum(p.flops for p in scan) == 6 * d * n + 3 * d


def test_the_convolution_is_a_multiply_add_a_tap():
    mixer, x = S6(D, d_inner=6, d_conv=3), torch.rand(ROWS, 6, L + 2)
    with counted() as found:
        nn.functional.conv1d(x, torch.rand(6, 1, 3), groups=6)
    [conv] = [p for p in products_of(mixer, Reach(L)) if p.weight is mixer.conv_weight]
    assert conv.flops == found.flops == 2 * 3 * 6


def experts(steps: int = 2, grad: str = "last") -> dict[str, nn.Module]:
    """One of each kind; the diffuser in two passes, the last of which has a gradient."""
    diffuser = DiffuserExpert(D, 2, 2, 24, train_T=20, fused_steps=steps, grad=grad, dropout=0.0)
    diffuser.stats_ready.fill_(True)
    mixed = TransformerExpert(D, 2, 2, 40, 0.0, mixer=partial(S6, d_inner=20, d_state=3))
    return {"transformer": TransformerExpert(D, 2, 4, 40, 0.0), "diffuser": diffuser, "mixed": mixed}


def fused(**options) -> NanoThink:
    torch.manual_seed(0)
    mla = partial(MultiHeadLatentAttention, num_heads=2, memory=True)
    return NanoThink(experts(), V, D, **{"mla": mla, **options})


def unseen(network: nn.Module, backward: bool = True) -> float:
    """What torch's counter cannot see of a pass, or of both passes with a gradient for every input."""
    total = 0.0
    for module in network.modules():
        if isinstance(module, S6):
            products = [product for product in module.products(Reach(L)) if product.elementwise]
            trained = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
            both, _ = both_ways(products, True, trained, recompute=False)
            total += both if backward else sum(product.flops for product in products)
    return total


@pytest.mark.parametrize("name", ["transformer", "diffuser", "mixed"])
@pytest.mark.parametrize("frozen_table", [False, True])
def test_expert_forward_and_step_as_torch_counts_them(name, frozen_table):
    network = ExpertLM((V, D), experts()[name])
    network.embedding.requires_grad_(not frozen_table)
    options = {"causal": False, "tokens": ROWS * L}
    with counted() as found, torch.no_grad():
        network(some_tokens())
    forward = forward_flops(network, L, **options)
    assert list(forward) == ["embedding", "expert", "head"]
    assert found.flops == pytest.approx(sum(forward.values()) - unseen(network, False))
    assert (forward["embedding"], forward["head"]) == (0, 2 * D * V)
    with counted() as found:
        network.token_nll(some_tokens(), some_tokens(1)).sum().backward()
    expected = training_flops(network, L, recompute=False, **options)
    assert found.flops == pytest.approx(expected - unseen(network))


@pytest.mark.parametrize("kind", [TransformerExpert, StateSpaceExpert, DiffuserExpert])
def test_an_entry_adaptor_is_counted_where_there_is_one(kind):
    """A square matrix: a product forward, two backward. Torch counts the same difference."""
    counts, stated = [], []
    for adaptor in (True, False):
        heads = {} if kind is StateSpaceExpert else {"num_heads": 2}
        expert = kind(D, 2, dropout=0.0, adaptor=adaptor, **heads)
        network = ExpertLM((V, D), expert)
        if kind is DiffuserExpert:
            expert.stats_ready.fill_(True)
        with counted() as found:
            network.token_nll(some_tokens(), some_tokens(1)).sum().backward()
        options = {"causal": False, "tokens": ROWS * L}
        counts.append((sum(p.numel() for p in network.parameters()), found.flops))
        stated.append(training_flops(network, L, recompute=False, **options))
        assert forward_flops(network, L, **options)["expert"] > 0
    assert counts[0][0] - counts[1][0] == D * D
    assert counts[0][1] - counts[1][1] == pytest.approx(3 * 2 * D * D)
    assert stated[0] - stated[1] == pytest.approx(3 * 2 * D * D)


@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("grad", ["last", "all", "none"])
def test_denoising_passes(steps, grad):
    """Frozen, between a table that is trained and the head: stage 7c in small."""
    expert = experts(steps, grad)["diffuser"].requires_grad_(False)
    network, options = ExpertLM((V, D), expert), {"causal": False, "tokens": ROWS * L}
    with counted() as found:
        network.token_nll(some_tokens(), some_tokens(1)).sum().backward()
    assert found.flops == pytest.approx(training_flops(network, L, recompute=False, **options))
    one, many = (forward_flops(network, L, passes=passes)["expert"] for passes in (1, steps))
    a_pass = sum(product.flops for product in expert.denoiser.pass_products(Reach(L)))
    assert many - one == pytest.approx((steps - 1) * a_pass)


def test_the_cost_of_a_diffuser_by_hand():
    """Clean stream: maps in, all of the blocks but what follows the last keys and values. Noisy: all but those."""
    d, f, layers, V_ = 8, 12, 3, 20
    network = ExpertLM((V_, d), DiffuserExpert(d, layers, 2, f, train_T=9))
    keys, modulation, time = (L + 1) / 2, 2 * 6 * d * d, 2 * 256 * d + 2 * d * d
    queries = 2 * d * d + 2 * 2 * d * keys + 2 * d * d + 3 * 2 * d * f
    clean = 2 * 2 * d * d + layers * 2 * 2 * d * d + (layers - 1) * queries + modulation / L
    noisy = 2 * d * d + layers * queries + 2 * d * d + (time + modulation) / L
    for steps in (1, 4, 10):
        counted_here = forward_flops(network, L, passes=steps)["expert"]
        assert counted_here == pytest.approx(clean + steps * noisy)


@pytest.mark.parametrize("target", ["hidden_same", "next_embed"])
@pytest.mark.parametrize("self_cond", [False, True])
@pytest.mark.parametrize("train_T", [20, 100])
def test_the_denoising_objective_as_torch_counts_it(objective, target, self_cond, train_T):
    """Teacher, clean stream, one noisy pass at levels of every position's own, head."""
    task = objective("diffuser", network={"target": target, "self_cond": self_cond, "train_T": train_T})
    [teacher] = task._frozen
    batch = {"tokens": some_tokens(), "labels": some_tokens(1), "segments": torch.zeros(ROWS, L).long()}
    batch["positions"] = torch.arange(L).expand(ROWS, L)
    with pytest.MonkeyPatch.context() as patch, counted() as found:
        patch.setattr(denoise_module, "linear_cross_entropy", linear_cross_entropy_reference)
        task.batch_loss(batch)["loss"].backward()
    options = {"causal": False, "tokens": ROWS * L, "recompute": False, "teacher": teacher}
    assert found.flops == pytest.approx(training_flops(task.network, L, **options))
    without_head = training_flops(task.network, L, cross_entropy=False, **options)
    table = task.network.embedding.weight
    assert training_flops(task.network, L, **options) - without_head == pytest.approx(2 * 2 * table.numel())


@pytest.mark.parametrize("fusion", ["hidden", "prob"])
@pytest.mark.parametrize("expert_input", ["context", "raw"])
def test_the_fused_model_forward_as_torch_counts_it(fusion, expert_input):
    network = fused(fusion=fusion, expert_input=expert_input)
    with counted() as found, torch.no_grad():
        network(some_tokens())
    forward = forward_flops(network, L, causal=False, tokens=ROWS * L)
    mixing = 0 if fusion == "prob" else 2 * 3 * D
    assert forward["fusion"] == mixing
    assert found.flops == pytest.approx(sum(forward.values()) - mixing - unseen(network, False))
    assert forward["head"] == 2 * D * V * (3 if fusion == "prob" else 1)
    assert (forward["router"], forward["search"]) == (2 * 3 * D, 0)


@pytest.mark.parametrize("stage", ["7b", "7c", "7d"])
@pytest.mark.parametrize("fusion", ["hidden", "prob"])
def test_every_stage_as_torch_counts_it(stage, fusion):
    network = fused(fusion=fusion)
    network.freeze_experts()
    names = set_trainable(network, stage)
    memory = slots_of(chunk=4, k=3) if stage == "7d" else None
    options = {"causal": False, "tokens": ROWS * L, "slots": 3 if stage == "7d" else 0, "chunk": 4}
    with counted() as found:
        network.token_nll(some_tokens(), some_tokens(1), memory=memory).sum().backward()
    expected = training_flops(network, L, recompute=False, **options)
    not_seen = unseen(network, backward=stage != "7b") + (0 if fusion == "prob" else 3 * 2 * 3 * D)
    not_seen += forward_flops(network, L, **options)["search"]
    assert found.flops == pytest.approx(expected - not_seen)
    assert expected == training_flops(network.requires_grad_(True), L, names, recompute=False, **options)


@pytest.mark.parametrize("unfreeze", ["adapters", "all"])
def test_experts_that_7c_trains_too_as_torch_counts_them(unfreeze):
    network = fused()
    network.freeze_experts()
    set_trainable(network, "7c", unfreeze)
    options = {"causal": False, "tokens": ROWS * L, "recompute": False}
    with counted() as found:
        network.token_nll(some_tokens(), some_tokens(1)).sum().backward()
    expected = training_flops(network, L, **options)
    assert found.flops == pytest.approx(expected - unseen(network) - 3 * 2 * 3 * D)
    set_trainable(network, "7c")
    assert expected > training_flops(network, L, **options)


@pytest.mark.parametrize(("chunk", "k"), [(4, 3), (1, 2)])
def test_a_memory_reader_of_its_own_as_torch_counts_it(chunk, k):
    """It alone is trained: no gradient for what it asks with, one for all that follows it."""
    mla = partial(MultiHeadLatentAttention, num_heads=2, memory=True, slot_reader="own")
    network, memory = fused(mla=mla), slots_of(chunk, k)
    options = {"causal": False, "tokens": ROWS * L, "slots": k, "chunk": chunk}
    forward, mixing = forward_flops(network, L, **options), 2 * 3 * D
    with counted() as found, torch.no_grad():
        network(some_tokens(), memory=memory)
    assert found.flops == pytest.approx(
        sum(forward.values()) - forward["search"] - mixing - unseen(network, False)
    )
    network.freeze_experts()
    set_trainable(network, "7d")
    with counted() as found:
        network.token_nll(some_tokens(), some_tokens(1), memory=memory).sum().backward()
    expected = training_flops(network, L, recompute=False, **options)
    assert found.flops == pytest.approx(expected - forward["search"] - unseen(network) - 3 * mixing)
    # what a token sees: the first chunk of a document sees nothing
    seen = forward_flops(network, L, **options | {"causal": True})["mla"]
    blind = forward_flops(network, L, **options | {"causal": True, "slots": 0})["mla"]
    groups = L // chunk - 1
    projections = 2 * 2 * D * D + 2 * 2 * D * D * groups * k / L
    assert seen - blind == pytest.approx(projections + 2 * 2 * D * k * (1 - chunk / L))


@pytest.mark.parametrize("fusion", ["hidden", "prob"])
def test_stage_7b_without_what_is_kept(fusion):
    """Kept and computed parts together are the whole; of probabilities the heads are kept as well."""
    network = fused(fusion=fusion)
    network.freeze_experts()
    set_trainable(network, "7b")
    whole = training_flops(network, L)
    assert training_flops(network, L, cached=True) + filling_flops(network, L) == pytest.approx(whole)
    router = 2 * 2 * 3 * D
    left = router if fusion == "prob" else router + 3 * 2 * 3 * D + 2 * 2 * D * V
    assert training_flops(network, L, cached=True) == left


def test_memory_by_hand():
    """Slots are projected once a chunk, met by the tokens that see them, and looked up by chunk."""
    network, chunk, k, length, records = fused(), 16, 4, 64, 1000
    network.mla.attention.slots.requires_grad_(False)
    without, options = forward_flops(network, length), {"slots": k, "chunk": chunk, "records": records}
    with_memory = forward_flops(network, length, **options)
    heads, width, value_width, latent = 2, 16 + 8, 16, D // 3
    vectors = 3 * k + 1  # three chunks have slots; one null slot
    expansion = 2 * D * latent + 2 * 2 * latent * D
    met = 2 * heads * (width + value_width) * (k + 1) * 48 / 64  # the first chunk sees nothing
    extra = vectors / length * expansion + met
    assert with_memory["mla"] - without["mla"] == pytest.approx(extra)
    query = 2 * D * chunk + 4 * D + 2 * D * records
    assert with_memory["search"] == pytest.approx(3 * query / length)
    half = forward_flops(network, length, readers=0.5, **options)
    assert half["mla"] - without["mla"] == pytest.approx(extra / 2)
    assert half["search"] == with_memory["search"]
    assert forward_flops(network, 16, **options) == forward_flops(network, 16)  # a single chunk


def test_what_is_computed_again_is_scores_states_and_logits_of_a_trained_table():
    def again(network, **options):
        return training_flops(network, L, **options) - training_flops(network, L, recompute=False, **options)

    network = ExpertLM((V, D), experts()["mixed"])
    assert again(network) == 2 * 4 * 20 * 3
    transformer = ExpertLM((V, D), experts()["transformer"])
    assert again(transformer) == pytest.approx(2 * 2 * D * (L + 1) / 2)
    assert again(transformer, trained=()) == 0
    pool = fused(fusion="prob")
    trained = [name for name, _ in pool.named_parameters() if not name.startswith("embedding")]
    assert again(pool) - again(pool, trained=trained) == pytest.approx(3 * 2 * D * V)


def test_optimizers_as_torch_counts_them():
    """Muon's products by torch's counter, AdamW's steps by 13 a parameter."""
    network = nn.ModuleDict({"wide": nn.Linear(24, 40, bias=False), "square": nn.Linear(16, 16)})
    optimizer = muon(network, lr=0.1, weight_decay=0.1)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    products = counter.get_total_flops()
    assert products == 5 * (4 * 24**2 * 40 + 2 * 24**3) + 5 * (4 * 16**3 + 2 * 16**3)
    assert optimizer_flops(optimizer) == products + ADAMW_FLOPS * 16
    assert optimizer_flops(adamw(network, 0.1, 0.1)) == ADAMW_FLOPS * (24 * 40 + 16 * 16 + 16)


class Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d_model, self.weight = D, nn.Parameter(torch.zeros(D, D))


class Forgetful(Silent):
    def products(self, reach):
        yield Product(0.0, cut=True)


def test_nothing_is_silently_free():
    with pytest.raises(ValueError, match="Silent has parameters and does not say"):
        forward_flops(ExpertLM((V, D), Silent()), L)
    with pytest.raises(ValueError, match=r"what is computed with expert\.weight"):
        forward_flops(ExpertLM((V, D), Forgetful()), L)
    with pytest.raises(ValueError, match="not of a Linear"):
        forward_flops(nn.Linear(2, 2), L)


def test_private_tables_and_the_meta_device():
    with torch.device("meta"):
        parts = {"mixed": experts()["mixed"], "other": TransformerExpert(D, 2, 4, 40)}
        tables = {"mixed": nn.Embedding(V, D)}
        network = NanoThink(parts, V, D, fusion="prob", expert_input="raw", tables=tables)
    forward = forward_flops(network, L)
    assert (forward["tables.mixed"], forward["head"]) == (0, 2 * 2 * D * V)
    assert forward["experts.mixed"] == forward_flops(ExpertLM((V, D), experts()["mixed"]), L)["expert"]


def test_six_times_the_parameters_is_the_right_size():
    """6 N D, for a network whose products are almost all with weights."""
    network = ExpertLM((V, 64), TransformerExpert(64, 2, 4, 256, 0.0))
    parameters = sum(p.numel() for p in network.parameters())
    assert training_flops(network, L, recompute=False) == pytest.approx(6 * parameters, rel=0.03)


@pytest.mark.parametrize("kind", ["token", "window", "cummean+token", "sequence"])
def test_router_pools_as_torch_counts_them(kind):
    router = ExpertRouter(D, 3, pool=kind, pool_includes_memory=True).eval()
    context = torch.randn(ROWS, L, D, requires_grad=True)
    with counted() as found:
        router(context, Layout.of(context, None), slots_of(chunk=4, k=3)).sum().backward()
    products = router.products(Reach(L, causal=False, slots=3, chunk=4))
    trained = {id(parameter) for parameter in router.parameters()}
    assert found.flops == pytest.approx(both_ways(products, True, trained, recompute=False)[0])
