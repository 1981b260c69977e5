"""llama.cpp with the weights of our Transformer language model, through the C interface of llama-cpp-python.

The model file is written here, as architecture `llama` with a tied head and no tokenizer. Matrices are stored in
the asked type, norms in fp32; our entry (a norm and an adaptor that are the identity on these weights, see
`language_models`) has no counterpart. Its cache of keys and values is f16 in all types, as it comes.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.case import installed
from benchmarks.peers.language_models import NORM_EPS, Size, ours

Kind: TypeAlias = Literal["fp32", "f16", "bf16", "q8_0"]
HOW = "pip install --no-deps llama-cpp-python gguf diskcache (needs a C++ compiler and some minutes)"
ROPE_THETA = 10_000.0


def available() -> bool:
    """Whether the library and the writer of its files can be imported."""
    return all(installed(name) for name in ("llama_cpp", "gguf", "diskcache"))


class LlamaCpp:
    """A loaded model with a context for `rows` sequences of at most `length` positions each.

    threads: of each call, torch's number where not given.
    """

    def __init__(self, size: Size, kind: Kind, rows: int, length: int, threads: int | None = None) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.rows, self.vocab_size = rows, size.vocab_size
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(path, size, kind)
            settings = llama_cpp.llama_model_default_params()
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise RuntimeError(f"llama.cpp did not load our weights in {kind}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = rows * length, rows
        settings.n_batch = settings.n_ubatch = max(512, rows)
        settings.flash_attn_type = 0  # off: at these lengths it is slower on a CPU
        settings.n_threads = settings.n_threads_batch = threads or torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp made no context of these sizes")
        self._batch = llama_cpp.llama_batch_init(max(length, rows), 0, rows)

    def prefill(self, tokens: Tensor) -> Tensor:
        """Start every row anew with its prompt (rows, P); logits (rows, V) of the last position."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        logits = []
        for row, prompt in enumerate(tokens.tolist()):
            places = [(token, place, row) for place, token in enumerate(prompt)]
            logits.append(self._decode(places, last_only=True).clone())
        return torch.cat(logits)

    def step(self, tokens: Sequence[int], position: int) -> Tensor:
        """One more token of every row at `position`; logits (rows, V), valid until the next call."""
        return self._decode([(token, position, row) for row, token in enumerate(tokens)])

    def forget(self, position: int) -> None:
        """Drop everything from `position` on."""
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.context), -1, position, -1)

    def _decode(self, places: Sequence[tuple[int, int, int]], last_only: bool = False) -> Tensor:
        """Read (token, position, row) triples in one call."""
        batch = self._batch
        batch.n_tokens = len(places)
        for i, (token, position, row) in enumerate(places):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = row
            batch.logits[i] = not last_only or i == len(places) - 1
        if status := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        count = 1 if last_only else len(places)
        pointer = self.api.llama_get_logits(self.context)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, (count, self.vocab_size)))

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.api.llama_batch_free(self._batch)
            self.api.llama_free(self.context)
        if getattr(self, "model", None):
            self.api.llama_model_free(self.model)


def write_gguf(path: Path, size: Size, kind: Kind) -> None:
    """Our weights of `language_models.ours` as a file that llama.cpp reads."""
    import gguf

    types = gguf.GGMLQuantizationType
    stored = {"fp32": types.F32, "f16": types.F16, "bf16": types.BF16, "q8_0": types.Q8_0}[kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(size.length)
    writer.add_embedding_length(size.d_model)
    writer.add_block_count(size.num_layers)
    writer.add_feed_forward_length(size.ffn_dim)
    writer.add_head_count(size.num_heads)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_rope_dimension_count(size.d_model // size.num_heads)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_vocab_size(size.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, weight in _tensors(size):
        data = weight.numpy()
        if data.ndim > 1 and kind != "fp32":
            writer.add_tensor(name, gguf.quants.quantize(data, stored), raw_dtype=stored)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(size: Size) -> list[tuple[str, Tensor]]:
    weights = {name: p.detach() for name, p in ours(size).network.named_parameters()}
    found = [("token_embd", weights["embedding.weight"]), ("output_norm", weights["expert.norm.weight"])]
    names = {"attn_norm": "mixer_norm", "ffn_norm": "ffn_norm", "attn_output": "mixer.out_proj"}
    names |= {f"attn_{part}": f"mixer.{part}_proj" for part in "qkv"}
    names |= {f"ffn_{part}": f"ffn.{part}_proj" for part in ("gate", "up", "down")}
    for i in range(size.num_layers):
        for theirs, own in names.items():
            weight = weights[f"expert.blocks.{i}.{own}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = _interleaved(weight, size.num_heads)
            found.append((f"blk.{i}.{theirs}", weight))
    return [(f"{name}.weight", weight.contiguous()) for name, weight in found]


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows from halves (i turns with i + dim / 2) to neighbours (2i with 2i + 1), as this architecture rotates."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
