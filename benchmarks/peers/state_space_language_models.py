"""Our state-space language models and Hugging Face's Mamba ones: one function, the same weights, a tied head.

As in `language_models` the rows of the table have a root mean square of 1, of which the norm of our entry is the
identity, and the last norm's gain is small. Our square adaptor stays our own extra cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.peers import language_models, state_space_models
from benchmarks.peers.language_models import LanguageModel
from nano_think.experts.state_space import StateSpaceExpert


@dataclass(frozen=True)
class Size:
    """Of the stack, with its batch, and the vocabulary."""

    stack: state_space_models.Size
    vocab_size: int = 32_000

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.stack.tokens

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.stack.length

    def draw(self, batch: int | None = None, length: int | None = None) -> tuple[Tensor, Tensor]:
        """As `language_models.Size.draw`."""
        plain = language_models.Size(vocab_size=self.vocab_size)
        return plain.draw(batch or self.stack.batch, length or self.stack.length)


def ours(size: Size, ssd: bool = False) -> LanguageModel:
    """ExpertLM around the state-space expert, with Mamba-2's mixer where `ssd`; never holds all logits."""
    expert, _ = (state_space_models.ssd if ssd else state_space_models.s6)(size.stack)
    assert isinstance(expert, StateSpaceExpert)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return language_models.around(expert, size.vocab_size)


def mamba(size: Size, with_mambapy: bool = False) -> LanguageModel:
    """Hugging Face's Mamba: its loop over positions where its kernels are not installed, or mambapy's scan."""
    backbone, _ = state_space_models.mamba(size.stack, with_mambapy)
    return _hugging_face("MambaForCausalLM", backbone, size, ssd=False)


def mamba2(size: Size) -> LanguageModel:
    """Hugging Face's Mamba2 by chunks, or by its kernels where they are installed."""
    backbone, _ = state_space_models.mamba2(size.stack)
    return _hugging_face("Mamba2ForCausalLM", backbone, size, ssd=True)


BUILDERS: dict[str, Callable[[Size], LanguageModel]] = {
    "nano_think state space": ours,
    "HF Mamba": mamba,
    "HF Mamba with mambapy": partial(mamba, with_mambapy=True),
    "nano_think SSD": partial(ours, ssd=True),
    "HF Mamba2": mamba2,
}


def _hugging_face(kind: str, backbone: nn.Module, size: Size, ssd: bool) -> LanguageModel:
    """The model of that class with the layers of a filled backbone, our table and our last norm."""
    from benchmarks.peers import hugging_face

    config = backbone.config
    config.vocab_size, config.tie_word_embeddings = size.vocab_size, True
    model = getattr(hugging_face(), kind)(config)
    source = dict(ours(size, ssd).network.named_parameters())
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "embed" not in name:
                model.backbone.get_parameter(name).copy_(parameter)
        model.backbone.embeddings.weight.copy_(source["embedding.weight"])
        model.backbone.norm_f.weight.copy_(source["expert.norm.weight"])
    if model.lm_head.weight is not model.backbone.embeddings.weight:
        raise ValueError(f"the head of {kind} is not tied to its table")

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        # it moves the labels by one itself
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    return LanguageModel(model, loss, model, model.backbone.layers[0].norm)
