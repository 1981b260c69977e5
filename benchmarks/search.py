"""Exact vector search at the sizes of the memory: ours, FAISS as it comes and tuned, torch; IVF for comparison."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.harness import Case, Group, Measured, Missing, Options
from benchmarks.harness.case import GateError, installed
from nano_think.ops.top_k import top_k_ref
from nano_think.vector_index import FlatIndex, TorchIndex, import_faiss

WIDTH, K = 384, 4
SIZES, QUICK_SIZES = (10_000, 100_000), (300, 3000)
BATCHES = (1, 32)
CLUSTER = 100  # vectors of a cluster, side by side as the chunks of a document are
CHUNK = 64  # tokens between two queries of a sequence
NPROBE = 4
APPROXIMATE = "FAISS IVF, approximate"
Search = Callable[[np.ndarray], np.ndarray]


def group(options: Options) -> Group:
    """Every way to search, at each number of stored vectors and of queries."""
    sizes = QUICK_SIZES if options.quick else SIZES
    builders: dict[str, Callable[[int], Search]] = {"nano_think": ours, "torch matmul, topk": plain}
    tools: dict[str, Callable[[int], Search]] = {
        "FAISS Flat": partial(flat, None),
        "FAISS Flat, threshold 1": partial(flat, 1),
        APPROXIMATE: inverted,
    }
    pairs = [(size, batch) for size in sizes for batch in BATCHES]
    missing = []
    derived = {f"CPU ms a token, {n} vectors, {q} sequences": partial(_per_token, n, q) for n, q in pairs}
    if installed("faiss"):
        builders |= tools
        derived |= {f"recall of IVF, {size} vectors": partial(_recall, size) for size in sizes}
    else:
        names = [f"{name} {size} x {batch}" for name in tools for size, batch in pairs]
        missing = [Missing(name, "pip install faiss-cpu") for name in names]
    cases = [_case(name, builders, size, batch) for size, batch in pairs for name in builders]
    cases += [_product(size, BATCHES[-1]) for size in sizes]
    notes = (
        "tok: queries. Exact searches pass a gate against double precision.",
        f"A sequence asks once in {CHUNK} tokens. IVF: {NPROBE} of about sqrt(N) lists.",
        "The bf16 product alone is the least that a bf16 scan with rescoring would cost.",
    )
    return Group(f"search, {WIDTH} dimensions, k {K}, clustered vectors", cases, missing, notes, derived)


def _case(name: str, builders: dict[str, Callable[[int], Search]], size: int, batch: int) -> Case:
    exact = [peer for peer in builders if peer not in (name, APPROXIMATE)]
    return Case(
        f"{name} {size} x {batch}",
        setup=partial(_work, builders[name], size, batch),
        tokens=batch,
        peers=tuple(f"{peer} {size} x {batch}" for peer in exact) if name == "nano_think" else (),
        check=None if name == APPROXIMATE else partial(same_vectors, builders[name], size, batch),
    )


def _product(size: int, batch: int) -> Case:
    def setup() -> Callable[[], object]:
        keys, queries = (torch.from_numpy(x).bfloat16() for x in vectors(size, batch))
        return lambda: queries @ keys.T

    return Case(f"bf16 product alone {size} x {batch}", setup=setup, tokens=batch)


def _work(build: Callable[[int], Search], size: int, batch: int) -> Callable[[], object]:
    return partial(build(size), vectors(size, batch)[1])


@lru_cache(8)
def vectors(size: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (size, d) around centres, some of them twice, and queries (batch, d) near some of them."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    centres = noise(size // CLUSTER, WIDTH).repeat_interleave(CLUSTER, 0)
    keys = F.normalize(centres + 0.5 * noise(size, WIDTH), dim=1)
    keys[7::CLUSTER] = keys[6::CLUSTER]
    asked = keys[torch.randint(size, (batch,), generator=generator)]
    return keys.numpy(), F.normalize(asked + 0.3 * noise(batch, WIDTH), dim=1).numpy()


def ours(size: int) -> Search:
    """The index of the memory: FAISS's scan for a few queries, one product for many."""
    index = FlatIndex(WIDTH) if installed("faiss") else TorchIndex(WIDTH)
    index.add(vectors(size, 1)[0])
    return lambda queries: index.search(queries, K)[1]


def plain(size: int) -> Search:
    """All products and torch's topk."""
    keys = torch.from_numpy(vectors(size, 1)[0])
    return lambda queries: (torch.from_numpy(queries) @ keys.T).topk(K, dim=1).indices.numpy()


def flat(threshold: int | None, size: int) -> Search:
    """FAISS Flat; its GEMM path from `threshold` queries on, or where FAISS itself takes it."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(WIDTH)
    index.add(vectors(size, 1)[0])
    usual = faiss.cvar.distance_compute_blas_threshold

    def search(queries: np.ndarray) -> np.ndarray:
        faiss.cvar.distance_compute_blas_threshold = threshold or usual
        found = index.search(queries, K)[1]
        faiss.cvar.distance_compute_blas_threshold = usual
        return found

    return search


@lru_cache(4)
def inverted(size: int) -> Search:
    """FAISS IVF over about sqrt(N) lists, `NPROBE` of them looked into."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    keys = vectors(size, 1)[0]
    quantizer = faiss.IndexFlatIP(WIDTH)
    index: Any = faiss.IndexIVFFlat(quantizer, WIDTH, max(4, int(size**0.5)), faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(keys)
    index.add(keys)
    index.nprobe = NPROBE
    return lambda queries: (quantizer, index.search(queries, K)[1])[1]


def _truth(size: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    keys, queries = (torch.from_numpy(x) for x in vectors(size, batch))
    scores, ids = top_k_ref(queries, keys, K)
    return scores.numpy(), ids.numpy()


def same_vectors(build: Callable[[int], Search], size: int, batch: int) -> None:
    """The vectors found are the best in double precision; two that score the same to 1e-6 may change places."""
    keys, queries = vectors(size, batch)
    scores, _ = _truth(size, batch)
    found = build(size)(queries)
    if any(len(set(row)) < K for row in found.tolist()):
        raise GateError("a vector was found twice")
    got = np.einsum("qd,qkd->qk", queries.astype(np.float64), keys[found])
    if (worst := float(np.abs(got - scores).max())) > 1e-6:
        raise GateError(f"the vectors found score up to {worst:.1e} less than the best")


def _recall(size: int, measured: Measured) -> float:
    _, queries = vectors(size, 256)
    truth = _truth(size, 256)[1]
    found = inverted(size)(queries)
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(truth, found, strict=True)]))


def _per_token(size: int, batch: int, measured: Measured) -> float:
    name = f"nano_think {size} x {batch}"
    return measured.over_rounds(lambda seconds: 1e3 * seconds[name] / batch / CHUNK)
