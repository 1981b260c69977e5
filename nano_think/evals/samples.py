"""A sample sheet: the same prompts and seeds for every model, so that rows differ by the model alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from nano_think.engine.generate import Memory, generate
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
    batches: Sequence[Mapping[str, torch.Tensor]], domains: Sequence[str], per_domain: int, bos_id: int
) -> list[tuple[str, list[int]]]:
    """(domain, token ids) of `per_domain` prompts each: beginnings of documents, then of rows inside one.

    bos_id: the token that documents begin with; a row may begin in the middle of a long one.
    """
    whole: dict[str, list[list[int]]] = {name: [] for name in domains}
    inside: dict[str, list[list[int]]] = {name: [] for name in domains}
    for batch in batches:
        for row, domain in enumerate(batch["domain"].tolist()):
            segments = batch["segments"][row]
            for segment in range(int(segments.max()) + 1):
                prompt = batch["tokens"][row][segments == segment][:PROMPT_TOKENS].tolist()
                if len(prompt) == PROMPT_TOKENS:
                    (whole if prompt[0] == bos_id else inside)[domains[domain]].append(prompt)
    return [(name, prompt) for name in domains for prompt in (whole[name] + inside[name])[:per_domain]]


def sample_sheet(
    models: Mapping[str, NanoThink | ExpertLM],
    prompts: Sequence[tuple[str, list[int]]],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    config: SamplingConfig,
    memories: Mapping[str, Callable[[], Memory]] | None = None,
) -> list[Sample]:
    """Continue every prompt with every model, token by token.

    memories: makes a fresh reader of memory for each prompt, for the models that have one.
    """
    samples, memories = [], memories or {}
    for domain, prompt in prompts:
        for name, model in models.items():
            made = generate(
                model,
                [prompt],
                max_new_tokens,
                config,
                eos_id=tokenizer.eos_id,
                banned_ids=(tokenizer.bos_id, tokenizer.pad_id),
                memory=memories[name]() if name in memories else None,
                logprobs=False,
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
