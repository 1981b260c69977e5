"""Generation with coarse weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nano_think.engine.generate import Generation, generate
from nano_think.engine.native_step import supports
from nano_think.engine.sampling import SamplingConfig
from nano_think.nn.quantized import Kind, quantize, require_finite
from nano_think.ops.native import BuildError, find_compiler


def generate_quantized(
    model: Any,
    kind: Kind,
    prompts: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    config: SamplingConfig | None = None,
    **options: Any,
) -> Generation:
    """`generate` with the matrices kept in `kind`; the model itself stays as it is.

    Without memory and options it goes by the native step where that knows the model: the prompt is then read with
    the weights as they are. Everything else goes by a copy with coarse layers.
    options: of `generate`. Raises UserError for weights that cannot be quantised.
    """
    if _native_can(model, options):
        require_finite(model)
        return generate(model, prompts, max_new_tokens, config, native=True, precision=kind, **options)
    return generate(quantize(copy.deepcopy(model), kind), prompts, max_new_tokens, config, **options)


def _native_can(model: Any, options: dict[str, Any]) -> bool:
    if options.get("memory") is not None or options.get("options"):
        return False
    try:
        find_compiler()
    except BuildError:
        return False
    return supports(model) is None
