"""Do the experts share a space? CKA, cosines and linear probes between their outputs and the input table.

Letters: T tokens, d, p and q features, N spaces, M documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nano_think.evals.losses import Batch
from nano_think.evals.ratios import Floats, Ints, interval, mean_interval, number, sums_of
from nano_think.evals.tokens import CLASSES
from nano_think.model import NanoThink
from nano_think.nn.block import ExpertInput
from nano_think.ops.layout import Layout

CKA_VARIANT = "linear, debiased (Kornblith et al. 2019 with the unbiased HSIC of Song et al. 2012)"
INPUT = "input"


def shared_spaces(
    model: NanoThink,
    batches: Sequence[Batch],
    classes: NDArray[np.int64],
    domains: Sequence[str],
    *,
    penalty: float = 1e-3,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """How the experts' output spaces and the input table relate on held-out text, entry adaptors on and off.

    classes: (V,) of `token_classes`. domains: names in the order of the domain index.
    penalty: of the ridge probes, see `ridge`.

    Returns:
        tokens, documents, spaces, adaptor_distance (|W - I| / |I| of each entry adaptor), and under
        with_adaptors and without_adaptors what `compare_spaces` says, with the loss of every expert alone. Of a
        model that was built without them only the latter.
    """
    with entry_adaptors_bypassed(model):
        states = collect_states(model, batches, classes)
    distances = adaptor_distances(model)
    settings = {"without_adaptors": states}
    if distances:
        settings = {"with_adaptors": collect_states(model, batches, classes), **settings}
    compared = {
        name: compare_spaces(found, penalty, n_resamples=n_resamples, seed=seed)
        for name, found in settings.items()
    }
    return {
        "tokens": len(states.document),
        "documents": int(states.document.max()) + 1,
        "spaces": list(states.spaces),
        "classes": [CLASSES[i] for i in np.unique(states.token_class)],
        "domains": [domains[i] for i in np.unique(states.domain)],
        "cka_variant": CKA_VARIANT,
        "adaptor_distance": distances,
        **compared,
    }


@dataclass(frozen=True)
class States:
    """Vectors of the scored tokens.

    Attributes:
        spaces: by name (T, d): the row of the input table, then the output of every expert.
        loss: nats a token of every expert alone.
        document: (T,) 0 .. M-1. domain: (T,). token_class: (T,) of the next token.
    """

    spaces: dict[str, NDArray[np.float32]]
    loss: dict[str, float]
    document: Ints
    domain: Ints
    token_class: Ints


@torch.no_grad()
def collect_states(model: NanoThink, batches: Iterable[Batch], classes: NDArray[np.int64]) -> States:
    """Read the batches once. Raises ValueError where they hold no scored token."""
    parts: dict[str, list[Tensor]] = {}
    for batch in batches:
        scored = batch["labels"] >= 0
        _, hidden = model.expert_outputs(batch["tokens"], Layout(batch["positions"], batch["segments"]))
        found = {INPUT: model.embedding(batch["tokens"]), **hidden}
        found |= {
            "/nll": model.expert_nll(hidden, batch["labels"]),
            "/uid": batch["doc_uid"],
            "/domain": batch["domain"].unsqueeze(1).expand_as(scored),
            "/label": batch["labels"],
        }
        for name, value in found.items():
            parts.setdefault(name, []).append(value[scored].cpu())
    if not parts or not sum(map(len, parts["/uid"])):
        raise ValueError("The batches hold no scored token: check the split and its size.")
    table = {name: torch.cat(values).numpy() for name, values in parts.items()}
    losses = zip(model.expert_names, table["/nll"].mean(0, dtype=np.float64).tolist(), strict=True)
    return States(
        spaces={name: table[name] for name in (INPUT, *model.expert_names)},
        loss=dict(losses),
        document=np.unique(table["/uid"], return_inverse=True)[1],
        domain=table["/domain"],
        token_class=classes[table["/label"]],
    )


@contextmanager
def entry_adaptors_bypassed(model: NanoThink) -> Iterator[None]:
    """Inside, every expert reads the normalised embedding itself, as if its entry adaptor were the identity."""
    entries = [module for module in model.experts.modules() if isinstance(module, ExpertInput)]
    kept = [entry.adaptor for entry in entries]
    try:
        for entry in entries:
            entry.adaptor = nn.Identity()
        yield
    finally:
        for entry, adaptor in zip(entries, kept, strict=True):
            entry.adaptor = adaptor


def adaptor_distances(model: NanoThink) -> dict[str, float]:
    """|W - I| / |I| (Frobenius) of every entry adaptor there is: 0 where it is still the identity."""
    distances = {}
    for name, expert in model.experts.items():
        for module in expert.modules():
            if isinstance(module, ExpertInput) and not isinstance(module.adaptor, nn.Identity):
                weight = module.matrix.detach().double()
                eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
                distances[name] = float((weight - eye).norm() / eye.norm())
    return distances


def compare_spaces(states: States, penalty: float, *, n_resamples: int, seed: int) -> dict[str, Any]:
    """Pairs of spaces, {a: {b: value}}, and what a linear probe reads out of each.

    cka: 1 for spaces that agree up to rotation and scale, about 0 for independent ones. cka_shuffled: the same
    after the tokens of one have been mixed up, which is chance. cosine: mean cosine of the two vectors of a
    token, each space centred; it needs the same basis, as the fusion does.
    r2[a][b]: share of the variance of b that a linear map of a explains on documents it was not fitted on.
    *_accuracy: of a linear classifier, of the class of the next token and of the domain of the document, beside
    *_majority, the share of the answer that is most frequent in the half it was fitted on.
    """
    rng = np.random.default_rng(seed)
    centred = {name: _centred(space) for name, space in states.spaces.items()}
    order = rng.permutation(len(states.document))
    shuffled = {name: space[order] for name, space in centred.items()}
    half = _half_of_documents(states, rng)
    probes = probe(states, half, penalty, n_resamples=n_resamples, seed=seed)
    return {
        "loss": states.loss,
        "cka": _table(centred, centred, linear_cka),
        "cka_shuffled": _table(centred, shuffled, linear_cka),
        "cosine": _table(centred, centred, mean_cosine),
        **probes,
    }


def linear_cka(x: NDArray, y: NDArray) -> float:
    """Linear centred kernel alignment of x (T, p) and y (T, q), debiased, T >= 4.

    HSIC_1 of Song et al. (2012, eq. 5) for the kernels x x^T and y y^T, written with features instead of
    (T, T) matrices; its expectation is 0 for independent rows, where the plain estimate grows with p q / T.
    Hence slightly below 0 is possible. NaN where a space does not vary.
    """
    x, y = _centred(x), _centred(y)
    own = _hsic(x, x) * _hsic(y, y)
    return float(_hsic(x, y) / np.sqrt(own)) if own > 0 else float("nan")


def _hsic(x: Floats, y: Floats) -> float:
    """Unbiased HSIC of centred features. With K = x x^T and its diagonal set to 0, K 1 = -diag(x x^T)."""
    n = len(x)
    k, m = (x * x).sum(1), (y * y).sum(1)
    trace = np.square(x.T @ y).sum() - k @ m
    both = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return float((trace + both - 2 / (n - 2) * (k @ m)) / (n * (n - 3)))


def mean_cosine(x: NDArray, y: NDArray) -> float:
    """Mean cosine of the rows of x and y (T, d)."""
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(((x * y).sum(1) / np.maximum(norms, 1e-30)).mean())


def ridge(x: NDArray, y: NDArray, penalty: float) -> tuple[Floats, Floats]:
    """Linear map of x (T, p) to y (T, q): weights (p, q) and bias (q,), in closed form.

    Minimises the mean squared error plus penalty times the mean variance of a feature of x times |weights|^2, so
    that the scale of x does not matter.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x / len(x)
    strength = max(penalty * float(np.trace(gram)) / len(gram), 1e-12)
    weights = np.linalg.solve(gram + strength * np.eye(len(gram)), x.T @ y / len(x))
    return weights, y_mean - x_mean @ weights


def probe(
    states: States, fitted: NDArray[np.bool_], penalty: float, *, n_resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """r2, class_accuracy, class_majority, domain_accuracy and domain_majority, see `compare_spaces`.

    fitted: (T,) the tokens whose documents probes are fitted on; the others test them.
    A classifier is a linear map to one indicator an answer; the largest wins.
    """
    answers = {"class": states.token_class, "domain": states.domain}
    answers = {name: np.unique(values, return_inverse=True)[1] for name, values in answers.items()}
    targets = states.spaces | {name: np.eye(values.max() + 1)[values] for name, values in answers.items()}
    borders = np.cumsum([target.shape[1] for target in targets.values()])[:-1]
    stacked = np.concatenate(list(targets.values()), axis=1)
    tested, document = ~fitted, states.document[~fitted]
    bootstrap = {"n_resamples": n_resamples, "seed": seed}
    found: dict[str, Any] = {"r2": {}, "class_accuracy": {}, "domain_accuracy": {}}
    for source, space in states.spaces.items():
        weights, bias = ridge(space[fitted], stacked[fitted], penalty)
        predicted = np.split(space[tested] @ weights + bias, borders, axis=1)
        said = dict(zip(targets, predicted, strict=True))
        found["r2"][source] = {
            name: _explained(
                said[name], target[tested], target[fitted].mean(0, dtype=float), document, bootstrap
            )
            for name, target in states.spaces.items()
        }
        for name, values in answers.items():
            right = said[name].argmax(1) == values[tested]
            found[f"{name}_accuracy"][source] = mean_interval(
                right.astype(np.float64), document, None, **bootstrap
            )
    for name, values in answers.items():
        found[f"{name}_majority"] = float((values[tested] == np.bincount(values[fitted]).argmax()).mean())
    return found


def _explained(
    predicted: Floats, target: NDArray, mean: Floats, document: Ints, bootstrap: dict[str, int]
) -> dict[str, float | int | None]:
    """1 - squared error / squared distance from `mean`, with its interval over documents."""
    errors = [np.square(target - predicted).sum(1), np.square(target - mean).sum(1), np.ones(len(target))]
    sums = sums_of(np.column_stack(errors), document, int(document.max()) + 1)
    return interval(sums[:, :2], lambda s: 1 - s[:, 0] / s[:, 1], sums[:, 2], **bootstrap)


def _half_of_documents(states: States, rng: np.random.Generator) -> NDArray[np.bool_]:
    """(T,) the tokens of a random half of the documents of every domain.

    Raises ValueError where a half would be empty.
    """
    domain = np.zeros(states.document.max() + 1, np.int64)
    domain[states.document] = states.domain
    if len(domain) < 2:
        raise ValueError("Probes are fitted on one half of the documents and tested on the other: give two.")
    chosen = np.zeros(len(domain), bool)
    # dealt out in turns, domain after domain, so that each is halved and the whole is too
    order = rng.permutation(len(domain))
    chosen[order[np.argsort(domain[order], kind="stable")][::2]] = True
    return chosen[states.document]


def _centred(x: NDArray) -> Floats:
    x = np.asarray(x, np.float64)
    return x - x.mean(0)


def _table(first: dict[str, Floats], second: dict[str, Floats], measure: Any) -> dict[str, Any]:
    return {a: {b: number(measure(x, y)) for b, y in second.items()} for a, x in first.items()}
