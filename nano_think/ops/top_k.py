"""The k largest inner products, exactly, by one matrix product and very little sorting.

A product of single precision says where the best can be; which they are, and in which order, is decided by the
double-precision products of those few. With unit roundoff u = 2^-24 a product of d terms, summed in any order,
with or without fused multiply-add, is off by at most e = d u / (1 - d u) |q| |x| (Higham, Accuracy and Stability
of Numerical Algorithms, section 3.1), so a vector whose product lies more than 2 e below the k-th best one is not
among the best k.

Letters: Q queries, N keys, d width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GROUP = 64  # neighbouring keys of which first only the largest product is looked at
BLOCK = 1 << 16  # keys multiplied at a time
_MOST_PRODUCTS = 1 << 23  # products held at a time
_MOST_GATHERED = 1 << 13  # pairs whose vectors are gathered at a time
_MOST_RESCORED = 64  # times k pairs of a query are rescored
_UNIT_ROUNDOFF = 2.0**-24


def top_k_ref(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `exact_top_k` computes, from all products in double precision."""
    scores = queries.double() @ keys.double().T
    scores, ids = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k].float(), ids[:, :k]


@torch.no_grad()
def exact_top_k(queries: Tensor, keys: Tensor, k: int, largest_norm: float) -> tuple[Tensor, Tensor]:
    """Scores (Q, k) float32, highest first, and ids (Q, k) of the keys with the largest products, k at most N.

    Equal products come in the order of their ids. Only a query with more than 64 k keys within rounding of its
    k-th best, as among thousands of copies of one vector, keeps the order of single precision. Memory: products of
    up to 2^23 pairs at a time.

    Args:
        queries: (Q, d) float32. keys: (N, d) float32, on the same device.
        largest_norm: no key is longer than this.
    """
    if k == 0 or len(queries) == 0:
        return queries.new_empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
    width = max(1, _MOST_PRODUCTS // min(len(keys), BLOCK))
    parts = [_top_k(part, keys, k, largest_norm) for part in queries.split(width)]
    scores, ids = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(ids)


def _top_k(queries: Tensor, keys: Tensor, k: int, largest_norm: float) -> tuple[Tensor, Tensor]:
    rounding = keys.shape[1] * _UNIT_ROUNDOFF
    # one per cent covers the rounding of the norms and of the threshold itself
    error = 1.01 * rounding / (1 - rounding) * largest_norm * torch.linalg.vector_norm(queries, dim=1)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    kth = queries.new_full((len(queries),), -torch.inf)
    best = queries.new_empty(len(queries), 0)
    # Under the trainer's bf16 autocast the product would lose the digits that tell neighbours apart.
    with torch.autocast(keys.device.type, enabled=False):
        for start in range(0, len(keys), BLOCK):
            # the keys first: BLAS libraries handle many rows and few columns better than the transpose
            products = keys[start : start + BLOCK] @ queries.T
            maxima = _groups(products)
            best = torch.cat((best, _largest(products, maxima, k)), 1)
            best = best.topk(min(k, best.shape[1]), dim=1).values
            if best.shape[1] == k:
                kth = best[:, -1]
            rows, columns, values = _at_least(products, maxima, kth - 2 * error)
            found.append((rows, columns + start, values))
    rows, ids, values = (torch.cat(column) for column in zip(*found, strict=True))
    kept = values >= (kth - 2 * error)[rows]
    return _rescored(queries, keys, (rows[kept], ids[kept], values[kept]), k)


def _groups(products: Tensor) -> Tensor:
    """Largest product of each group, (Q, ceil(n / GROUP)), of products (n, Q)."""
    whole = len(products) // GROUP * GROUP
    maxima = products[:whole].unflatten(0, (-1, GROUP)).amax(1)
    if whole < len(products):
        maxima = torch.cat((maxima, products[whole:].amax(0, keepdim=True)))
    return maxima.T.contiguous()


def _members(products: Tensor, rows: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of groups (...) and their products with the queries `rows`, both (..., GROUP); -inf beyond the last."""
    members = groups.unsqueeze(-1) * GROUP + torch.arange(GROUP, device=groups.device)
    values = products[members.clamp_max(len(products) - 1), rows.unsqueeze(-1)]
    return members, values.masked_fill_(members >= len(products), -torch.inf)


def _largest(products: Tensor, maxima: Tensor, k: int) -> Tensor:
    """The k largest products of each query, or all where there are fewer: they lie in the k largest groups."""
    if maxima.shape[1] <= k:
        return products.T.topk(min(k, len(products)), dim=1).values
    rows = torch.arange(len(maxima), device=maxima.device).unsqueeze(1)
    _, values = _members(products, rows, maxima.topk(k, dim=1).indices)
    return values.flatten(1).topk(k, dim=1).values


def _at_least(products: Tensor, maxima: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(query, key, product) of all products that reach their query's threshold."""
    rows, groups = (maxima >= threshold.unsqueeze(1)).nonzero(as_tuple=True)
    members, values = _members(products, rows, groups)
    # where nothing is ruled out yet, what is not there must still be
    reached = (values >= threshold[rows].unsqueeze(1)) & (members < len(products))
    hits, places = reached.nonzero(as_tuple=True)
    return rows[hits], members[hits, places], values[hits, places]


def _rescored(
    queries: Tensor, keys: Tensor, pairs: tuple[Tensor, Tensor, Tensor], k: int
) -> tuple[Tensor, Tensor]:
    """The best k of the pairs (row, id, product) of each row, by products in double precision and then by id."""
    rows, ids, values = pairs
    counts = torch.bincount(rows, minlength=len(queries))
    exact = values.double()
    for few in (counts[rows] <= _MOST_RESCORED * k).nonzero().squeeze(1).split(_MOST_GATHERED):
        exact[few] = (queries[rows[few]].double() * keys[ids[few]].double()).sum(1)
    order = torch.from_numpy(np.lexsort((ids.cpu(), -exact.cpu(), rows.cpu()))).to(rows.device)
    first = counts.cumsum(0) - counts
    chosen = order[first.unsqueeze(1) + torch.arange(k, device=rows.device)]
    return exact[chosen].float(), ids[chosen]
