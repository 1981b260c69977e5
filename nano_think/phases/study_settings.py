"""Text and ablations with which a study cannot end well are refused before its first fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nano_think.data.packing import RowReader
from nano_think.data.sampler import DomainSampler, mixing_shares, row_limits
from nano_think.data.shards import Shards
from nano_think.errors import UserError

# What an ablation can be asked beside its losses, as the study's own models are: whether its experts share a
# space, and what denoising steps are worth to its diffuser.
EVIDENCE = ("spaces", "steps_curve")


def check_text(shards: Shards, settings: Mapping[str, Any], loader: Mapping[str, Any], seq_len: int) -> None:
    """Raise UserError where a split holds less text than the models are to read of it.

    What is short would be read twice by some models and not by others.
    loader: `mixing` and `temperature` of `data`.
    """
    fusion = settings["fusion_tokens"]
    for split, tokens in (("expert_train", settings["expert_tokens"] + fusion), ("fusion_train", fusion)):
        if short := _short(shards, split, tokens, loader, seq_len):
            raise UserError(
                f"the study reads more tokens of {split} than these domains hold: {short}. Lower "
                "study.expert_tokens or study.fusion_tokens, or add text"
            )
    for split in ("validation", "test"):
        if shards.num_tokens(split) == 0:
            raise UserError(f"the {split} split holds no text, so nothing could be measured: add documents")


def check_reading(shards: Shards, fit: Mapping[str, Any]) -> None:
    """Raise UserError where a fit would read more text than there is, or a part of it that does not exist.

    fit: the spec of a fit, see `Fit.spec`.
    """
    loader, split, seq_len = fit["loader"], fit["split"], fit["seq_len"]
    if "train_tokens" not in loader:
        raise UserError("a study says how much text every fit reads: leave data.train_tokens a number")
    if short := _short(shards, split, loader["train_tokens"], loader, seq_len):
        raise UserError(f"it reads more tokens of {split} than these domains hold: {short}")
    rows = dict(
        zip(shards.domains, RowReader(shards, split, seq_len, loader["mode"]).rows_per_domain, strict=True)
    )
    mixing = (loader["mixing"], loader["temperature"])
    limits = row_limits(rows, loader["train_tokens"], seq_len, *mixing)
    DomainSampler(rows, *mixing, fit["seed"], limits, loader["train_part"])


def _short(shards: Shards, split: str, tokens: int, loader: Mapping[str, Any], seq_len: int) -> str:
    """The domains that hold less than their share of so many tokens, with what they hold."""
    held = [shards.num_tokens(split, domain) for domain in shards.domains]
    try:
        shares = mixing_shares(held, loader["mixing"], loader["temperature"], shards.domains)
    except UserError as error:
        raise UserError(f"{split}: {error}") from None
    return ", ".join(
        f"{domain} ({there:,} of {tokens * share:,.0f})"
        for domain, share, there in zip(shards.domains, shares, held, strict=True)
        if there + seq_len < tokens * share  # rows are whole, which costs less than one
    )


def check_ablations(settings: Mapping[str, Any]) -> None:
    """Raise UserError for ablations that are not what `study_ablations` takes, and for widths that are none."""
    widths = settings["widths"]
    asked = {} if settings["ablations"] is None else settings["ablations"]
    if not isinstance(widths, list) or not all(_whole(width) and width > 0 for width in widths):
        raise UserError(f"study.widths={widths} names no widths: give whole numbers, as [96, 192], or []")
    if len(set(widths)) < len(widths):
        raise UserError(f"study.widths={widths} names a width twice: name each once")
    if not isinstance(asked, dict):
        raise UserError(
            f"study.ablations={asked} is no mapping from names to what is changed: see docs/study.md"
        )
    for name, one in asked.items():
        where = f"study.ablations.{name}"
        if not re.fullmatch(r"[a-z][a-z0-9_]*", str(name)) or str(name).startswith(("again_", "width_")):
            raise UserError(
                f"{where}: a name has small letters, digits and underscores, and begins with neither again_ nor "
                "width_"
            )
        known = {"what": str, "overrides": list, "stage": str | None, "against": str | None, "evidence": list}
        wrong = not isinstance(one, dict) or not {"what", "overrides"} <= one.keys() <= known.keys()
        if wrong or any(not isinstance(one[key], known[key]) for key in one) or not one["overrides"]:
            raise UserError(
                f"{where} has what (one line), overrides (a list of key=value), perhaps stage, against and "
                "evidence (a list), and nothing else"
            )
        if bad := [line for line in one["overrides"] if not isinstance(line, str) or "=" not in line]:
            raise UserError(f"{where}: {bad[0]!r} is not a setting: write key=value")
        if bad := [topic for topic in one.get("evidence", []) if topic not in EVIDENCE]:
            raise UserError(f"{where}: evidence {bad[0]!r} is not one of {', '.join(EVIDENCE)}")
        if one.get("stage") not in (None, "7c", "7d"):
            raise UserError(f"{where}: stage={one['stage']} is not one of 7c, 7d")
        if (against := one.get("against")) is not None and (against == name or against not in asked):
            raise UserError(f"{where}: against={against} is no other ablation")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
