"""A sample sheet: the same prompts and seeds for every model, so that rows differ by the model alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nano_think.engine.generate import generate
from nano_think.engine.sampling import SamplingConfig
from nano_think.model import ExpertLM, NanoThink
from nano_think.tokenizer import Tokenizer

PROMPT_TOKENS = 20


@dataclass(frozen=True)
class Sample:
    """One continuation. trusted: share of its tokens at which each expert had the largest weight."""

    model: str
    domain: str
    seed: int
    prompt: str
    text: str
    trusted: dict[str, float]


def prompts_of(
    batches: Sequence[Mapping[str, torch.Tensor]], domains: Sequence[str], per_domain: int
) -> list[tuple[str, list[int]]]:
    """(domain, token ids) from the beginnings of documents, `per_domain` each."""
    found: dict[str, list[list[int]]] = {name: [] for name in domains}
    for batch in batches:
        for row, domain in enumerate(batch["domain"].tolist()):
            kept = found[domains[domain]]
            first = batch["tokens"][row][batch["segments"][row] == 0][:PROMPT_TOKENS].tolist()
            if len(kept) < per_domain and len(first) == PROMPT_TOKENS:
                kept.append(first)
    return [(name, prompt) for name in domains for prompt in found[name]]


def sample_sheet(
    models: Mapping[str, NanoThink | ExpertLM],
    prompts: Sequence[tuple[str, list[int]]],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    config: SamplingConfig,
) -> list[Sample]:
    """Continue every prompt with every model, token by token."""
    samples = []
    for domain, prompt in prompts:
        for name, model in models.items():
            made = generate(
                model,
                [prompt],
                max_new_tokens,
                config,
                eos_id=tokenizer.eos_id,
                banned_ids=(tokenizer.bos_id, tokenizer.pad_id),
            )
            trusted: dict[str, float] = {}
            if made.weights is not None and len(made.weights[0]):
                choice = made.weights[0].argmax(-1)
                trusted = {e: (choice == i).float().mean().item() for i, e in enumerate(model.expert_names)}
            text = tokenizer.decode(made.tokens[0])
            samples.append(Sample(name, domain, config.seed, tokenizer.decode(prompt), text, trusted))
    return samples


@torch.no_grad()
def diffusion_drafts(
    model: ExpertLM,
    prompts: Sequence[tuple[str, list[int]]],
    tokenizer: Tokenizer,
    length: int,
    seed: int,
) -> list[Sample]:
    """The diffuser's own way to write: all positions denoised at once from noise. Not a likelihood."""
    samples = []
    for domain, prompt in prompts:
        vectors = model.embedding(torch.tensor([prompt]))
        generator = torch.Generator().manual_seed(seed)
        ids = model.expert.draft(vectors, model.embedding.weight, length, generator)[0].tolist()
        text = tokenizer.decode(ids)
        samples.append(
            Sample("diffuser, full-sequence DDIM", domain, seed, tokenizer.decode(prompt), text, {})
        )
    return samples
