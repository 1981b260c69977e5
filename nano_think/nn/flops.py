"""What a network multiplies: every module states its products, and whoever wants FLOPs adds them up.

A multiply-add is 2 FLOPs. Counted are matrix products, convolutions and recurrences; norms, activations, softmax,
exponentials, rotations, biases and residual sums are not: they are a few operations a number, not a row of them.

Modules made of `nn.Linear` alone state nothing. One that multiplies in any other way, or runs a part more than
once, has a method `products(reach)` that yields everything it and its children compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from nano_think.nn.norm import RMSNorm

# Their parameters scale, shift or are looked up.
WITHOUT_PRODUCTS = (nn.Embedding, nn.LayerNorm, RMSNorm)


@dataclass(frozen=True)
class Reach:
    """What a token sees and what shares a call with it: all that its FLOPs depend on beside the network.

    length: tokens of a document. Of documents that differ, sum(l^2) / sum(l) makes the mean over tokens exact.
    tokens: of one call, among which is spread what a call computes once; `length` where not given.
    causal: count what is visible, (length + 1) / 2 keys a query on average. False: the whole square that a plain
        implementation multiplies and masks, memory slots of other chunks included.
    slots, chunk: memory slots a token sees, and tokens that share them; the first chunk of a document sees none.
    readers: share of rows that read memory (1 - memory dropout). records: keys that a query is compared with.
    passes: noisy passes of a diffuser; None: as many as it was built with.
    """

    length: float
    tokens: float | None = None
    causal: bool = True
    slots: int = 0
    chunk: int = 64
    readers: float = 1.0
    records: int = 0
    passes: int | None = None

    @property
    def keys(self) -> float:
        """Keys of its document that a query meets on average."""
        return (self.length + 1) / 2 if self.causal else self.length

    @property
    def per_call(self) -> float:
        """A token's share of what a call computes once."""
        return 1 / (self.tokens or self.length)

    @property
    def queries(self) -> float:
        """Questions to the memory a token: one a chunk but the first."""
        return self.groups / self.length

    @property
    def groups(self) -> int:
        """Chunks of a document that have slots."""
        return max(0, math.ceil(self.length / self.chunk) - 1) if self.slots else 0

    @property
    def slot_vectors(self) -> float:
        """Slots that are turned into keys and values, a token; the null slot once a document."""
        return self.readers * (self.groups * self.slots + 1) / self.length if self.groups else 0.0

    @property
    def slot_keys(self) -> float:
        """Slots that a query meets on average, the null slot included."""
        if not self.groups:
            return 0.0
        if not self.causal:
            return self.groups * self.slots + 1
        return self.readers * (1 - self.chunk / self.length) * (self.slots + 1)


@dataclass(frozen=True)
class Product:
    """One product of the forward pass.

    flops: a token. weight: the parameter that is one of its factors; None: both were computed from the input.
    factor: what the other factor is computed from. `input`: what the module is given, and a gradient goes back
        there if anything before is trained; `parameters` alone: if this module is; `data`: never.
    recorded: the graph knows of it. cut: no gradient passes this point of the network.
    again: FLOPs of what a backward pass computes a second time instead of keeping it.
    elementwise: computed number by number (a recurrence, a convolution) and so unseen by torch's counter.
    """

    flops: float
    weight: nn.Parameter | None = None
    factor: Literal["input", "parameters", "data"] = "input"
    recorded: bool = True
    cut: bool = False
    again: float = 0.0
    elementwise: bool = False


def products_of(module: nn.Module, reach: Reach, times: float = 1.0, **changes: Any) -> Iterator[Product]:
    """The products of a module for one token, in the order of computation.

    times: how often a token's forward pass runs it. changes: fields of `Product` to be set in all of them.
    Raises ValueError for a module with parameters of its own that does not state its products.
    """
    for product in _stated(module, reach):
        yield replace(product, flops=times * product.flops, again=times * product.again, **changes)


def _stated(module: nn.Module, reach: Reach) -> Iterator[Product]:
    stated: Any = getattr(module, "products", None)
    own = list(module.parameters(recurse=False))
    if stated is not None:
        yield from stated(reach)
    elif isinstance(module, nn.Linear):
        yield Product(2.0 * module.in_features * module.out_features, module.weight)
        if module.bias is not None:
            yield Product(0.0, module.bias)
    elif isinstance(module, WITHOUT_PRODUCTS):
        yield from (Product(0.0, parameter) for parameter in own)
    elif own:
        raise ValueError(
            f"{type(module).__name__} has parameters and does not say what it computes with them: "
            "give it a method products(reach), see nano_think.nn.flops"
        )
    else:
        for child in module.children():
            yield from _stated(child, reach)


def attention_products(reach: Reach, num_heads: int, width: int, value_width: int) -> Iterator[Product]:
    """Scores and mixed values of queries, keys (H, width) and values (H, value_width) over a document.

    Every fast kernel keeps no scores and computes them again in the backward pass.
    """
    scores = 2.0 * num_heads * width * reach.keys
    yield Product(scores, again=scores)
    yield Product(2.0 * num_heads * value_width * reach.keys)
