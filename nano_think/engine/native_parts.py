"""Networks as the native decode step reads them: which it can run, their sizes, their weights in order of use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_think.engine.native_library import Packer, Precision, pad_vectors
from nano_think.engine.native_screen import Screen
from nano_think.experts.denoiser_block import ModulatedBlock, TimeEmbedding, TwoStreamDenoiser
from nano_think.experts.diffuser import EPS_CLAMP, DiffuserExpert
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.mla import ExpertRouter, MultiHeadLatentAttention
from nano_think.model import ExpertLM, NanoThink
from nano_think.nn.block import Block, ExpertInput
from nano_think.nn.ffn import SwiGLU
from nano_think.nn.mixers.attention import CausalSelfAttention
from nano_think.nn.mixers.latent_attention import (
    DirectHeads,
    LatentAttention,
    LatentHeads,
    Rotation,
    SlotReader,
)
from nano_think.nn.mixers.s6 import S6
from nano_think.nn.norm import RMSNorm
from nano_think.nn.pools import RunningMean
from nano_think.ops.diffusion import ddim_timesteps

_LOG2_E = 1.4426950408889634
_KINDS: dict[type, int] = {TransformerExpert: 0, StateSpaceExpert: 0, DiffuserExpert: 1}
_CODE_MODULES = (TimeEmbedding, TwoStreamDenoiser)  # their biased Linears are used up when packing
_MODULES = (
    ExpertLM, NanoThink, *_KINDS, *_CODE_MODULES, ExpertInput, Block, ModulatedBlock, CausalSelfAttention, S6,
    SwiGLU, RMSNorm, MultiHeadLatentAttention, LatentAttention, LatentHeads, DirectHeads, Rotation, SlotReader,
    ExpertRouter, nn.Embedding, nn.Linear, nn.Dropout, nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.Identity,
)  # fmt: skip


class Unsupported(ValueError):
    """The native step cannot run a network; the message says why."""


def supports(model: Any) -> str | None:
    """Why `NativeStep` cannot run this model; None where it can.

    It reads fp32 models on the CPU: an `ExpertLM` or a `NanoThink` without private tables, whose experts are
    made of attention or S6 blocks of one size, with or without SwiGLU, or are diffusers; with latent or direct
    attention and a router whose mean is a running one. Memory slots, forced weights and knock-out belong to the
    plain step, and so does any other module, also a subclass or a parametrised layer.
    """
    try:
        _check(model)
        for part in networks_of(model):
            _sizes(part)
    except Unsupported as error:
        return str(error)
    return None


def _check(model: Any) -> None:
    foreign = sorted({type(module).__name__ for module in model.modules() if type(module) not in _MODULES})
    if foreign:
        raise Unsupported(f"there is no native code for {', '.join(foreign)}")
    if type(model) not in (ExpertLM, NanoThink):
        raise Unsupported("it is no ExpertLM or NanoThink")
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        raise Unsupported("a module has hooks, which want to see it run")
    used_up = {child for m in model.modules() if isinstance(m, _CODE_MODULES) for child in m.children()}
    if any(isinstance(m, nn.Linear) and m.bias is not None and m not in used_up for m in model.modules()):
        raise Unsupported("a linear layer has a bias")
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        raise Unsupported("its parameters are not all fp32 on the CPU")
    if type(model) is NanoThink:
        if (
            type(model.mla) not in (MultiHeadLatentAttention, type(None))
            or type(model.router) is not ExpertRouter
        ):
            raise Unsupported("its attention or its router is of another kind")
        if len(model.tables):
            raise Unsupported("experts have private tables")
        if type(model.router.pool) is not RunningMean:
            raise Unsupported(f"router.pool={model.router.kind} keeps more than a running sum")


def networks_of(model: Any) -> list[Any]:
    """The attention before the experts, if there is one, and the experts."""
    if type(model) is ExpertLM:
        return [model.expert]
    return [*([model.mla] if model.mla is not None else []), *model.experts.values()]


def versions(model: nn.Module) -> list[Any]:
    """Changes whenever a parameter or a saved buffer is replaced or written to, or a plain attribute of a part is.

    What is written through `.data` raises no version and is not seen.
    """
    tensors = model.state_dict(keep_vars=True).values()
    parts = [*model.modules(), *(m.schedule for m in model.modules() if isinstance(m, DiffuserExpert))]
    settings = [
        value
        for part in parts
        for name, value in vars(part).items()
        if isinstance(value, int | float | str | None) and name != "training" and not name.startswith("_")
    ]
    return [*settings, *((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)]


@dataclass
class PackedPart:
    """A network: fields of the struct `Part`, where its weights begin, its mixers, the rotation's (dim, theta)."""

    sizes: dict[str, Any]
    offset: int
    mixers: Tensor
    rotation: tuple[int, float] | None


@dataclass
class PackedModel:
    """A copy of a model's weights in one precision, the head's last; parts in the order of `networks_of`.

    sizes: fields of the struct `Model`. router: as that struct has it, None for a single expert.
    """

    precision: Precision
    versions: list[Any]
    weights: Tensor
    parts: list[PackedPart]
    head: int
    table: Tensor
    sizes: dict[str, Any]
    router: Tensor | None

    @cached_property
    def screen(self) -> Screen:
        """Made when it is first asked for."""
        return Screen(self.table, self.precision)


_PACKED: WeakKeyDictionary[nn.Module, PackedModel] = WeakKeyDictionary()


def packed(model: Any, precision: Precision) -> PackedModel:
    """The model's packed weights: those of the last call where neither precision nor a weight has changed.

    Raises Unsupported for a model that `supports` turns down.
    """
    known = _PACKED.get(model)
    if known is not None and known.precision == precision and known.versions == versions(model):
        return known
    _PACKED.pop(model, None)  # before another copy is made
    if (problem := supports(model)) is not None:
        raise Unsupported(f"the native step cannot run this model: {problem}")
    with torch.no_grad():
        made = _PACKED[model] = _pack(model, precision)
    return made


def _pack(model: Any, precision: Precision) -> PackedModel:
    packer, known = Packer(precision), versions(model)
    parts = [_pack_part(packer, network) for network in networks_of(model)]
    head = packer.size
    packer.matrix(model.embedding.weight)
    table = model.embedding.weight.detach().contiguous()
    sizes = {"vocab_size": table.shape[0], "d_model": table.shape[1], "num_experts": 1}
    router = None
    if type(model) is NanoThink:
        sizes |= _router_sizes(model)
        router = _router_weights(model)
    return PackedModel(precision, known, packer.finish(), parts, head, table, sizes, router)


def _router_sizes(model: NanoThink) -> dict[str, Any]:
    router = model.router
    return {
        "num_experts": len(model.experts),
        "raw_input": model.expert_input == "raw",
        "mixes_probabilities": model.fusion == "prob",
        "span": router.pool.span or 0,
        "token_term": router.token_weight is not None,
        "tau": router.tau,
        "floor": router.floor,
        "decay": router.pool.decay,
        "router_eps": router.norm.eps,
    }


def _router_weights(model: NanoThink) -> Tensor:
    """Weights, those of the token term or zeros, biases, and the experts' gains, always fp32."""
    router = model.router
    token_weight = torch.zeros_like(router.weight) if router.token_weight is None else router.token_weight
    matrices = pad_vectors(torch.cat((router.weight, token_weight)))
    return torch.cat((matrices.flatten(), router.bias, model.expert_gain)).detach()


def _pack_part(packer: Packer, network: Any) -> PackedPart:
    sizes, offset = _sizes(network), packer.size
    theta = sizes.pop("rope_theta", None)
    mixers = torch.empty(0, dtype=torch.int8)
    if type(network) is MultiHeadLatentAttention:
        _pack_context(packer, network)
    elif type(network) is DiffuserExpert:
        _pack_diffuser(packer, network)
    else:
        mixers = torch.tensor([type(b.mixer) is S6 for b in network.blocks], dtype=torch.int8)
        _pack_stack(packer, network)
    width = sizes.get("rope_dim") or (0 if sizes.get("latent_dim") else sizes.get("head_dim", 0))
    return PackedPart(sizes, offset, mixers, (width, theta) if width else None)


def blocks_of(network: Any) -> list[Any]:
    """The blocks of an expert."""
    return list(network.denoiser.blocks if type(network) is DiffuserExpert else network.blocks)


def _sizes(network: Any) -> dict[str, Any]:
    """Every size of a network by its name in `Part`; raises Unsupported for layers that differ, rare options."""
    if type(network) is MultiHeadLatentAttention:
        return _context_sizes(network)
    if type(network) not in _KINDS:
        raise Unsupported(f"there is no native code for {type(network).__name__} as an expert")
    for block in blocks_of(network):
        if type(block.mixer) not in (CausalSelfAttention, S6) or type(block.ffn) not in (SwiGLU, type(None)):
            raise Unsupported("there is no native code for the mixer or feed-forward network of a block")
    sizes: dict[str, Any] = {"kind": _KINDS[type(network)], "num_layers": len(blocks_of(network))}
    if type(network) is DiffuserExpert:
        sizes |= _diffuser_sizes(network)

    def note(**values: Any) -> None:
        for name, value in values.items():
            if sizes.setdefault(name, value) != value:
                raise Unsupported(f"its layers differ in {name}: {sizes[name]} and {value}")

    for module in network.modules():
        if isinstance(module, RMSNorm):
            note(eps=module.eps)
        elif isinstance(module, Block | ModulatedBlock):
            note(ffn_dim=module.ffn.gate_proj.out_features if module.ffn is not None else 0)
        elif isinstance(module, CausalSelfAttention):
            note(num_heads=module.num_heads, num_kv_heads=module.num_kv_heads, head_dim=module.head_dim)
            note(rope_theta=module.rope_theta, interleaved=module.rope_layout == "interleaved")
        elif isinstance(module, S6):
            note(d_inner=module.d_inner, d_state=module.d_state, d_conv=module.d_conv)
            note(dt_rank=module.dt_rank, gate=module.gate)
    return sizes


def _context_sizes(network: MultiHeadLatentAttention) -> dict[str, Any]:
    heads = network.attention.heads
    norms = [
        m for m in (network.norm, network.post_norm, getattr(heads, "latent_norm", None)) if m is not None
    ]
    if len({m.eps for m in norms if isinstance(m, RMSNorm)}) > 1:
        raise Unsupported("the norms of its attention differ in eps")
    sizes = {
        "kind": 2,
        "num_heads": heads.num_heads,
        "num_kv_heads": heads.num_heads,
        "head_dim": heads.head_dim,
        "interleaved": heads.rotation.layout == "interleaved",
        "rope_theta": heads.rotation.theta,
        "post_norm": isinstance(network.post_norm, RMSNorm),
        "eps": network.norm.eps,
    }
    if isinstance(heads, LatentHeads):
        sizes |= {"latent_dim": heads.latent_dim, "rope_dim": heads.rope_dim}
    return sizes


def _diffuser_sizes(network: DiffuserExpert) -> dict[str, Any]:
    if network.x_T == "rng":
        raise Unsupported("a diffuser starts from fresh noise (x_T=rng)")
    if network.bidirectional:
        raise Unsupported("a diffuser reads later tokens (bidirectional)")
    if network.denoiser.estimate_in is not None and network.fused_steps > 1:
        raise Unsupported("a diffuser feeds its estimate back (self_cond)")
    if not network.stats_ready:
        raise Unsupported("a diffuser has no target statistics")
    return {"passes": network.fused_steps, "reads_out": network.target != "hidden_same"}


def _pack_stack(packer: Packer, network: Any) -> None:
    packer.matrix(network.entry.matrix)
    for block in network.blocks:
        packer.vectors(block.mixer_norm.weight)
        (_pack_s6 if type(block.mixer) is S6 else _pack_attention)(packer, block.mixer)
        if block.ffn is not None:
            packer.vectors(block.ffn_norm.weight)
            _pack_ffn(packer, block.ffn)
    packer.vectors(network.norm.weight)


def _pack_attention(packer: Packer, mixer: CausalSelfAttention) -> None:
    packer.matrix(mixer.q_proj.weight)
    packer.matrix(mixer.k_proj.weight, mixer.v_proj.weight)
    packer.matrix(mixer.out_proj.weight)


def _pack_ffn(packer: Packer, ffn: SwiGLU) -> None:
    packer.alternating(ffn.gate_proj.weight, ffn.up_proj.weight)
    packer.matrix(ffn.down_proj.weight)


def _pack_s6(packer: Packer, mixer: S6) -> None:
    """The step-size projection stays fp32: it decides over how many positions a channel remembers."""
    packer.vectors(mixer.conv_weight.t(), mixer.conv_bias)
    for half in mixer.in_proj.weight.split(mixer.d_inner):
        packer.matrix(half)
    packer.matrix(mixer.x_proj.weight)
    packer.vectors(mixer.dt_bias, -mixer.A_log.exp().t() * _LOG2_E, mixer.D)
    packer.matrix(mixer.dt_weight, precision="fp32")
    packer.matrix(mixer.out_proj.weight)


def _pack_context(packer: Packer, network: MultiHeadLatentAttention) -> None:
    heads: Any = network.attention.heads
    packer.vectors(network.norm.weight)
    if isinstance(heads, LatentHeads):
        packer.vectors(heads.latent_norm.weight)
        packer.matrix(heads.q_proj.weight)
        packer.matrix(heads.latent_proj.weight, heads.rope_key_proj.weight)
        for up in heads.k_up_proj.weight.split(heads.head_dim):
            packer.matrix(up.t())
        for up in heads.v_up_proj.weight.split(heads.head_dim):
            packer.matrix(up)
    else:
        packer.matrix(heads.q_proj.weight)
        packer.matrix(_product(heads.k_proj), _product(heads.v_proj))
    packer.matrix(network.attention.out_proj.weight)
    if isinstance(network.post_norm, RMSNorm):
        packer.vectors(network.post_norm.weight)


def _product(projection: nn.Linear | nn.Sequential) -> Tensor:
    """The weight of a projection, one matrix also where it is factorised."""
    if isinstance(projection, nn.Linear):
        return projection.weight
    first, second = projection
    return second.weight @ first.weight


def _pack_diffuser(packer: Packer, network: DiffuserExpert) -> None:
    denoiser = network.denoiser
    levels = ddim_timesteps(network.fused_steps, network.schedule.train_T)
    codes = [denoiser.clean_code, *(denoiser.time(torch.tensor(tau)) for tau in levels)]
    for code in codes:
        shared = denoiser.modulation(F.silu(code)).unflatten(-1, (6, -1))
        for block in denoiser.blocks:
            shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = shared + block.table
            packer.vectors(block.mixer_norm.weight * (1 + scale), shift, gate)
            packer.vectors(block.ffn_norm.weight * (1 + ffn_scale), ffn_shift, ffn_gate)
    for tau, after in zip(levels, [*levels[1:], 0], strict=True):
        packer.vectors(*_level(network, tau, after))
    packer.matrix(network.entry.matrix)
    packer.matrix(denoiser.context_in.weight)
    packer.matrix(denoiser.latent_in.weight)
    for block in denoiser.blocks:
        _pack_attention(packer, block.mixer)
        _pack_ffn(packer, block.ffn)
    packer.vectors(denoiser.norm.weight)
    packer.matrix(denoiser.output.weight)
    if network.target != "hidden_same":
        packer.matrix(network.readout_proj.weight)
        packer.vectors(network.readout_norm.weight)
    else:
        packer.vectors(network.target_std, network.target_mean)


def _level(network: DiffuserExpert, tau: int, after: int) -> Iterator[Tensor]:
    """A and B of x0 = A prediction + B latent, (d_model,) each; then P and Q of the next latent P x0 + Q latent,
    and the bound on x0."""
    schedule, like = network.schedule, network.target_mean
    (a, g), (next_a, next_g) = (
        [float(level) for level in schedule.levels(number, like)] for number in (tau, after)
    )
    signal = a * schedule.input_scale
    ways: dict[str, Callable[[], tuple[Any, Any]]] = {
        "posterior": lambda: (1 - gain() * signal, gain()),
        "x0": lambda: (1.0, 0.0),
        "v": lambda: (-g / schedule.input_scale, a / schedule.input_scale),
        "eps": lambda: (-g / signal, 1 / signal),
    }

    def gain() -> Tensor:
        return schedule.gain(network.variance, tau, like)

    for factor in ways[network.param]():
        yield torch.zeros_like(like) + factor
    bound = EPS_CLAMP if network.param == "eps" else torch.inf
    yield torch.tensor([next_a * schedule.input_scale - next_g * signal / g, next_g / g, bound])
