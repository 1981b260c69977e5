"""Decoding one row on the CPU with one native call a token, `native_step.cpp`.

PyTorch spends most of a token at batch 1 between its operators, and reads weights at half the memory's speed.
Here the weights are packed once, in the order of use, and streamed through one call. The plain step,
`ExpertLM.extend`, remains the reference, the fallback and the way a prompt is read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.model import ExpertLM
from nano_think.nn.block import Block, ExpertInput
from nano_think.nn.ffn import SwiGLU
from nano_think.nn.mixers.attention import CausalSelfAttention
from nano_think.nn.mixers.s6 import S6
from nano_think.nn.norm import RMSNorm
from nano_think.ops.native import load
from nano_think.ops.rope import rope_angles

Precision: TypeAlias = Literal["fp32", "bf16", "int8"]

SOURCE = Path(__file__).with_name("native_step.cpp")
LANES = 16  # rows of a tile
COLUMNS = 4  # columns are padded to a multiple of this
_LOG2_E = 1.4426950408889634
_EXPERTS = (TransformerExpert, StateSpaceExpert)
_MODULES = (
    ExpertLM, *_EXPERTS, ExpertInput, Block, CausalSelfAttention, S6, SwiGLU, RMSNorm,
    nn.Embedding, nn.Linear, nn.Dropout, nn.ModuleList,
)  # fmt: skip


class Shape(ctypes.Structure):
    """The struct of that name in the source: sizes of a model, 0 where it has no such part."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "d_model", "vocab_size", "num_layers", "ffn_dim",
            "num_heads", "num_kv_heads", "head_dim", "max_len", "interleaved",
            "d_inner", "d_state", "d_conv", "dt_rank", "gate",
        )
    ] + [("eps", ctypes.c_double)]  # fmt: skip


@cache
def load_library() -> ctypes.CDLL:
    """The built library, loaded once a process; raises BuildError."""
    library = load(SOURCE)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.native_step.argtypes = [
        ctypes.POINTER(Shape), ctypes.c_int, *[pointer] * 6, number, number, ctypes.c_int
    ]  # fmt: skip
    library.native_step.restype = None
    library.prefer_huge_pages.argtypes = [pointer, number]
    library.prefer_huge_pages.restype = None
    return library


def supports(model: Any) -> str | None:
    """Why `NativeStep` cannot run this model; None where it can.

    It reads an `ExpertLM` in fp32 on the CPU whose expert is made of attention or S6 blocks of one size, with or
    without SwiGLU. Any other module, also a subclass or a parametrised layer, is left to the plain step.
    """
    foreign = sorted({type(module).__name__ for module in model.modules() if type(module) not in _MODULES})
    if foreign:
        return f"there is no native code for {', '.join(foreign)}"
    if type(model) is not ExpertLM:
        return "it is no ExpertLM"
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return "a module has hooks, which want to see it run"
    if any(isinstance(m, nn.Linear) and m.bias is not None for m in model.modules()):
        return "a linear layer has a bias"
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        return "its parameters are not all fp32 on the CPU"
    try:
        _sizes(model)
    except _Uneven as error:
        return str(error)
    return None


class _Uneven(ValueError):
    """Layers differ in a size that the native step keeps once for all of them."""


class NativeStep:
    """A packed copy of a model and the decode state of one row.

    precision: how the matrices are kept: `fp32`, `bf16`, or `int8` with one scale a row. Sums, norms, the state
    and everything that is no matrix product are fp32. The prompt is read by the plain fp32 model.
    max_len: most positions the state holds. threads: of each step, torch's number where not given; it changes
    no bit of the logits. weights: the packed bytes.

    The weights are copied here: `prefill` and `load` raise RuntimeError where the model has changed since.
    Raises ValueError for a model that `supports` turns down, BuildError without a compiler.
    """

    def __init__(
        self, model: ExpertLM, precision: Precision = "fp32", max_len: int = 512, threads: int | None = None
    ) -> None:
        if (problem := supports(model)) is not None:
            raise ValueError(f"the native step cannot run this model: {problem}")
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {get_args(Precision)}, not {precision!r}")
        self.model, self.max_len, self.position = model, max_len, 0
        self._threads = threads
        self._library = load_library()
        self._kind = get_args(Precision).index(precision)
        self._versions = _versions(model)
        self._shape = _shape(model, max_len)
        self._mixers = torch.tensor([type(b.mixer) is S6 for b in _blocks(model)], dtype=torch.int8)
        self._rope = _rope(model, max_len)
        *body, head = _pack(model, precision)
        parts = [*body, head]
        self.weights = torch.cat(parts, out=self._buffer(sum(part.numel() for part in parts)))
        self._table = self.weights[len(self.weights) - head.numel() :]
        self._caches = torch.float32 if precision == "fp32" else torch.bfloat16
        self._sizes = [_state_bytes(block.mixer, max_len, self._caches) for block in _blocks(model)]
        self._state = self._buffer(sum(self._sizes)).zero_()
        self._logits = torch.empty(_padded(self._shape.vocab_size))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one step reads; keys, values and scan states come on top."""
        return self.weights.numel()

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int]) -> Tensor:
        """Start a new row with these tokens, read by the plain model in one pass; logits (V,) of the last."""
        state = self.model.init_state(1, len(tokens))
        output = self.model.extend(torch.tensor([tokens]), state)
        self.load(state)
        assert output.logits is not None
        return output.logits[0, -1]

    @torch.no_grad()
    def load(self, state: Any) -> None:
        """Go on from a decode state of one row that the plain model has filled."""
        if _versions(self.model) != self._versions:
            raise RuntimeError("the model has changed since its weights were packed: make a new NativeStep")
        if state.length > self.max_len:
            raise ValueError(f"the state holds {state.length} positions, the native step {self.max_len}")
        self.position = state.length
        for i, (block, target) in enumerate(
            zip(_blocks(self.model), self._state.split(self._sizes), strict=True)
        ):
            if type(block.mixer) is S6:
                _load_scan(block.mixer, state[i], target.view(torch.float32))
            else:
                _load_keys_values(block.mixer, state[i], target.view(self._caches))

    def step(self, token: int) -> Tensor:
        """Read one more token; logits (V,) of what follows it, overwritten by the next step.

        Raises ValueError where the state is full or the token unknown.
        """
        if self.position >= self.max_len:
            raise ValueError(f"the state holds {self.max_len} positions, one more was needed")
        if not 0 <= token < self._shape.vocab_size:
            raise ValueError(f"token {token} lies outside the vocabulary of {self._shape.vocab_size} tokens")
        buffers = (self.weights, self._table, self._mixers, self._rope, self._state, self._logits)
        addresses = (buffer.data_ptr() for buffer in buffers)
        threads = self._threads or torch.get_num_threads()
        self._library.native_step(self._shape, self._kind, *addresses, token, self.position, threads)
        self.position += 1
        return self._logits[: self._shape.vocab_size]

    def _buffer(self, size: int) -> Tensor:
        """Bytes on large pages where the system has them: the stream does not stall at page borders."""
        buffer = torch.empty(size, dtype=torch.uint8)
        self._library.prefer_huge_pages(buffer.data_ptr(), size)
        return buffer


def _blocks(model: ExpertLM) -> list[Any]:
    return list(model.expert.blocks)


def _versions(model: ExpertLM) -> list[tuple[int, int]]:
    """Changes whenever a parameter is replaced or written to, as optimizers and load_state_dict do."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]


def _sizes(model: ExpertLM) -> dict[str, Any]:
    """Every size of the model by name; raises _Uneven where layers differ."""
    sizes: dict[str, Any] = {}

    def note(**values: Any) -> None:
        for name, value in values.items():
            if sizes.setdefault(name, value) != value:
                raise _Uneven(f"its layers differ in {name}: {sizes[name]} and {value}")

    for module in model.modules():
        if isinstance(module, RMSNorm):
            note(eps=module.eps)
        elif isinstance(module, Block):
            note(ffn_dim=module.ffn.gate_proj.out_features if module.ffn is not None else 0)
        elif isinstance(module, CausalSelfAttention):
            note(num_heads=module.num_heads, num_kv_heads=module.num_kv_heads, head_dim=module.head_dim)
            note(rope_theta=module.rope_theta, interleaved=module.rope_layout == "interleaved")
        elif isinstance(module, S6):
            note(d_inner=module.d_inner, d_state=module.d_state, d_conv=module.d_conv)
            note(dt_rank=module.dt_rank, gate=module.gate)
    return sizes


def _shape(model: ExpertLM, max_len: int) -> Shape:
    sizes = _sizes(model)
    sizes.pop("rope_theta", None)
    table = model.embedding.weight
    return Shape(vocab_size=table.shape[0], d_model=table.shape[1], num_layers=len(_blocks(model)),
                 max_len=max_len, **sizes)  # fmt: skip


def _rope(model: ExpertLM, max_len: int) -> Tensor:
    """Cosines, then sines, (2, max_len, head_dim / 2); empty without attention."""
    sizes = _sizes(model)
    if "head_dim" not in sizes:
        return torch.empty(0)
    return torch.stack(rope_angles(torch.arange(max_len), sizes["head_dim"], sizes["rope_theta"]))


def _padded(n: int, multiple: int = LANES) -> int:
    return -(-n // multiple) * multiple


def _pack(model: ExpertLM, precision: Precision) -> Iterator[Tensor]:
    """The weights as flat byte tensors, in the order in which a step reads them; the head comes last."""
    expert: Any = model.expert
    yield _matrix(expert.entry.adaptor.weight, precision)
    for block in _blocks(model):
        yield _vectors(block.mixer_norm.weight)
        yield from (_pack_s6 if type(block.mixer) is S6 else _pack_attention)(block.mixer, precision)
        if block.ffn is not None:
            yield _vectors(block.ffn_norm.weight)
            yield _matrices_in_turn(block.ffn.gate_proj.weight, block.ffn.up_proj.weight, precision)
            yield _matrix(block.ffn.down_proj.weight, precision)
    yield _vectors(expert.norm.weight)
    yield _matrix(model.embedding.weight, precision)


def _pack_attention(mixer: CausalSelfAttention, precision: Precision) -> Iterator[Tensor]:
    inputs = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    yield _matrix(torch.cat([linear.weight for linear in inputs]), precision)
    yield _matrix(mixer.out_proj.weight, precision)


def _pack_s6(mixer: S6, precision: Precision) -> Iterator[Tensor]:
    """The step-size projection stays fp32: it decides over how many positions a channel remembers."""
    yield _vectors(mixer.conv_weight.t())
    yield _vectors(mixer.conv_bias)
    for half in mixer.in_proj.weight.split(mixer.d_inner):
        yield _matrix(half, precision)
    yield _matrix(mixer.x_proj.weight, precision)
    yield _vectors(mixer.dt_bias)
    yield _vectors(-mixer.A_log.exp().t() * _LOG2_E)
    yield _vectors(mixer.D)
    yield _matrix(mixer.dt_weight, "fp32")
    yield _matrix(mixer.out_proj.weight, precision)


def _vectors(weight: Tensor) -> Tensor:
    """Vectors (..., n), each padded to a multiple of LANES."""
    return _bytes(F.pad(weight.detach(), (0, -weight.shape[-1] % LANES))).flatten()


def _matrix(weight: Tensor, precision: Precision) -> Tensor:
    return _tiles(weight, precision).flatten()


def _matrices_in_turn(first: Tensor, second: Tensor, precision: Precision) -> Tensor:
    """A tile of the one, a tile of the other, and so on."""
    return torch.stack((_tiles(first, precision), _tiles(second, precision)), dim=1).flatten()


def _tiles(weight: Tensor, precision: Precision) -> Tensor:
    """A matrix (rows, cols) as bytes (tiles, bytes of a tile); the layout is in the head of the source."""
    rows, cols = weight.shape
    weight = F.pad(weight.detach(), (0, -cols % COLUMNS, 0, -rows % LANES)).unflatten(0, (-1, LANES))
    if precision != "int8":
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        return _bytes(_side_by_side(weight.to(dtype))).flatten(1)
    largest = weight.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    stored = ((weight / scale).round() + 128).to(torch.uint8)
    return torch.cat((_bytes(scale.squeeze(-1)), _bytes(_side_by_side(stored)).flatten(1)), dim=1)


def _side_by_side(rows: Tensor) -> Tensor:
    """(..., LANES, cols) to (..., cols / g, LANES, g) for g columns in four bytes (in one float)."""
    return rows.unflatten(-1, (-1, 4 // rows.element_size())).transpose(-3, -2)


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes, the last axis longer by the size of an element."""
    return tensor.contiguous().view(torch.uint8)


def _state_bytes(mixer: Any, max_len: int, dtype: torch.dtype) -> int:
    """Bytes of a layer's decode state: fp32 of a scan, keys and values of type `dtype`."""
    if type(mixer) is S6:
        return (mixer.d_conv - 1 + mixer.d_state) * _padded(mixer.d_inner) * 4
    width = _padded(mixer.head_dim, COLUMNS) + _padded(mixer.head_dim)
    return mixer.num_kv_heads * _padded(max_len) * width * dtype.itemsize


def _load_keys_values(mixer: CausalSelfAttention, state: Any, target: Tensor) -> None:
    """Keys become tiles of 16 positions, values tiles of 16 coordinates, both at the start of their room."""
    length, heads = state.length, mixer.num_kv_heads
    key, value = (state.buffers[name][0, :, :length].to(target.dtype) for name in ("key", "value"))
    key = F.pad(key, (0, -mixer.head_dim % COLUMNS, 0, -length % LANES)).unflatten(1, (-1, LANES))
    value = F.pad(value.mT, (0, -length % COLUMNS, 0, -mixer.head_dim % LANES)).unflatten(1, (-1, LANES))
    key, value = _side_by_side(key), _side_by_side(value)
    widths = [_padded(mixer.head_dim, COLUMNS), _padded(mixer.head_dim)]
    keys, values = target.split([target.numel() // sum(widths) * width for width in widths])
    keys.view(heads, -1, *key.shape[2:])[:, : key.shape[1]] = key
    values.view(heads, value.shape[1], -1, *value.shape[3:])[:, :, : value.shape[2]] = value


def _load_scan(mixer: S6, state: Any, target: Tensor) -> None:
    target = target.view(-1, _padded(mixer.d_inner))[:, : mixer.d_inner]
    target[: mixer.d_conv - 1] = state["window"][0].t()
    target[mixer.d_conv - 1 :] = state["scan"][0].t()
