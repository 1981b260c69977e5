"""Leaky options: literal readings of the plan in which what is said about a token depends on later ones.

They are there to be analysed, and as positive controls of the leak audit. Training refuses them, and every output
that shows a likelihood or a text made with them carries a mark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def leaks(model: nn.Module, retriever: Any = None) -> list[str]:
    """The leaky options that are on in a model and in the memory it reads, in words; empty for a causal model.

    A part, or the retriever, names its own in an attribute `leaks`.
    """
    found = [leak for part in (*model.modules(), retriever) for leak in getattr(part, "leaks", [])]
    return list(dict.fromkeys(found))


def refusal(found: Sequence[str]) -> str:
    """What training says to `leaks` that it found."""
    return f"{'; '.join(found)}: train without, that is for analysis alone"


def mark(found: Sequence[str]) -> str:
    """The line that outputs carry for what `leaks` found, "" where that is nothing."""
    return f"NOT CAUSAL: {'; '.join(found)}" if found else ""
