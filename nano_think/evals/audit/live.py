"""A copy of a model in which every path carries signal, and a memory that is filled.

A zero output projection hides whatever lies behind it: a fresh model would pass any audit. So tensors whose
values are all equal get noise, in the audited copy alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nano_think.chunks import ChunkEncoder, chunk_records
from nano_think.retrieval import Retriever
from nano_think.vector_store import VectorStore


def live_copy(model: nn.Module, seed: int = 0) -> tuple[nn.Module, tuple[str, ...]]:
    """The copy, in eval mode and without gradients, and the names of the tensors that were replaced.

    Ones are gains and keep 1 as their mean; any other constant is replaced by noise around 0.
    """
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    replaced = []
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            replaced.append(name)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            noise = torch.randn(parameter.shape, generator=generator).to(parameter) / fan_in**0.5
            parameter.copy_(noise + 1 if float(parameter.flatten()[0]) == 1 else noise)
    fit_missing_statistics(model, seed)
    return model, tuple(replaced)


@torch.no_grad()
def strengthened(model: nn.Module) -> nn.Module:
    """`model` itself, with every matrix scaled up to gain 1 where it is weaker: rms at least 1 / sqrt(fan-in).

    Through the weak matrices of a fresh network (std 0.02) a state-space recurrence moves the logits by less than
    rounding, so that checks with a tolerance would not miss it.
    """
    for parameter in model.parameters():
        if parameter.ndim > 1 and (size := float(parameter.square().mean().sqrt())) > 0:
            parameter.mul_(max(1.0, parameter[0].numel() ** -0.5 / size))
    return model


def fit_missing_statistics(model: nn.Module, seed: int = 0) -> None:
    """Give statistics of invented targets to the parts that refuse to work before they have seen any."""
    for module in model.modules():
        if getattr(module, "stats_ready", None) is not None and not bool(module.stats_ready):  # type: ignore[arg-type]
            noise = torch.randn(64, module.d_model + 1, generator=torch.Generator().manual_seed(seed))  # type: ignore[operator]
            module.fit_statistics(noise[:, 1:] + noise[0, 1:])  # type: ignore[operator]


def filled_memory(
    table: Tensor, chunk: int, k: int = 3, seed: int = 0, documents: int = 40, **options: Any
) -> Retriever:
    """A retriever over random documents of four chunks, whose keys are made with `table` (V, d).

    options: of the `Retriever`, its granularity for instance.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (documents, 4 * chunk)
    tokens = torch.randint(len(table), shape, generator=generator)
    hidden = torch.randn(*shape, table.shape[1], generator=generator)
    return remembering(table.detach().float().cpu(), tokens, hidden, chunk, k, **options)


def remembering(
    table: Tensor, tokens: Tensor, hidden: Tensor, chunk: int, k: int, **options: Any
) -> Retriever:
    """A retriever over the chunks of tokens (M, L), M documents of a cluster each, with hidden states (M, L, d).

    table: (V, d), what the keys are made with.
    """
    counts = torch.bincount(tokens.flatten(), minlength=len(table))
    encoder = ChunkEncoder.fit(table, counts, tokens[:, :chunk])
    uid = torch.arange(len(tokens)).unsqueeze(1).expand_as(tokens)
    records = chunk_records(encoder, tokens, hidden, chunk=chunk, doc_uid=uid, cluster=uid)
    store = VectorStore(table.shape[1], chunk=chunk, backend="torch", fingerprint=encoder.fingerprint())
    store.add(records.keys, records.values, **records.meta)
    return Retriever(store, encoder, chunk=chunk, k=k, **options)
