"""Models of other projects at our sizes, with our weights in them."""

from __future__ import annotations

from types import ModuleType


def hugging_face() -> ModuleType:
    """The transformers package, without its advice to install CUDA kernels."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers
