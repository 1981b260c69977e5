"""Generation with coarse weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nano_think.engine.generate import Generation, generate
from nano_think.engine.sampling import SamplingConfig
from nano_think.nn.quantized import Kind, quantize


def generate_quantized(
    model: Any,
    kind: Kind,
    prompts: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    config: SamplingConfig | None = None,
    **options: Any,
) -> Generation:
    """`generate` by a copy of the model whose matrices are kept in `kind`; the model itself stays as it is.

    options: of `generate`. Raises UserError for weights that cannot be quantised.
    """
    return generate(quantize(copy.deepcopy(model), kind), prompts, max_new_tokens, config, **options)
