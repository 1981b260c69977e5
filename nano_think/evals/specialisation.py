"""Who is good at what, and does the router know: experts, weights and losses of single tokens.

Letters: T tokens, M documents, N experts. A gain or an advantage is in nats a token, positive where it helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nano_think.evals.correlation import Moments
from nano_think.evals.ratios import Floats, Ints, correlation_interval, mean_interval, number, plain, sums_of
from nano_think.evals.routing import DocumentWeights, analyse_routing, knockout_matrix
from nano_think.evals.tokens import CLASSES, TokenTable

Groups = dict[str, NDArray[np.bool_]]


def specialisation(
    table: TokenTable, domains: Sequence[str], *, n_resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """All evidence of specialisation that a table of tokens holds, as plain values.

    domains: names in the order of the domain index. Intervals are over documents.

    Returns:
        loss, information, knock_out, correlation, error_correlation, weights, best, by_class and oracle, see the
        functions below; best_single is the expert with the lowest loss.
    """
    bootstrap = {"n_resamples": n_resamples, "seed": seed}
    names = table.experts
    by_domain = {name: table.domain == i for i, name in enumerate(domains)}
    by_class = {name: table.token_class == i for i, name in enumerate(CLASSES)}
    by_domain, by_class = ({k: v for k, v in g.items() if v.any()} for g in (by_domain, by_class))
    best = int(table.nll.mean(0).argmin())
    groups = {"all": {"all": np.ones(len(table), bool)}, "domain": by_domain, "class": by_class}
    leads = np.eye(len(names))[table.nll.argmin(1)]
    return {
        "tokens": len(table),
        "documents": len(table.uid),
        "experts": names,
        "domains": list(by_domain),
        "classes": list(by_class),
        "loss": {"fused": float(table.fused.mean())} | _named(names, table.nll.mean(0)),
        "best_single": names[best],
        "information": information(table, len(domains), **bootstrap),
        "knock_out": knock_out(table, domains, **bootstrap),
        "correlation": weight_correlations(table, **bootstrap),
        "error_correlation": error_correlation(table),
        "weights": _means(table.weights, names, groups) | {"position": weights_by_position(table)},
        "best": _means(leads, names, groups),
        "by_class": {name: _class_row(table, mask, best, bootstrap) for name, mask in by_class.items()},
        "oracle": oracle_gains(table, {"class": by_class, "domain": by_domain}, **bootstrap),
    }


def information(table: TokenTable, num_domains: int, **bootstrap: int) -> dict[str, Any]:
    """I(domain; expert) of the router in nats, and its p_value and mean_by_chance under permuted documents."""
    weights = DocumentWeights(
        uid=table.uid,
        domain=table.losses(table.fused, num_domains).domain,
        sum_weights=sums_of(table.weights, table.document, len(table.uid)),
        num_tokens=np.bincount(table.document, minlength=len(table.uid)),
        num_domains=num_domains,
    )
    found = analyse_routing(weights, **bootstrap)
    chance = {"p_value": found.test.p_value, "mean_by_chance": float(found.test.null.mean())}
    return plain(found.information) | chance


def knock_out(table: TokenTable, domains: Sequence[str], **bootstrap: int) -> dict[str, Any]:
    """Loss added without each expert, over "all" and by domain: {expert: {column: interval}}."""
    full = table.losses(table.fused, len(domains))
    without = {name: table.losses(table.without[:, i], len(domains)) for i, name in enumerate(table.experts)}
    matrix = knockout_matrix(full, without, domains, **bootstrap)
    return {
        expert: {column: plain(difference) for column, difference in row.items()}
        for expert, row in matrix.items()
    }


def advantages(table: TokenTable) -> tuple[Floats, Floats]:
    """What each expert is worth at each token, (T, N) twice.

    Alone: loss of the best other expert minus its own. Knock-out: loss of the mixture without it minus that with.
    """
    alone = np.empty_like(table.nll)
    for i in range(len(table.experts)):
        alone[:, i] = np.delete(table.nll, i, axis=1).min(1) - table.nll[:, i]
    return alone, table.without - table.fused[:, None]


def weight_correlations(table: TokenTable, **bootstrap: int) -> dict[str, Any]:
    """Pearson correlation of an expert's weight with its advantages at the same tokens, {expert: {kind: I}}.

    *_within_domain: after both have lost their mean of the domain, so that a router which knows nothing but the
    domain has none. None where a router gives every token the same weight.
    """
    _, domain = np.unique(table.domain, return_inverse=True)
    rows = {}
    for i, name in enumerate(table.experts):
        kinds = zip(("alone", "knock_out"), advantages(table), strict=True)
        rows[name] = {
            kind + suffix: correlation_interval(
                table.weights[:, i], advantage[:, i], table.document, group, **bootstrap
            )
            for kind, advantage in kinds
            for suffix, group in (("", None), ("_within_domain", domain))
        }
    return rows


def error_correlation(table: TokenTable) -> dict[str, dict[str, float | None]]:
    """Pearson correlation of the experts' losses over tokens: 1 where they fail at the same ones alike."""
    moments = Moments(len(table.experts))
    moments.add(table.nll)
    found = moments.correlation(table.experts, len(table))
    return {name: _named(table.experts, row) for name, row in zip(found.names, found.matrix, strict=True)}


def weights_by_position(table: TokenTable) -> list[dict[str, Any]]:
    """Mean weights by position in the document fragment, in buckets 0, 1, 2-3, 4-7 and so on."""
    bucket = np.frexp(table.position.astype(np.float64))[1]  # 0 for 0, k for 2^(k-1) .. 2^k - 1
    return [
        {
            "from": 2 ** (k - 1) if k else 0,
            "to": 2**k - 1 if k else 0,
            "tokens": int((bucket == k).sum()),
            "weights": _named(table.experts, table.weights[bucket == k].mean(0)),
        }
        for k in np.unique(bucket).tolist()
    ]


def oracle_gains(table: TokenTable, partitions: dict[str, Groups], **bootstrap: int) -> dict[str, Any]:
    """Loss of the best single expert minus that of the best expert of each token, and of each group of tokens.

    Upper bounds of what choosing an expert can gain: the choice knows the answers. The gain by token is large
    even for experts that differ by chance alone, since the best of several draws is better than their mean.
    The choice by group is made on these very tokens.
    """
    single = table.nll[:, table.nll.mean(0).argmin()]
    gains = {"token": single - table.nll.min(1)}
    for name, groups in partitions.items():
        chosen = np.empty_like(single)
        for mask in groups.values():
            chosen[mask] = table.nll[mask, table.nll[mask].mean(0).argmin()]
        gains[name] = single - chosen
    return {name: mean_interval(gain, table.document, None, **bootstrap) for name, gain in gains.items()}


def _class_row(
    table: TokenTable, mask: NDArray[np.bool_], best: int, bootstrap: dict[str, int]
) -> dict[str, Any]:
    """Losses inside one class, differences to the expert that is best overall, and what an oracle would gain."""
    document: Ints = table.document
    single, losses = table.nll[:, best], table.nll[mask].mean(0)
    return {
        "tokens": int(mask.sum()),
        "share": float(mask.mean()),
        "fused": float(table.fused[mask].mean()),
        "loss": _named(table.experts, losses),
        "minus_best_single": {
            name: mean_interval(table.nll[:, i] - single, document, mask, **bootstrap)
            for i, name in enumerate(table.experts)
        },
        "oracle_gain": mean_interval(single - table.nll.min(1), document, mask, **bootstrap),
    }


def _means(values: Floats, names: list[str], partitions: dict[str, Groups]) -> dict[str, Any]:
    """Mean of values (T, N) by partition and group; "all" has no groups."""
    found: dict[str, Any] = {
        partition: {name: _named(names, values[mask].mean(0)) for name, mask in groups.items()}
        for partition, groups in partitions.items()
    }
    return found | {"all": found["all"]["all"]}


def _named(names: list[str], values: Floats) -> dict[str, float | None]:
    return {name: number(value) for name, value in zip(names, values, strict=True)}
