"""Bounds on what routing could gain: the best expert a token, a document or a domain, and constant weights.

The best expert of a token or document is picked by the very loss it is judged by; no router reaches it. A domain's
expert and weights are chosen on other text than they are applied to, as a router that knew every domain would.

Letters: M documents, N experts, D domains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from nano_think.evals.losses import DocumentLosses
from nano_think.evals.pools import ExpertOutputs
from nano_think.ops.cross_entropy import linear_cross_entropy
from nano_think.ops.pooling import Space, StaticFit, fit_static_weights


def best_per_document(losses: Mapping[str, DocumentLosses]) -> DocumentLosses:
    """Each document with the expert that is best on it.

    Args:
        losses: of each expert, on the same documents.

    Raises:
        ValueError: they are not the same documents and tokens.
    """
    return dataclasses.replace(_first(losses), sum_nll=_table(losses).min(0))


def choose_per_domain(losses: Mapping[str, DocumentLosses]) -> list[str]:
    """The best expert of each of the D domains; of a domain without documents the best one over all.

    Raises:
        ValueError: the experts were not scored on the same documents and tokens.
    """
    names, table, first = list(losses), _table(losses), _first(losses)
    overall = names[int(table.sum(1).argmin())]
    return [
        names[int(table[:, first.domain == domain].sum(1).argmin())] if first.documents(domain) else overall
        for domain in range(first.num_domains)
    ]


def expert_per_domain(losses: Mapping[str, DocumentLosses], choice: Sequence[str]) -> DocumentLosses:
    """Each document with the expert chosen for its domain.

    With the choice made on validation and the losses of the test split this is what a perfect domain router that
    trusts one expert would have; with `choose_per_domain(losses)` of the same losses it is an in-sample bound.

    Args:
        losses: of each expert, on the same documents.
        choice: an expert's name for each of the D domains.

    Raises:
        ValueError: they are not the same documents and tokens.
    """
    names, first = list(losses), _first(losses)
    index = np.array([names.index(name) for name in choice])[first.domain]
    return dataclasses.replace(first, sum_nll=_table(losses)[index, np.arange(len(first))])


def static_per_domain(outputs: ExpertOutputs, num_domains: int, space: Space = "hidden") -> Tensor:
    """Constant weights (D, N) fitted on each domain's part of the sample: what a router that knew domains learns.

    Apply them to other text with `SharedForward.pooled_by_domain`. A domain without a token gets the weights of
    the whole sample.
    """
    parts = [outputs.only(outputs.domain == domain) for domain in range(num_domains)]
    parts = [part if len(part.labels) else outputs for part in parts]
    return torch.stack([fit_static_weights(p.hidden, p.heads, p.labels, space).weights for p in parts])


@torch.no_grad()
def static_losses(
    outputs: ExpertOutputs, fitted: StaticFit, space: Space, byte_lengths: ArrayLike, num_domains: int
) -> tuple[DocumentLosses, dict[str, DocumentLosses]]:
    """Losses by document of the pool that was fitted on `outputs`, and of each expert alone, on the same tokens.

    byte_lengths: (V,) bytes of each token id.
    """
    if space == "prob":
        pooled = -(fitted.weights.log() - fitted.token_nll).logsumexp(dim=-1)
    else:
        head = outputs.heads if isinstance(outputs.heads, Tensor) else outputs.heads[0]
        pairs = zip(fitted.weights.tolist(), outputs.hidden.values(), strict=True)
        mixed = torch.stack([weight * hidden for weight, hidden in pairs]).sum(0)
        pooled = linear_cross_entropy(mixed, head, outputs.labels)
    uid, domain, labels = (v.cpu().numpy() for v in (outputs.doc_uid, outputs.domain, outputs.labels))

    def by_document(nll: Tensor) -> DocumentLosses:
        values = nll.double().cpu().numpy()
        return DocumentLosses.from_tokens(uid, domain, values, np.asarray(byte_lengths)[labels], num_domains)

    alone = zip(outputs.hidden, fitted.token_nll.T, strict=True)
    return by_document(pooled), {name: by_document(nll) for name, nll in alone}


def _first(losses: Mapping[str, DocumentLosses]) -> DocumentLosses:
    return next(iter(losses.values()))


def _table(losses: Mapping[str, DocumentLosses]) -> np.ndarray:
    """(N, M) summed losses of the same documents."""
    first = _first(losses)
    for name, other in losses.items():
        if not first.pairs_with(other):
            raise ValueError(f"{name} was not scored on the same documents and tokens as the others.")
    return np.stack([value.sum_nll for value in losses.values()])
