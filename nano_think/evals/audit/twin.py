"""The tiny twin of a network: the same parts and options, small enough to train inside a test."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from nano_think.artifacts.build import build, locate
from nano_think.evals.audit.trained import Twin
from nano_think.model import ExpertLM

D_MODEL = 32
# Upper bounds of what a twin keeps of the original's sizes.
BOUNDS = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "ffn_dim": 48, "d_inner": 48, "d_state": 4}
BOUNDS |= {"fused_steps": 2, "max_positions": 256}
# Dimensions that the network derives from the others where they are not given.
DERIVED = ("latent_dim", "head_dim", "rope_dim", "dt_rank")


def twin_of(spec: Mapping[str, Any]) -> Twin:
    """Makes tiny untrained networks of the kind of `spec`, the notation of an expert or of a `NanoThink`.

    Sizes are cut, options stay. Dropout is off: what a random-token loss has to show is small.
    """

    def twin(vocab_size: int) -> Any:
        small = _small(spec, vocab_size)
        return build(small) if "experts" in spec else ExpertLM((vocab_size, D_MODEL), build(small))

    return twin


def _small(spec: Any, vocab_size: int) -> Any:
    if isinstance(spec, list | tuple):
        return [_small(value, vocab_size) for value in spec]
    if not isinstance(spec, Mapping):
        return spec
    values = {key: _small(value, vocab_size) for key, value in spec.items()}
    fixed = {"d_model": D_MODEL, "embedding_dim": D_MODEL, "vocab_size": vocab_size, "dropout": 0.0}
    fixed |= {"num_embeddings": vocab_size}
    for key, value in values.items():
        if key in fixed:
            values[key] = fixed[key]
        elif key in BOUNDS and isinstance(value, int):
            values[key] = min(value, BOUNDS[key])
    if "_target_" in values:
        parameters = inspect.signature(locate(values["_target_"])).parameters
        for key in DERIVED:
            if key in values and key in parameters and parameters[key].default is None:
                values[key] = None
    return values
