"""Text with which a study cannot end well is refused before its first fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nano_think.data.sampler import mixing_shares
from nano_think.data.shards import Shards
from nano_think.errors import UserError


def check_text(shards: Shards, settings: Mapping[str, Any], loader: Mapping[str, Any], seq_len: int) -> None:
    """Raise UserError where a split holds less text than the models are to read of it.

    What is short would be read twice by some models and not by others.
    loader: `mixing` and `temperature` of `data`.
    """
    fusion = settings["fusion_tokens"]
    for split, tokens in (("expert_train", settings["expert_tokens"] + fusion), ("fusion_train", fusion)):
        held = [shards.num_tokens(split, domain) for domain in shards.domains]
        try:
            shares = mixing_shares(held, loader["mixing"], loader["temperature"], shards.domains)
        except UserError as error:
            raise UserError(f"{split}: {error}") from None
        short = [
            f"{domain} ({there:,} of {tokens * share:,.0f})"
            for domain, share, there in zip(shards.domains, shares, held, strict=True)
            if there + seq_len < tokens * share  # rows are whole, which costs less than one
        ]
        if short:
            raise UserError(
                f"the study reads more tokens of {split} than these domains hold: {', '.join(short)}. Lower "
                "study.expert_tokens or study.fusion_tokens, or add text"
            )
    for split in ("validation", "test"):
        if shards.num_tokens(split) == 0:
            raise UserError(f"the {split} split holds no text, so nothing could be measured: add documents")
