"""The next tokens from their logits by one native call, `native_choice.h`; `sampling.choose` is its reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nano_think.engine.native_library import load_library
from nano_think.engine.sampling import SamplingConfig, require_drawable, uniforms
from nano_think.ops.native import address, threads


def choose(
    logits: Tensor, config: SamplingConfig, generators: Sequence[torch.Generator]
) -> tuple[list[int], list[float]]:
    """As `sampling.choose` of fp32 logits (B, V) on the CPU, from the same random numbers.

    Probabilities agree to about 1e-6 of each: a draw differs where its number falls that close to a border.
    Raises ValueError where a row has no finite logit or one that is no number, BuildError without a compiler.
    """
    if logits.stride(1) != 1 or logits.dtype != torch.float32:
        logits = logits.float().contiguous()
    rows, vocab_size = logits.shape
    drawn = None if config.temperature == 0 else uniforms(generators)
    tokens = torch.empty(rows, dtype=torch.int64)
    logprobs = torch.empty(rows, dtype=torch.float64)
    load_library().choose_tokens(
        *(logits.data_ptr(), rows, vocab_size, logits.stride(0)),
        *(config.temperature, config.top_k or 0, config.top_p, address(drawn)),
        *(tokens.data_ptr(), logprobs.data_ptr(), min(rows, threads())),
    )
    chosen = tokens.tolist()
    require_drawable(min(chosen) >= 0)
    return chosen, logprobs.tolist()
