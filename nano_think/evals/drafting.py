"""The diffuser beside the line of one token after another: blocks drafted at once, and gaps filled in.

Letters: R prompts, P prompt tokens, S tokens of a block or gap, V vocabulary, K denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nano_think.evals.denoiser import Stopwatch
from nano_think.evals.losses import Batch
from nano_think.evals.ratios import Ints, mean_interval
from nano_think.model import ExpertLM
from nano_think.ops.diffusion import ddim_sample, ddim_timesteps

Drafter = Callable[[Tensor], Tensor]

TIMED = 4
NO_SIGHT_AHEAD = (
    "The denoiser is trained causally, because a denoiser that reads later tokens would leak them into the "
    "likelihoods of the mixture. So it cannot use the text behind a gap. 'both sides, untrained' lets the same "
    "weights attend to all of the text (experts.diffuser.bidirectional), for which they were never trained."
)


def excerpts(
    batches: Iterable[Batch], length: int, count: int | None = None, seed: int = 0
) -> tuple[Tensor, Ints]:
    """Beginnings of document fragments that have `length` tokens: (R, length), and their documents' uids (R,).

    One a document, `count` of them by lot. Raises ValueError where no fragment is long enough.
    """
    found: dict[int, Tensor] = {}
    for batch in batches:
        for row, segments in enumerate(batch["segments"]):
            for segment in range(int(segments.max()) + 1):
                inside = segments == segment
                tokens, uid = batch["tokens"][row][inside], int(batch["doc_uid"][row][inside][0])
                if len(tokens) >= length:
                    found.setdefault(uid, tokens[:length])
    if not found:
        raise ValueError(f"No document fragment has {length} tokens: ask for shorter excerpts.")
    uids = sorted(found)
    drawn = np.random.default_rng(seed).permutation(len(uids))[:count]
    chosen = [uids[i] for i in np.sort(drawn)]
    return torch.stack([found[uid] for uid in chosen]), np.array(chosen)


@torch.no_grad()
def block_drafts(
    network: ExpertLM,
    teacher: ExpertLM,
    texts: Tensor,
    unigram: Tensor,
    *,
    block: int = 8,
    steps: Sequence[int] = (1, 5, 10, 25),
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Blocks drafted at once behind a prompt, as the Transformer would accept them in greedy decoding.

    texts: (R, P + block) of `excerpts`, one a document; the last `block` tokens are the truth. unigram: (V,)
    counts of training text. A drafted token is accepted where it and all before it in the block are what the
    Transformer itself finds most probable; the token it adds for nothing is not counted.

    Returns:
        prompts, prompt_tokens, block, transformer_seconds_per_block (one token after another with a cache) and
        `drafters`: "diffuser K=..", "diffuser one by one" (greedy, a clean pass and `fused_steps` noisy ones a
        token), "unigram", "repeat last" and "copy" (what followed the last token where it stood before); each
        with network_passes a block, lists by place in the block: truth, agreement (with the Transformer after
        the same draft), prefix (this and all before agree), and accepted (mean of a block), seconds_per_block.
    """
    prompt, truth = texts[:, :-block], texts[:, -block:]
    drafters: dict[str, tuple[int, Drafter]] = {
        # every step reads the words of the step before as new context
        f"diffuser K={k}": (2 * k, _parallel(network, block, k, seed))
        for k in steps
    }
    one_by_one = block * (1 + network.expert.fused_steps)
    drafters["diffuser one by one"] = (one_by_one, lambda p: continue_greedily(network, p, block))
    drafters |= {name: (0, drafter) for name, drafter in trivial_drafters(unigram, block).items()}
    rows = {}
    for name, (passes, drafter) in drafters.items():
        drafted = drafter(prompt)
        agreement = drafted == greedy_after(teacher, prompt, drafted)
        prefix = agreement.long().cumprod(1)
        accepted = prefix.sum(1).double().numpy()
        rows[name] = {
            "network_passes": passes,
            "truth": _shares(drafted == truth),
            "agreement": _shares(agreement),
            "prefix": _shares(prefix),
            "accepted": mean_interval(
                accepted, np.arange(len(texts)), None, n_resamples=n_resamples, seed=seed
            ),
            "seconds_per_block": _seconds(drafter, prompt),
        }
    return {
        "prompts": len(texts),
        "prompt_tokens": prompt.shape[1],
        "block": block,
        "transformer_seconds_per_block": _seconds(lambda p: decode_greedily(teacher, p, block), prompt),
        "drafters": rows,
    }


@torch.no_grad()
def infilling(
    network: ExpertLM,
    teacher: ExpertLM,
    texts: Tensor,
    unigram: Tensor,
    *,
    right: int = 16,
    span: int = 8,
    steps: Sequence[int] = (1, 10),
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """A gap of `span` tokens filled in, with `right` tokens behind it and all the others before it.

    texts: (R, P + span + right) of `excerpts`. Accuracy is the share of hidden tokens that are found.

    Returns:
        prompts, span, left, right, `accuracy` with an interval by way of filling: "left context only, K=..",
        "both sides, untrained, K=..", "transformer one by one" (greedy, left context), "unigram", "repeat last",
        "copy"; and reason: what the model as built cannot do.
    """
    start = texts.shape[1] - span - right
    prompt, truth = texts[:, :start], texts[:, start : start + span]
    filled = {f"left context only, K={k}": _parallel(network, span, k, seed)(prompt) for k in steps}
    filled |= {
        f"both sides, untrained, K={k}": fill_between(network, texts, start, span, k, seed) for k in steps
    }
    filled["transformer one by one"] = continue_greedily(teacher, prompt, span)
    filled |= {name: drafter(prompt) for name, drafter in trivial_drafters(unigram, span).items()}
    documents = np.arange(len(texts))
    return {
        "prompts": len(texts),
        "span": span,
        "left": start,
        "right": right,
        "accuracy": {
            name: mean_interval(
                (tokens == truth).double().mean(1).numpy(),
                documents,
                None,
                n_resamples=n_resamples,
                seed=seed,
            )
            for name, tokens in filled.items()
        },
        "reason": NO_SIGHT_AHEAD,
    }


def fill_between(network: ExpertLM, texts: Tensor, start: int, span: int, steps: int, seed: int) -> Tensor:
    """Tokens (R, span) at start .. start + span - 1 of texts (R, L), all denoised at once with both sides seen.

    As `DiffuserExpert.draft`: unknown words are zero vectors in the first step and the nearest tokens of the step
    before in every other.
    """
    expert, table = network.expert, network.embedding.weight
    words = network.embedding(texts).clone()
    words[:, start : start + span] = 0
    x0: Tensor | None = None

    def nearest(x0: Tensor) -> Tensor:
        # the latent of a position stands for the token behind it
        return F.linear(expert.readout(x0[:, start - 1 : start + span - 1]), table).argmax(-1)

    def denoise(x: Tensor, tau: int) -> Tensor:
        nonlocal x0
        x0 = expert.denoise(x, tau, words, self_cond=x0)
        words[:, start : start + span] = table[nearest(x0)]
        return x0

    noise = torch.randn(words.shape, generator=torch.Generator().manual_seed(seed)).to(words)
    before = expert.bidirectional
    try:
        expert.bidirectional = True
        timesteps = ddim_timesteps(steps, expert.schedule.train_T)
        return nearest(ddim_sample(expert.schedule, denoise, noise, timesteps))
    finally:
        expert.bidirectional = before


def greedy_after(model: ExpertLM, prompt: Tensor, drafted: Tensor) -> Tensor:
    """(R, S) the most probable token at each place of a draft, given the prompt and the draft before it."""
    read = torch.cat((prompt, drafted[:, :-1]), dim=1)
    hidden = model(read, with_logits=False).hidden[:, prompt.shape[1] - 1 :]
    return F.linear(hidden, model.embedding.weight).argmax(-1)


def continue_greedily(model: ExpertLM, prompt: Tensor, count: int) -> Tensor:
    """(R, count) most probable tokens one after another, every time from the beginning."""
    text = prompt
    for _ in range(count):
        hidden = model(text, with_logits=False).hidden[:, -1:]
        text = torch.cat((text, F.linear(hidden, model.embedding.weight).argmax(-1)), dim=1)
    return text[:, prompt.shape[1] :]


def decode_greedily(model: ExpertLM, prompt: Tensor, count: int) -> Tensor:
    """`continue_greedily` with a cache."""
    state, tokens, text = model.init_state(len(prompt), prompt.shape[1] + count), prompt, []
    for _ in range(count):
        hidden = model.expert.extend(model.embedding(tokens), state)[:, -1:]
        tokens = F.linear(hidden, model.embedding.weight).argmax(-1)
        text.append(tokens)
    return torch.cat(text, dim=1)


def trivial_drafters(unigram: Tensor, count: int) -> dict[str, Drafter]:
    """Drafters (R, P) to (R, count) that need no network; unigram: (V,) counts."""
    frequent = unigram.argmax()
    return {
        "unigram": lambda prompt: frequent.expand(len(prompt), count),
        "repeat last": lambda prompt: prompt[:, -1:].expand(-1, count),
        "copy": lambda prompt: torch.tensor([_copied(row, count) for row in prompt.tolist()]),
    }


def _copied(text: list[int], count: int) -> list[int]:
    """What followed the last token where it last stood before; the last token again where it never did."""
    text, begun = list(text), len(text)
    earlier = [i for i in range(begun - 1) if text[i] == text[-1]]
    source = earlier[-1] + 1 if earlier else begun - 1
    for i in range(count):
        text.append(text[source + i])
    return text[begun:]


def _parallel(network: ExpertLM, count: int, steps: int, seed: int) -> Drafter:
    def draft(prompt: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        table = network.embedding.weight
        return network.expert.draft(network.embedding(prompt), table, count, generator, steps)

    return draft


def _shares(right: Tensor) -> list[float]:
    return right.double().mean(0).tolist()


def _seconds(drafter: Drafter, prompt: Tensor) -> float:
    """Seconds a block when prompts come one by one."""
    watch = Stopwatch()
    some = prompt[:TIMED]
    with watch.running():
        for row in some.split(1):
            drafter(row)
    return watch.seconds / len(some)
