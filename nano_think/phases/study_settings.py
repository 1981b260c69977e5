"""What a study may be asked: settings and text with which it cannot end well are refused before the first fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nano_think.data.sampler import mixing_shares
from nano_think.data.shards import Shards
from nano_think.errors import UserError

# the least that each number may be
LEAST = {"expert_tokens": 1, "fusion_tokens": 1, "evidence_tokens": 10, "pool": 2, "workers": 1, "rows": 1}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise UserError for values of the `study` node that mean nothing."""
    for key, least in LEAST.items():
        value = settings[key]
        if key == "rows" and value is None:
            continue
        if not _whole(value) or value < least:
            raise UserError(f"study.{key}={value} is not a whole number of at least {least}")
    seeds = settings["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(_whole(seed) and seed >= 0 for seed in seeds):
        raise UserError(f"study.seeds={seeds} names no seeds: give whole numbers from 0 on, as [1, 2, 3]")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"study.seeds={seeds} names a seed twice, which would count as two: name each once")
    tuning = settings["tuning"]
    for key in ("factors", "fusion_factors"):
        if not tuning[key] or not all(factor > 0 for factor in tuning[key]):
            raise UserError(f"study.tuning.{key}={tuning[key]}: give at least one factor, all above 0")
    if not all(0 <= dropout < 1 for dropout in tuning["dropouts"]):
        raise UserError(
            f"study.tuning.dropouts={tuning['dropouts']}: give shares of units, from 0 to below 1"
        )
    if not all(0 < horizon <= 1 for horizon in tuning["horizons"]):
        raise UserError(
            f"study.tuning.horizons={tuning['horizons']}: give shares of a budget, above 0, at most 1"
        )
    if not 0 < tuning["share"] <= 1:
        raise UserError(f"study.tuning.share={tuning['share']} is no share: give a number above 0, at most 1")


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


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
