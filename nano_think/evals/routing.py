"""Do the experts specialise? Router weights by document and domain, and what each expert is worth.

Letters: B rows, L positions, M documents, N experts, D domains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nano_think.evals.bootstrap import (
    Difference,
    Interval,
    PermutationTest,
    domain_sums,
    paired_difference,
    permutation_test,
    resample,
    routing_information,
)
from nano_think.evals.losses import Batch, DocumentLosses

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DocumentWeights:
    """Router weights summed over the tokens of each document, sorted by uid.

    Attributes:
        uid: (M,) document ids.
        domain: (M,) domain index.
        sum_weights: (M, N).
        num_tokens: (M,) tokens summed over.
        num_domains: number of domains, seen or not.
    """

    uid: NDArray[np.int64]
    domain: NDArray[np.int64]
    sum_weights: Floats
    num_tokens: NDArray[np.int64]
    num_domains: int

    def mean(self) -> Floats:
        """(M, N) mean weight in each document."""
        return self.sum_weights / self.num_tokens[:, None]

    def domain_table(self) -> Floats:
        """(D, N) mean weight over the tokens of each domain; NaN rows for domains without documents."""
        tokens = domain_sums(self.num_tokens[:, None].astype(np.float64), self.domain, self.num_domains)
        with np.errstate(invalid="ignore"):
            return domain_sums(self.sum_weights, self.domain, self.num_domains) / tokens


@torch.no_grad()
def document_weights(
    weights_fn: Callable[[Batch], Tensor], batches: Iterable[Batch], num_domains: int
) -> DocumentWeights:
    """Collect router weights per document over the tokens with a label.

    Args:
        weights_fn: maps a batch to (B, L, N) router weights.
        batches: dicts with labels (B, L), doc_uid (B, L) and domain (B,).
        num_domains: number of domains.

    Raises:
        ValueError: no batch holds a scored token.
    """
    sums: dict[int, Floats] = {}
    domains: dict[int, int] = {}
    for batch in batches:
        scored = batch["labels"].cpu().numpy() >= 0
        weights = weights_fn(batch).double().cpu().numpy()[scored]
        uid = batch["doc_uid"].cpu().numpy()[scored]
        domain = np.broadcast_to(batch["domain"].cpu().numpy()[:, None], scored.shape)[scored]
        unique, first, group = np.unique(uid, return_index=True, return_inverse=True)
        columns = np.column_stack([weights, np.ones(len(uid))])
        totals = np.zeros((len(unique), columns.shape[1]))
        np.add.at(totals, group, columns)
        for key, row, label in zip(unique.tolist(), totals, domain[first].tolist(), strict=True):
            sums[key] = sums[key] + row if key in sums else row
            domains[key] = label
    if not sums:
        raise ValueError("The batches hold no scored token: check the split and its size.")
    keys = sorted(sums)
    table = np.stack([sums[key] for key in keys])
    return DocumentWeights(
        uid=np.array(keys, dtype=np.int64),
        domain=np.array([domains[key] for key in keys], dtype=np.int64),
        sum_weights=table[:, :-1],
        num_tokens=table[:, -1].astype(np.int64),
        num_domains=num_domains,
    )


@dataclass(frozen=True)
class RoutingAnalysis:
    """Router weights by domain with I(domain; expert) in nats against chance.

    Attributes:
        domain_table: (D, N) mean weight.
        mean: (N,) mean weight over all tokens.
        information: I(domain; expert) with its bootstrap interval over documents. Mutual information of a
            finite sample is biased upwards, so judge it by `test`, not by whether the interval holds 0.
        test: the same value against domain labels permuted over documents.
    """

    domain_table: Floats
    mean: Floats
    information: Interval
    test: PermutationTest

    @property
    def specialised(self) -> bool:
        """Whether the experts' use depends on the domain beyond chance (p < 0.05)."""
        return self.test.p_value < 0.05


def analyse_routing(
    weights: DocumentWeights, *, permutations: int = 200, n_resamples: int = 2000, seed: int = 0
) -> RoutingAnalysis:
    """Domain table, mutual information, permutation null and bootstrap interval."""
    domains, experts = weights.num_domains, weights.sum_weights.shape[1]
    test = permutation_test(
        weights.sum_weights,
        weights.num_tokens,
        weights.domain,
        domains,
        permutations=permutations,
        seed=seed,
    )
    # One block of N + 1 columns per domain, zero outside the document's own: column sums are domain sums.
    own = np.column_stack([weights.sum_weights, weights.num_tokens]).astype(np.float64)
    columns = (np.eye(domains)[weights.domain][:, :, None] * own[:, None, :]).reshape(len(own), -1)

    def information(sums: Floats) -> Floats:
        blocks = sums.reshape(-1, domains, experts + 1)
        return routing_information(blocks[..., :-1].copy(), blocks[..., -1].copy())

    values = resample(columns, information, n_resamples=n_resamples, seed=seed)
    low, high = (float(value) for value in np.quantile(values, [0.025, 0.975]))
    return RoutingAnalysis(
        domain_table=weights.domain_table(),
        mean=weights.sum_weights.sum(0) / weights.num_tokens.sum(),
        information=Interval(test.observed, low, high, len(own)),
        test=test,
    )


def knockout_matrix(
    full: DocumentLosses,
    knockouts: Mapping[str, DocumentLosses],
    domains: Sequence[str],
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, Difference]]:
    """Loss increase in nats per token when an expert is left out, per domain and over "all".

    Args:
        full: losses of the whole model.
        knockouts: losses without something, by the name of what is left out, on the same tokens.
        domains: names in the order of the domain index; those without documents are left out.

    Returns:
        {knockout: {"all" or domain: difference to the whole model}}; positive means the part is worth having.
    """
    columns: dict[str, int | None] = {"all": None}
    columns |= {name: index for index, name in enumerate(domains) if full.documents(index)}
    return {
        name: {
            column: paired_difference(losses, full, domain=index, n_resamples=n_resamples, seed=seed)
            for column, index in columns.items()
        }
        for name, losses in knockouts.items()
    }
