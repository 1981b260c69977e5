"""Planted experts: one knows words, one knows code symbols, one knows nothing."""

import json

import numpy as np
import pytest

from nano_think.evals.specialisation import advantages, oracle_gains, specialisation, weights_by_position
from nano_think.evals.tokens import CLASSES, TokenTable

WORD, CODE = CLASSES.index("word_start"), CLASSES.index("code_symbol")


def planted(knows="token", documents=60, length=40, seed=0):
    """Expert a is right on words (1 nat against 4), b on code; the mixture is the weighted loss.

    knows: the router trusts by the `token`, by the `domain` (0 is mostly words), or `nothing`.
    """
    rng = np.random.default_rng(seed)
    document = np.repeat(np.arange(documents), length)
    domain = document % 2
    is_code = rng.random(len(document)) < np.where(domain == 1, 0.8, 0.2)
    noise = 0.1 * rng.normal(size=(len(document), 3))
    nll = np.stack([np.where(is_code, 4.0, 1.0), np.where(is_code, 1.0, 4.0), np.full(len(document), 5.0)], 1)
    nll += noise
    trust = {"token": is_code, "domain": domain == 1, "nothing": np.zeros(len(document))}[knows]
    trust = 0.9 * np.clip(np.asarray(trust, float), 0.1, 0.9)
    if knows == "nothing":
        trust = np.full(len(document), 0.45)
    weights = np.stack([0.9 - trust, trust, np.full(len(document), 0.1)], 1)

    def without(i):
        kept = weights * (np.arange(3) != i)
        return (kept / kept.sum(1, keepdims=True) * nll).sum(1)

    return TokenTable(
        experts=["a", "b", "c"],
        uid=np.arange(documents) + 7,
        document=document,
        domain=domain,
        position=np.tile(np.arange(length), documents),
        token_class=np.where(is_code, CODE, WORD),
        weights=weights,
        nll=nll,
        fused=(weights * nll).sum(1),
        without=np.stack([without(i) for i in range(3)], 1),
    )


def test_planted_experts_are_found():
    table = planted()
    found = specialisation(table, ["prose", "code", "unseen"], n_resamples=200)
    json.dumps(found, allow_nan=False)
    assert found["domains"] == ["prose", "code"]
    assert found["classes"] == ["word_start", "code_symbol"]
    words, code = found["by_class"]["word_start"], found["by_class"]["code_symbol"]
    assert words["loss"]["a"] == pytest.approx(1, abs=0.02)
    assert code["loss"]["a"] == pytest.approx(4, abs=0.02)
    assert words["tokens"] + code["tokens"] == found["tokens"] == len(table)
    other = {"a": "b", "b": "a"}[found["best_single"]]
    good = {"a": code, "b": words}[found["best_single"]]  # where the other one is better
    assert good["minus_best_single"][other]["estimate"] == pytest.approx(-3, abs=0.05)
    assert good["oracle_gain"]["estimate"] == pytest.approx(3, abs=0.05)
    assert found["best"]["class"]["word_start"] == {"a": 1.0, "b": 0.0, "c": 0.0}
    assert found["best"]["all"]["c"] == 0
    assert found["best"]["domain"]["code"]["b"] == pytest.approx(0.8, abs=0.05)
    assert found["knock_out"]["a"]["prose"]["low"] > 0
    assert found["knock_out"]["a"]["prose"]["estimate"] > found["knock_out"]["a"]["code"]["estimate"]
    assert (
        found["knock_out"]["c"]["all"]["high"] < 0
    )  # the mixture is better without the one that knows nothing
    assert found["error_correlation"]["a"]["b"] < -0.95
    assert found["error_correlation"]["a"]["a"] == pytest.approx(1)
    assert found["weights"]["class"]["code_symbol"]["b"] == pytest.approx(0.81)


def test_information_of_the_domain_is_held_against_chance():
    known, blind = (
        specialisation(planted(knows), ["prose", "code"], n_resamples=50)["information"]
        for knows in ("domain", "nothing")
    )
    # weights 0.81 and 0.09 change places between two domains of the same size
    mean, own = np.array([0.45, 0.45, 0.1]), np.array([0.81, 0.09, 0.1])
    assert known["estimate"] == pytest.approx(
        (own * np.log(own)).sum() - (mean * np.log(mean)).sum(), abs=1e-6
    )
    assert known["p_value"] < 0.01
    assert known["mean_by_chance"] < known["estimate"] / 5
    assert blind["estimate"] == pytest.approx(0, abs=1e-12)


def test_correlation_tells_what_the_router_knows():
    by_token, by_domain, blind = (
        specialisation(planted(knows), ["prose", "code"], n_resamples=100)["correlation"]
        for knows in ("token", "domain", "nothing")
    )
    assert by_token["a"]["alone"]["low"] > 0.95
    assert by_token["a"]["alone_within_domain"]["low"] > 0.95
    assert by_token["b"]["knock_out"]["low"] > 0.5
    assert 0.4 < by_domain["a"]["alone"]["estimate"] < 0.8
    assert by_domain["a"]["alone_within_domain"]["estimate"] is None
    assert blind["a"]["alone"]["estimate"] is None
    assert by_token["c"]["alone"]["estimate"] is None  # its weight never changes


def test_advantages_by_hand():
    table = planted(documents=2, length=2)
    alone, knocked = advantages(table)
    token = table.nll[1]
    assert alone[1].tolist() == pytest.approx([
        min(token[1], token[2]) - token[0],
        min(token[0], token[2]) - token[1],
        min(token[0], token[1]) - token[2],
    ])  # fmt: skip
    assert knocked[1, 2] == pytest.approx(table.without[1, 2] - table.fused[1])
    # exactly one expert is ahead of the best other one
    assert ((alone > 0).sum(1) == 1).all()


def test_oracles_by_hand():
    table = planted()
    classes = {"words": table.token_class == WORD, "code": table.token_class == CODE}
    domains = {"prose": table.domain == 0, "code": table.domain == 1}
    found = oracle_gains(table, {"class": classes, "domain": domains}, n_resamples=50)
    single = table.nll.mean(0).min()
    assert found["token"]["estimate"] == pytest.approx(single - table.nll.min(1).mean())
    by_domain = np.mean([table.nll[mask].mean(0).min() for mask in domains.values()])
    assert found["domain"]["estimate"] == pytest.approx(single - by_domain)
    assert found["class"]["estimate"] == pytest.approx(single - 1.0, abs=0.02)
    assert found["token"]["low"] > found["domain"]["high"] > 0


def test_positions_fall_into_buckets_that_double():
    table = planted(documents=2, length=9)
    rows = weights_by_position(table)
    assert [(row["from"], row["to"]) for row in rows] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    assert [row["tokens"] for row in rows] == [2, 2, 4, 8, 2]
    mask = (table.position >= 4) & (table.position < 8)
    assert rows[3]["weights"]["b"] == pytest.approx(table.weights[mask, 1].mean())
