"""What every expert says about every token of a text: the table that questions of specialisation are asked of.

Letters: B rows, L positions, V vocabulary, T tokens, N experts, M documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nano_think.evals.losses import Batch, DocumentLosses
from nano_think.evals.pools import SharedForward

CLASSES = (
    "word_start",
    "word_rest",
    "number",
    "punctuation",
    "code_symbol",
    "blank",
    "newline",
    "byte",
    "special",
)
CODE_SYMBOLS = frozenset("{}[]<>=+*/\\|&^~@#$%_`")
CONTRACTIONS = frozenset({"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})


def token_classes(token_bytes: Sequence[bytes]) -> NDArray[np.int64]:
    """Index into CLASSES of every token (V,), from its bytes alone; a special token has none.

    word_start: letters behind a blank or another single mark. word_rest: letters without, which is how a word
    goes on, but also how one begins a line. number: digits. code_symbol: marks of which one is rare in prose.
    punctuation: other marks. blank, newline: white space without and with a line end. byte: a piece of a
    character.
    """
    return np.array([CLASSES.index(_class_of(some)) for some in token_bytes], dtype=np.int64)


def _class_of(token: bytes) -> str:
    if not token:
        return "special"
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return "byte"
    if text.isspace():
        return "newline" if "\n" in text or "\r" in text else "blank"
    if any(character.isalpha() for character in text):
        begins = not text[0].isalpha() and text.lower() not in CONTRACTIONS
        return "word_start" if begins else "word_rest"
    if any(character.isnumeric() for character in text):
        return "number"
    return "code_symbol" if CODE_SYMBOLS & set(text) else "punctuation"


def sample_documents(
    batches: Iterable[Batch],
    max_tokens: int | None,
    seed: int = 0,
    max_per_document: int | None = None,
) -> list[Batch]:
    """The batches with labels of some whole documents alone, drawn until `max_tokens` labels are reached.

    Rows without any such label are dropped, so that a pass costs less. All documents where max_tokens is None.
    Documents are drawn alike, so domains keep their share of them.
    max_per_document: of a longer document its first labels count, so that more documents stand behind an interval.
    """
    batches = list(batches)
    scored = [batch["labels"] >= 0 for batch in batches]
    if not any(bool(mask.any()) for mask in scored):
        return []
    uid = np.concatenate([b["doc_uid"][mask].cpu().numpy() for b, mask in zip(batches, scored, strict=True)])
    unique, document, count = np.unique(uid, return_inverse=True, return_counts=True)
    limit = len(uid) if max_per_document is None else max_per_document
    by_document = np.argsort(document, kind="stable")
    place = np.empty(len(uid), np.int64)  # of each label in its document
    place[by_document] = np.arange(len(uid)) - np.repeat(np.cumsum(count) - count, count)
    order, size = np.random.default_rng(seed).permutation(len(unique)), np.minimum(count, limit)
    before = np.cumsum(size[order]) - size[order]
    drawn = np.zeros(len(unique), bool)
    drawn[order[before < (len(uid) if max_tokens is None else max_tokens)]] = True
    chosen = torch.from_numpy(drawn[document] & (place < limit))
    sampled = []
    for batch, mask, kept in zip(
        batches, scored, chosen.split([int(mask.sum()) for mask in scored]), strict=True
    ):
        keep = torch.zeros_like(mask).masked_scatter(mask, kept.to(mask.device))
        rows = keep.any(dim=1)
        if bool(rows.any()):
            labels = batch["labels"].masked_fill(~keep, -100)
            sampled.append({name: value[rows] for name, value in (batch | {"labels": labels}).items()})
    return sampled


@dataclass(frozen=True)
class TokenTable:
    """One row a scored token. Losses in nats.

    Attributes:
        experts: (N) names.
        uid: (M,) documents.
        document: (T,) index into uid.
        domain, position, token_class: (T,) of the token that is to be predicted; position of the one before it.
        weights: (T, N) of the router.
        nll: (T, N) of each expert alone.
        fused: (T,) of the model.
        without: (T, N) of the model without one expert, the others scaled up.
    """

    experts: list[str]
    uid: NDArray[np.int64]
    document: NDArray[np.int64]
    domain: NDArray[np.int64]
    position: NDArray[np.int64]
    token_class: NDArray[np.int64]
    weights: NDArray[np.float64]
    nll: NDArray[np.float64]
    fused: NDArray[np.float64]
    without: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.document)

    def losses(self, values: NDArray[np.float64], num_domains: int) -> DocumentLosses:
        """Values (T,) as losses per document, without a count of bytes."""
        documents = len(self.uid)
        domain = np.zeros(documents, np.int64)
        domain[self.document] = self.domain
        return DocumentLosses(
            uid=self.uid,
            domain=domain,
            sum_nll=np.bincount(self.document, weights=values, minlength=documents).astype(np.float64),
            num_tokens=np.bincount(self.document, minlength=documents),
            num_bytes=np.zeros(documents, np.int64),
            num_domains=num_domains,
        )


@torch.no_grad()
def collect_tokens(shared: SharedForward, batches: Iterable[Batch], classes: NDArray[np.int64]) -> TokenTable:
    """Read the batches once, with all experts and every knock-out.

    classes: (V,) of `token_classes`.
    Raises ValueError for a model with one expert, which nothing can be compared with, or without scored tokens.
    """
    model = shared.model
    experts = model.expert_names
    if len(experts) < 2:
        raise ValueError("A single expert cannot specialise: give a model with two or more.")
    functions = [shared.fused(), *(shared.without([name]) for name in experts)]
    parts: dict[str, list[NDArray]] = {}
    for batch in batches:
        scored = batch["labels"] >= 0
        domain = batch["domain"].unsqueeze(1).expand_as(scored)
        mixed = torch.stack([function(batch) for function in functions], dim=-1)
        found = {
            "uid": batch["doc_uid"],
            "domain": domain,
            "position": batch["positions"],
            "label": batch["labels"],
            "weights": shared.weights(batch).double(),
            "nll": shared.expert_nll(batch).double(),
            "mixed": mixed.double(),
        }
        for name, value in found.items():
            parts.setdefault(name, []).append(value[scored].cpu().numpy())
    if not parts or not sum(map(len, parts["uid"])):
        raise ValueError("The batches hold no scored token: check the split and its size.")
    table = {name: np.concatenate(values) for name, values in parts.items()}
    uid, document = np.unique(table["uid"], return_inverse=True)
    return TokenTable(
        experts=experts,
        uid=uid,
        document=document,
        domain=table["domain"],
        position=table["position"],
        token_class=classes[table["label"]],
        weights=table["weights"],
        nll=table["nll"],
        fused=table["mixed"][:, 0],
        without=table["mixed"][:, 1:],
    )
