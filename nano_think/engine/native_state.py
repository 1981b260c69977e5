"""The decode state of the native step: its size, and copies of states that the plain model has filled."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_think.engine.native_library import COLUMNS, LANES, padded
from nano_think.engine.native_parts import blocks_of
from nano_think.mla import MultiHeadLatentAttention
from nano_think.nn.mixers.attention import CausalSelfAttention
from nano_think.nn.mixers.latent_attention import LatentHeads
from nano_think.nn.mixers.s6 import S6


def layers_of(network: Any) -> list[Any]:
    """What of a network keeps a state, in the order in which the step meets it."""
    if type(network) is MultiHeadLatentAttention:
        return [network.attention.heads]
    return [block.mixer for block in blocks_of(network)]


def state_bytes(layer: Any, max_len: int, dtype: torch.dtype) -> int:
    """Bytes of one row's state of a layer: fp32 of a scan, keys and values of type `dtype`."""
    if type(layer) is S6:
        return (layer.d_conv - 1 + layer.d_state) * padded(layer.d_inner) * 4
    groups, width, depth = _entries(layer)
    return groups * padded(max_len) * (padded(width, COLUMNS) + padded(depth)) * dtype.itemsize


def load_layer(layer: Any, state: Any, target: Tensor, dtype: torch.dtype) -> None:
    """Copy a layer's plain state of B rows to `target` (B, bytes), whose further entries are left as they are.

    Raises ValueError for another number of rows.
    """
    rows = len(next(iter((state.values if type(layer) is S6 else state.buffers).values())))
    if rows != len(target):
        raise ValueError(f"the state holds {rows} rows, the native step {len(target)}")
    if type(layer) is S6:
        scan = target.view(torch.float32).unflatten(1, (-1, padded(layer.d_inner)))[..., : layer.d_inner]
        scan[:, : layer.d_conv - 1] = state["window"].mT
        scan[:, layer.d_conv - 1 :] = state["scan"].mT
        return
    if isinstance(layer, LatentHeads):
        latent, rope_key = (state.buffers[name][:, : state.length] for name in ("latent", "rope_key"))
        keys, values = torch.cat((latent, rope_key), dim=-1).unsqueeze(1), latent.unsqueeze(1)
    else:
        keys, values = (state.buffers[name][:, :, : state.length] for name in ("key", "value"))
    _load_keys_values(keys.to(dtype), values.to(dtype), target.view(dtype))


def _entries(layer: Any) -> tuple[int, int, int]:
    """Groups of heads that share keys and values, numbers of a key, numbers of a value."""
    if isinstance(layer, LatentHeads):
        return 1, layer.latent_dim + layer.rope_dim, layer.latent_dim
    groups = layer.num_kv_heads if isinstance(layer, CausalSelfAttention) else layer.num_heads
    return groups, layer.head_dim, layer.head_dim


def _load_keys_values(keys: Tensor, values: Tensor, target: Tensor) -> None:
    """(B, groups, n, width) become tiles of 16 positions, (B, groups, n, depth) tiles of 16 coordinates."""
    (_, groups, length, width), depth = keys.shape, values.shape[3]
    keys = F.pad(keys, (0, -width % COLUMNS, 0, -length % LANES)).unflatten(2, (-1, LANES))
    values = F.pad(values.mT, (0, -length % COLUMNS, 0, -depth % LANES)).unflatten(2, (-1, LANES))
    keys, values = _side_by_side(keys), _side_by_side(values)
    widths = padded(width, COLUMNS), padded(depth)
    all_keys, all_values = target.split([target.shape[1] // sum(widths) * w for w in widths], dim=1)
    all_keys.unflatten(1, (groups, -1, *keys.shape[3:]))[:, :, : keys.shape[2]] = keys
    all_values.unflatten(1, (groups, values.shape[2], -1, *values.shape[4:]))[:, :, :, : values.shape[3]] = (
        values
    )


def _side_by_side(rows: Tensor) -> Tensor:
    """(..., LANES, cols) to (..., cols / g, LANES, g) for g columns in four bytes (in one float)."""
    return rows.unflatten(-1, (-1, 4 // rows.element_size())).transpose(-3, -2)
