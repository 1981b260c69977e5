"""Our state-space stack and the same stack in other libraries: one function, the same weights.

Ours normalises its input and the others do not, so inputs are drawn with a root mean square of 1. mambapy's stack
has no norm at its end and gets ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import hugging_face
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.nn.mixers.ssd import SSD

NORM_EPS = 1e-6
HEAD_DIM = 64  # of Mamba-2
Stack = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Dimensions of the stack and of its input."""

    num_layers: int = 6
    d_model: int = 384
    d_state: int = 16
    d_conv: int = 4
    batch: int = 1
    length: int = 512

    @property
    def d_inner(self) -> int:
        """Channels of the scan: both other libraries only take whole multiples of d_model."""
        return 2 * self.d_model

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch * self.length

    @property
    def flops(self) -> float:
        """Useful FLOPs of an S6 stack, forward and backward; the backward counts twice the forward.

        Forward, a token and layer: 2 a weight of the four projections, 2 a tap and channel, 6 a channel and state
        (decay the state, add the input, read the state out). Exponentials and gates are not counted.
        """
        dt_rank = -(-self.d_model // 16)
        weights = self.d_inner * (3 * self.d_model + dt_rank + 2 * self.d_state + dt_rank)
        forward = 2 * weights + self.d_inner * (2 * self.d_conv + 6 * self.d_state)
        return 3.0 * forward * self.num_layers * self.tokens

    def draw(self, length: int | None = None) -> Tensor:
        """Inputs (B, L, d_model) whose vectors have a root mean square of 1, with a gradient."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.batch, length or self.length, self.d_model, generator=generator)
        return (x / x.square().mean(-1, keepdim=True).sqrt()).requires_grad_()


QUICK = Size(num_layers=1, d_model=16, d_state=4, length=16)


def s6(size: Size) -> tuple[nn.Module, Stack]:
    """Our expert without dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expert = StateSpaceExpert(
            size.d_model, size.num_layers, size.d_inner, size.d_state, size.d_conv, dropout=0.0
        )
    return expert, expert


def ssd(size: Size) -> tuple[nn.Module, Stack]:
    """Our expert with the mixer of Mamba-2."""
    head_dim = min(HEAD_DIM, size.d_inner)
    mixer = partial(SSD, d_inner=size.d_inner, d_state=size.d_state, d_conv=size.d_conv, head_dim=head_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expert = StateSpaceExpert(size.d_model, size.num_layers, dropout=0.0, mixer=mixer)
    return expert, expert


def mamba(size: Size, with_mambapy: bool = False) -> tuple[nn.Module, Stack]:
    """Hugging Face's Mamba: the loop over positions it takes without CUDA, or mambapy's scan inside it."""
    transformers = hugging_face()
    config = transformers.MambaConfig(
        vocab_size=3,
        hidden_size=size.d_model,
        state_size=size.d_state,
        num_hidden_layers=size.num_layers,
        conv_kernel=size.d_conv,
        expand=2,
        layer_norm_epsilon=NORM_EPS,
        use_cache=False,
        use_mambapy=with_mambapy,
    )
    model = transformers.MambaModel(config)
    _copy(model, s6(size)[0], {"norm_f.weight": "norm.weight"} | _layers(size, S6_NAMES))
    return model, lambda x: model(inputs_embeds=x, use_cache=False).last_hidden_state


def mamba2(size: Size) -> tuple[nn.Module, Stack]:
    """Hugging Face's Mamba2 by chunks: a decay a head instead of one a channel and state."""
    transformers = hugging_face()
    head_dim = min(HEAD_DIM, size.d_inner)
    config = transformers.Mamba2Config(
        vocab_size=3,
        hidden_size=size.d_model,
        num_hidden_layers=size.num_layers,
        num_heads=size.d_inner // head_dim,
        head_dim=head_dim,
        state_size=size.d_state,
        n_groups=1,
        conv_kernel=size.d_conv,
        expand=2,
        layer_norm_epsilon=NORM_EPS,
        use_cache=False,
    )
    model = transformers.Mamba2Model(config)
    _copy(model, ssd(size)[0], {"norm_f.weight": "norm.weight"} | _layers(size, SSD_NAMES))
    return model, lambda x: model(inputs_embeds=x, use_cache=False).last_hidden_state


def mambapy(size: Size) -> tuple[nn.Module, Stack]:
    """mambapy's stack with its parallel scan, and our norm after it."""
    from mambapy.mamba import Mamba, MambaConfig

    model = Mamba(MambaConfig(size.d_model, size.num_layers, d_state=size.d_state, d_conv=size.d_conv))
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = NORM_EPS
    source = s6(size)[0]
    _copy(model, source, _layers(size, S6_NAMES))
    weight = nn.Parameter(dict(source.named_parameters())["norm.weight"].detach().clone())
    return model, lambda x: F.rms_norm(model(x), (size.d_model,), weight, NORM_EPS)


BUILDERS: dict[str, Callable[[Size], tuple[nn.Module, Stack]]] = {
    "nano_think": s6,
    "mambapy": mambapy,
    "HF Mamba with mambapy": partial(mamba, with_mambapy=True),
    "HF Mamba": mamba,
    "nano_think SSD": ssd,
    "HF Mamba2": mamba2,
}

# Names inside a layer, theirs to ours.
SHARED = {
    "A_log": "A_log",
    "D": "D",
    "in_proj.weight": "in_proj.weight",
    "out_proj.weight": "out_proj.weight",
}
SHARED |= {"conv1d.weight": "conv_weight", "conv1d.bias": "conv_bias"}
S6_NAMES = SHARED | {
    "x_proj.weight": "x_proj.weight",
    "dt_proj.weight": "dt_weight",
    "dt_proj.bias": "dt_bias",
}
SSD_NAMES = SHARED | {"dt_bias": "dt_bias", "norm.weight": "norm.weight"}


def _layers(size: Size, names: Mapping[str, str]) -> dict[str, str]:
    layer = {"norm.weight": "mixer_norm.weight"}
    layer |= {f"mixer.{theirs}": f"mixer.{own}" for theirs, own in names.items()}
    return {
        f"layers.{i}.{theirs}": f"blocks.{i}.{own}"
        for i in range(size.num_layers)
        for theirs, own in layer.items()
    }


def _copy(model: nn.Module, source: nn.Module, names: Mapping[str, str]) -> None:
    """Fill every weight of `model` with ours of those names; raises KeyError for one without a name."""
    own = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" not in name:
                parameter.copy_(own[names[name]].view_as(parameter))
