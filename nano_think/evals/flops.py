"""FLOPs a token of language models, from what their modules state (`nano_think.nn.flops`).

    forward_flops(network, 256)                                  # of inference, by component
    training_flops(network, 256)                                 # of a step, by what requires a gradient
    training_flops(fused, 256, trained=("router.", "embedding."))

A product costs F forward, and backward F for each of its factors that has a gradient. In all a trained part costs
3 F; a frozen part that a gradient flows through 2 F where it multiplies by weights, 3 F where it multiplies
activations with each other (attention); a frozen part without gradient F.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nano_think.model import ExpertLM, NanoThink
from nano_think.nn.flops import Product, Reach, products_of
from nano_think.optim.muon import MuonWithAdamW

# Multiplications and additions a parameter: decay 1, first moment 3, second 4, denominator 2, update 3.
ADAMW_FLOPS = 13
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class Part:
    """A component in the order of computation. reads: the components whose output it is given."""

    name: str
    products: list[Product]
    reads: tuple[str, ...] = ()


def forward_flops(network: nn.Module, seq_len: float, **options: Any) -> dict[str, float]:
    """FLOPs a token of the forward pass to all logits, by component; their sum is that of inference.

    network: an `ExpertLM` or a `NanoThink`. seq_len: tokens of a document. options: other fields of `Reach`.
    Raises ValueError for a parameter of which no module says what it is multiplied with.
    """
    return {part.name: _forward(part) for part in parts_of(network, Reach(seq_len, **options))}


def training_flops(
    network: nn.Module,
    seq_len: float,
    trained: Collection[str] | None = None,
    *,
    teacher: ExpertLM | None = None,
    cross_entropy: bool = True,
    cached: bool = False,
    recompute: bool = True,
    **options: Any,
) -> float:
    """FLOPs a token of a forward and a backward pass to the loss, without the optimizer (see `optimizer_flops`).

    trained: beginnings of the names of the parameters that are trained; None: those that require a gradient.
    teacher: the objective is denoising: `network` is a diffuser's, its targets are the hidden states of this one,
        read by one noisy pass. cross_entropy: denoising also judges the tokens (`ce_weight` above 0).
    cached: what the experts of a fused model say is read and not computed (7b); add `filling_flops` once.
    recompute: count what backward passes compute again instead of keeping it, as the fast paths do; the share of
        the hardware's peak that a model uses (MFU) leaves it out by definition.
    options: other fields of `Reach`.
    """
    reach, weights = Reach(seq_len, **options), _trained(network, trained)
    parts = parts_of(network, reach, weights)
    extra = 0.0
    if teacher is not None:
        target = network.expert.target
        extra = 0.0 if target == "next_embed" else _forward(parts_of(teacher, reach)[1])
        denoising = list(network.expert.denoising_products(reach))
        parts = [replace(part, products=denoising) if part.name == "expert" else part for part in parts]
        parts = parts if cross_entropy else parts[:-1]
    kept = _kept(network) if cached else set()
    flows: dict[str, bool] = {}
    for part in parts:
        if part.name in kept:
            flows[part.name] = False
            continue
        arrives = any(flows[name] for name in part.reads)
        cost, flows[part.name] = both_ways(part.products, arrives, weights, recompute)
        extra += cost
    return extra


def filling_flops(network: NanoThink, seq_len: float, **options: Any) -> float:
    """FLOPs a token of the one pass whose results `training_flops(cached=True)` reads."""
    kept = _kept(network)
    return sum(_forward(part) for part in parts_of(network, Reach(seq_len, **options)) if part.name in kept)


def optimizer_flops(optimizer: Optimizer) -> float:
    """FLOPs of one step: 13 a parameter for AdamW, and 5 (4 m^2 n + 2 m^3) a matrix (m <= n) of Muon."""
    total = 0.0
    matrices = optimizer.num_matrix_groups if isinstance(optimizer, MuonWithAdamW) else 0
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if number < matrices:
                m, n = sorted(parameter.shape)
                total += NEWTON_SCHULZ_STEPS * (4 * m**2 * n + 2 * m**3)
            else:
                total += ADAMW_FLOPS * parameter.numel()
    return total


def parts_of(network: nn.Module, reach: Reach, weights: Collection[int] = ()) -> list[Part]:
    """The components of a language model; `weights`: ids of the parameters that are trained."""
    if isinstance(network, NanoThink):
        parts = list(_fused_parts(network, reach, weights))
    elif isinstance(network, ExpertLM):
        embedding = list(products_of(network.embedding, reach))
        parts = [
            Part("embedding", embedding),
            Part("expert", list(products_of(network.expert, reach)), ("embedding",)),
            Part("head", [_head(network.embedding)], ("expert",)),
        ]
    else:
        raise ValueError(f"FLOPs are of an ExpertLM or a NanoThink, not of a {type(network).__name__}")
    _check_complete(network, parts)
    return parts


def _fused_parts(network: NanoThink, reach: Reach, weights: Collection[int]) -> Iterator[Part]:
    yield Part("embedding", list(products_of(network.embedding, reach)))
    yield from (
        Part(f"tables.{name}", list(products_of(table, reach))) for name, table in network.tables.items()
    )
    context, width = "embedding", network.embedding.embedding_dim
    if network.mla is not None:
        context = "mla"
        yield Part("search", [Product(_search(width, reach), recorded=False)])
        yield Part("mla", list(products_of(network.mla, reach)), ("embedding",))
    yield Part("router", list(products_of(network.router, reach)), (context,))
    said = []
    for name, expert in network.experts.items():
        read = context if network.expert_input == "context" else "embedding"
        read = f"tables.{name}" if name in network.tables else read
        said.append(f"experts.{name}")
        yield Part(said[-1], list(products_of(expert, reach)), (read,))
    gain = Product(0.0, network.expert_gain)
    if network.fusion == "prob":
        tables = [
            network.tables[name] if name in network.tables else network.embedding for name in network.experts
        ]
        # every expert's loss has a weight of its own, so the logits are needed twice for a gradient of the table
        yield Part("head", [gain, *(_head(table, id(table.weight) in weights) for table in tables)], (*said,))
        yield Part("fusion", [], ("router", "head"))
        return
    mixed = Product(2.0 * len(said) * width, elementwise=True)
    yield Part("fusion", [gain, mixed], ("router", *said))
    yield Part("head", [_head(network.embedding)], ("fusion",))


def _head(table: nn.Embedding, again: bool = False) -> Product:
    flops = 2.0 * table.weight.numel()
    return Product(flops, table.weight, again=again * flops)


def _search(width: int, reach: Reach) -> float:
    """Mean embedding of a chunk, less its first component, compared with every key: a query a chunk."""
    return reach.queries * (2.0 * width * reach.chunk + 4.0 * width + 2.0 * width * reach.records)


def _kept(network: nn.Module) -> set[str]:
    """The components whose output stage 7b keeps; of probabilities also what the heads say of the label."""
    names = {part.name for part in parts_of(network, Reach(1))}
    return names - {"router", "fusion", *(["head"] if network.fusion != "prob" else [])}


def _check_complete(network: nn.Module, parts: Iterable[Part]) -> None:
    stated = {id(product.weight) for part in parts for product in part.products}
    missing = [name for name, parameter in network.named_parameters() if id(parameter) not in stated]
    if missing:
        raise ValueError(f"no products(reach) of a module says what is computed with {', '.join(missing)}")


def _trained(network: nn.Module, names: Collection[str] | None) -> set[int]:
    """The ids of trained parameters."""
    named = network.named_parameters()
    if names is None:
        return {id(parameter) for _, parameter in named if parameter.requires_grad}
    return {id(parameter) for name, parameter in named if name.startswith(tuple(names))}


def _forward(part: Part) -> float:
    return sum(product.flops for product in part.products)


def both_ways(
    products: Iterable[Product], flows: bool, weights: Collection[int], recompute: bool
) -> tuple[float, bool]:
    """FLOPs of both passes, and whether a gradient comes back out of what follows.

    flows: whether the input has a gradient.
    """
    total = 0.0
    for product in products:
        total += product.flops
        flows = flows and not product.cut
        if not product.recorded:
            continue
        trained = id(product.weight) in weights
        arrives = {"input": flows, "parameters": trained, "data": False}[product.factor]
        # an activation that multiplies has a gradient exactly where the input has
        other = trained if product.weight is not None else flows
        total += product.flops * (arrives + other)
        total += product.again * (recompute and (arrives or other))
        flows = flows or trained
    return total, flows
