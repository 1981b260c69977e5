"""Our Transformer language model and the same network in other libraries: one function, the same weights.

Ours normalises the embedding before the first block and the others do not. The embedding rows made here have a
root mean square of 1, of which that norm is the identity, and the last norm's gain is small to keep the logits at
the size of a fresh model's. The square adaptor of our entry starts as the identity and stays our own extra cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import hugging_face
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.model import ExpertLM
from nano_think.ops.cross_entropy import IGNORED

FINAL_GAIN = 0.01
NORM_EPS = 1e-6
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Dimensions of the network and of a batch."""

    num_layers: int = 6
    d_model: int = 384
    num_heads: int = 6
    ffn_dim: int = 1536
    vocab_size: int = 32_000
    batch: int = 8
    length: int = 512

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch * self.length

    @property
    def parameters(self) -> int:
        """Of all matrices, the tied table once."""
        matrices = 4 * self.d_model**2 + 3 * self.d_model * self.ffn_dim
        return self.num_layers * matrices + self.vocab_size * self.d_model

    @property
    def flops(self) -> float:
        """Useful FLOPs of a training step: 6 a token and matmul parameter, 6 L d T a token for causal attention.

        Attention counts the visible half of the scores: q k^T and p v take 2 x 2 d T / 2 a token and layer
        forward and twice that backward. The head is a matmul, the embedding is not; our adaptor is not counted.
        """
        attention = 6 * self.num_layers * self.d_model * self.length
        return self.tokens * (6.0 * self.parameters + attention)

    def draw(self, batch: int | None = None, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Random tokens and the labels after them, (B, L) each; the last label is ignored."""
        generator = torch.Generator().manual_seed(1)
        shape = (batch or self.batch, length or self.length)
        tokens = torch.randint(self.vocab_size, shape, generator=generator)
        return tokens, F.pad(tokens[:, 1:], (0, 1), value=IGNORED)


class LanguageModel(nn.Module):
    """A network with its own way from tokens and labels to the mean loss in nats.

    loss: what a training step calls. core: what torch.compile is applied to. first_norm: the norm of the first
    block, whose gradient has been through everything after it.
    """

    def __init__(self, network: nn.Module, loss: Loss, core: nn.Module, first_norm: Any) -> None:
        super().__init__()
        self.network, self.loss = network, loss
        self.gain: Tensor = first_norm.weight
        self.parts = [core]  # in a list, so that it is not registered twice

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens, labels (B, L) to the mean loss over the labels."""
        return self.loss(tokens, labels)


def ours(size: Size) -> LanguageModel:
    """ExpertLM around the Transformer expert, without dropout, with the loss that never holds all logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expert = TransformerExpert(size.d_model, size.num_layers, size.num_heads, size.ffn_dim, dropout=0.0)
        return around(expert, size.vocab_size)


def around(expert: TransformerExpert | StateSpaceExpert, vocab_size: int) -> LanguageModel:
    """An expert between a table drawn here and the same as head; its last gain is made small."""
    model = ExpertLM((vocab_size, expert.d_model), expert)
    with torch.no_grad():
        table = model.embedding.weight
        table.div_(table.square().mean(1, keepdim=True).sqrt())
        expert.norm.get_parameter("weight").fill_(FINAL_GAIN)

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        return model.token_nll(tokens, labels).sum() / (labels != IGNORED).sum()

    return LanguageModel(model, loss, expert, expert.blocks[0].mixer_norm)


def llama(size: Size) -> LanguageModel:
    """Hugging Face's Llama with our weights and the loss it computes itself."""
    transformers = hugging_face()
    config = transformers.LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.d_model,
        intermediate_size=size.ffn_dim,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        max_position_embeddings=size.length,
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    weights = {"model.embed_tokens": "embedding", "model.norm": "expert.norm"}
    for i in range(size.num_layers):
        theirs, own = f"model.layers.{i}", f"expert.blocks.{i}"
        weights |= {f"{theirs}.input_layernorm": f"{own}.mixer_norm"}
        weights |= {f"{theirs}.post_attention_layernorm": f"{own}.ffn_norm"}
        for name in ("q_proj", "k_proj", "v_proj"):
            weights[f"{theirs}.self_attn.{name}"] = f"{own}.mixer.{name}"
        weights[f"{theirs}.self_attn.o_proj"] = f"{own}.mixer.out_proj"
        for name in ("gate_proj", "up_proj", "down_proj"):
            weights[f"{theirs}.mlp.{name}"] = f"{own}.ffn.{name}"
    _copy(model, {name: (own,) for name, own in weights.items()}, size)

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss  # it moves the labels by one itself

    return LanguageModel(model, loss, model, model.model.layers[0].input_layernorm)


def litgpt(size: Size) -> LanguageModel:
    """litgpt's GPT as a Llama with a tied head; its loss without the chunks, which is the faster one."""
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        block_size=size.length,
        vocab_size=size.vocab_size,
        padded_vocab_size=size.vocab_size,
        n_layer=size.num_layers,
        n_head=size.num_heads,
        n_embd=size.d_model,
        intermediate_size=size.ffn_dim,
        norm_class_name="RMSNorm",
        norm_eps=NORM_EPS,
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    weights: dict[str, tuple[str, ...]] = {"lm_head": ("embedding",), "transformer.ln_f": ("expert.norm",)}
    for i in range(size.num_layers):
        theirs, own = f"transformer.h.{i}", f"expert.blocks.{i}"
        weights[f"{theirs}.norm_1"] = (f"{own}.mixer_norm",)
        weights[f"{theirs}.norm_2"] = (f"{own}.ffn_norm",)
        weights[f"{theirs}.attn.qkv"] = tuple(f"{own}.mixer.{name}_proj" for name in "qkv")
        weights[f"{theirs}.attn.proj"] = (f"{own}.mixer.out_proj",)
        for name, part in (("fc_1", "gate"), ("fc_2", "up"), ("proj", "down")):
            weights[f"{theirs}.mlp.{name}"] = (f"{own}.ffn.{part}_proj",)
    _copy(model, weights, size)

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    return LanguageModel(model, loss, model, model.transformer.h[0].norm_1)


BUILDERS: dict[str, Callable[[Size], LanguageModel]] = {
    "nano_think": ours,
    "HF Llama": llama,
    "litgpt": litgpt,
}


def _copy(model: nn.Module, weights: dict[str, tuple[str, ...]], size: Size) -> None:
    """Fill every weight of `model` with ours of those names, joined by rows; raises KeyError for one left over."""
    source = dict(ours(size).network.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = [source[f"{own}.weight"] for own in weights.pop(name.removesuffix(".weight"))]
            parameter.copy_(torch.cat(parts))
    if weights:
        raise KeyError(f"the peer has no {sorted(weights)}")
