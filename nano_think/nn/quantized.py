"""Coarse weights for inference: a built network whose matrices and tables are kept in int8 or bf16.

Only what is stored is coarse. Activations, sums and everything that is no matrix stay as they are, so there is no
scale of an activation that later tokens could move. `engine.native_step` computes with the same numbers, but for
two places: it looks tokens up in the table as it was saved, and rounds the keys' expansion of latent attention
along its other side, as it multiplies by the transpose.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_think.errors import UserError

Kind: TypeAlias = Literal["int8", "bf16"]
Network = TypeVar("Network", bound=nn.Module)


class CoarseMatrix(nn.Module):
    """A matrix (rows, cols) kept in int8 with one fp32 scale a row, or in bf16 without a scale.

    int8: round(127 w / m) with m the largest |w| of the row, half to even. The scale is a parameter, so that
    whatever walks over parameters meets one floating-point number a row.
    """

    def __init__(self, weight: Tensor, kind: Kind) -> None:
        super().__init__()
        weight = weight.detach().float()
        self.kind, self.scale = kind, None
        if kind == "bf16":
            self.register_buffer("stored", weight.bfloat16())
            return
        largest = weight.abs().amax(dim=1)
        scale = torch.where(largest > 0, largest / 127, 1.0)
        self.register_buffer("stored", (weight / scale.unsqueeze(1)).round().to(torch.int8))
        self.scale = nn.Parameter(scale, requires_grad=False)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (rows, cols) that the stored numbers stand for."""
        return self.scaled(self.get_buffer("stored").to(dtype), self.scale, rows=True)

    def product(self, x: Tensor) -> Tensor:
        """x (..., cols) times the transposed matrix, (..., rows) in the dtype of x."""
        return self.scaled(F.linear(x, self.get_buffer("stored").to(x.dtype)), self.scale)

    def pick(self, rows: Tensor) -> Tensor:
        """The rows (...) of the matrix, (..., cols) in fp32."""
        scale = None if self.scale is None else self.scale[rows].unsqueeze(-1)
        return self.scaled(F.embedding(rows, self.get_buffer("stored")).float(), scale)

    @staticmethod
    def scaled(values: Tensor, scale: Tensor | None, rows: bool = False) -> Tensor:
        """`values` times the scales, along the first axis with `rows`, else broadcast."""
        if scale is None:
            return values
        return values * (scale.unsqueeze(1) if rows else scale).to(values.dtype)


class CoarseLinear(nn.Module):
    """nn.Linear without bias, of a coarse matrix."""

    def __init__(self, weight: Tensor, kind: Kind) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.matrix, self.bias = CoarseMatrix(weight, kind), None

    @property
    def weight(self) -> Tensor:
        """The matrix written out, for whoever does more with it than multiply."""
        return self.matrix.dense()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return self.matrix.product(x)


class CoarseEmbedding(nn.Module):
    """nn.Embedding of a coarse table; the tied head reads `weight`."""

    def __init__(self, weight: Tensor, kind: Kind) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.matrix = CoarseMatrix(weight, kind)

    @property
    def weight(self) -> Tensor:
        """The table written out."""
        return self.matrix.dense()

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids (...) to vectors (..., embedding_dim)."""
        return self.matrix.pick(tokens)


def quantize(model: Network, kind: Kind) -> Network:
    """Swap every table and every linear layer without bias of `model` for a coarse one; returns `model` itself.

    For inference: it goes to eval mode and nothing of it takes gradients. Norms, the router, the step sizes,
    scan parameters and convolutions of a state-space mixer are no linear layers and stay fp32; linear layers
    with a bias belong to the diffuser's noise levels, which are computed once for all tokens, and stay too. A
    layer that is used in two places is swapped once. Raises ValueError for an unknown kind, and UserError naming
    the matrix for one with values that are not finite.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"quantize must be one of {', '.join(get_args(Kind))}, not {kind!r}")
    require_finite(model)
    swapped: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if child not in swapped and (coarse := _counterpart(child)) is not None:
                swapped[child] = coarse(child.get_parameter("weight"), kind)
            if child in swapped:
                setattr(parent, name, swapped[child])
    return model.eval().requires_grad_(False)


def require_finite(model: nn.Module) -> None:
    """Raise UserError naming the first matrix to be made coarse that holds a value which is not finite."""
    for name, module in model.named_modules():
        if _counterpart(module) is not None and not bool(module.get_parameter("weight").isfinite().all()):
            raise UserError(
                f"{name} holds weights that are not finite, so the model cannot be quantised: "
                "use a checkpoint of a fit that did not diverge"
            )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of everything that a checkpoint of the model holds, each tensor once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _counterpart(module: nn.Module) -> type[CoarseLinear] | type[CoarseEmbedding] | None:
    """What stands in for a module; None for one that stays, subclasses of other arithmetic included."""
    if type(module) is nn.Linear and module.bias is None:
        return CoarseLinear
    return CoarseEmbedding if type(module) is nn.Embedding else None
