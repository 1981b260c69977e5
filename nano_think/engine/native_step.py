"""Decoding on the CPU with one native call a token, `native_step.cpp`.

PyTorch spends most of a token at batch 1 between its operators, and reads weights at half the memory's speed.
Here the weights are packed once, in the order of use, and streamed through one call that reads each of them once
for all rows. The plain step, `extend` of the model, remains the reference, the fallback and the way a prompt is
read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nano_think.engine.native_library import (
    Model,
    Part,
    Precision,
    Rows,
    buffer,
    kind_of,
    load_library,
    pad_vectors,
    padded,
)
from nano_think.engine.native_parts import networks_of, packed, supports, versions
from nano_think.engine.native_screen import pays
from nano_think.engine.native_state import layers_of, load_layer, state_bytes
from nano_think.experts.diffuser import DiffuserExpert
from nano_think.model import ExpertLM, NanoThink
from nano_think.ops.diffusion import noise_table
from nano_think.ops.rope import rope_angles

__all__ = ["NativeStep", "Precision", "supports"]


class NativeStep:
    """A packed copy of a model and the decode state of `batch` rows.

    precision: how the matrices are kept: `fp32`, `bf16`, or `int8` with one scale a row. Sums, norms, softmax, the
    router, scan states and everything that is no matrix product are fp32; beside coarse weights keys, values and
    latents are kept in bf16. The prompt is read by the plain fp32 model.
    max_len: most positions the state holds. threads: of each step, torch's number where not given. Neither it nor
    the other rows change a bit of a row's logits.
    positions: how many positions each row has read. routing: (n, N) weights of the last step's rows, None for a
    single expert; overwritten by the next step. screened: whether the last step left logits out; hidden: what the
    head read then, (d_model padded,), overwritten by the next step.

    The weights are copied here, once for all steps of a model and precision as long as it does not change:
    `prefill` and `load` raise RuntimeError where it has changed since.
    Raises ValueError for a model that `supports` turns down, BuildError without a compiler.
    """

    def __init__(
        self,
        model: ExpertLM | NanoThink,
        precision: Precision = "fp32",
        max_len: int = 512,
        threads: int | None = None,
        batch: int = 1,
    ) -> None:
        self.model, self.max_len, self.batch, self.positions = model, max_len, batch, [0] * batch
        self._threads, self._kind, self.precision = threads, kind_of(precision), precision
        self._library = load_library()
        self._packed = packed(model, precision)
        self._caches = torch.float32 if precision == "fp32" else torch.bfloat16
        self._networks = networks_of(model)
        self._sizes = [
            [state_bytes(layer, max_len, self._caches) for layer in layers_of(network)]
            for network in self._networks
        ]
        self._states = [buffer(batch * sum(sizes)).zero_().view(batch, -1) for sizes in self._sizes]
        sizes = self._packed.sizes
        experts = sizes["num_experts"]
        self._router_state = torch.zeros(batch, experts + 1)
        self._outputs = experts if sizes.get("mixes_probabilities") else 1
        self._logits = torch.empty(batch, self._outputs, padded(sizes["vocab_size"]))
        self._weights = torch.empty(batch, experts)
        self.routing: Tensor | None = None
        self.screened, self.hidden = False, torch.empty(padded(sizes["d_model"]))
        self._describe()

    @property
    def weights(self) -> Tensor:
        """The packed bytes."""
        return self._packed.weights

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one step reads; keys, values and scan states come on top."""
        return self.weights.numel()

    @property
    def position(self) -> int:
        """Positions that the first row has read.

        Setting it sets all rows. Keys and values of later positions are forgotten then; scan states and the
        router's sums, which cannot be turned back, stay what they are.
        """
        return self.positions[0]

    @position.setter
    def position(self, position: int) -> None:
        self.positions = [position] * self.batch

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Start anew with a prompt, read by the plain model in one pass; logits (V,) of what follows it.

        With tokens (batch, P) every row gets its own prompt, the logits being (batch, V).
        """
        prompt = torch.as_tensor(tokens)
        rows = prompt if prompt.ndim == 2 else prompt.unsqueeze(0)
        state: Any = self.model.init_state(len(rows), rows.shape[1])
        output = self.model.extend(rows, state, last_only=True)
        self.load(state)
        assert output.logits is not None
        return output.logits[:, -1] if prompt.ndim == 2 else output.logits[0, -1]

    @torch.no_grad()
    def load(self, state: Any) -> None:
        """Go on from a decode state of `batch` rows that the plain model has filled."""
        if versions(self.model) != self._packed.versions:
            raise RuntimeError("the model has changed since its weights were packed: make a new NativeStep")
        if state.length > self.max_len:
            raise ValueError(f"the state holds {state.length} positions, the native step {self.max_len}")
        states = [state]
        if isinstance(self.model, NanoThink):
            states = [state[name] for name in (*(["mla"] if self.model.mla else []), *self.model.experts)]
        for network, source, sizes, target in zip(
            self._networks, states, self._sizes, self._states, strict=True
        ):
            layers = layers_of(network)
            own = (
                [source]
                if network is getattr(self.model, "mla", None)
                else [source[i] for i in range(len(layers))]
            )
            for layer, layer_state, part in zip(layers, own, target.split(sizes, dim=1), strict=True):
                load_layer(layer, layer_state, part, self._caches)
        if isinstance(self.model, NanoThink):
            values = state["router"].values
            self._router_state[:] = torch.cat((values["sum"], values["count"]), dim=-1)[:, 0]
        self.position = state.length

    def step(self, token: int) -> Tensor:
        """Read one more token of a batch of one; logits (V,) of what follows, overwritten by the next step.

        Raises ValueError where the state is full or the token unknown.
        """
        if self.batch != 1:
            raise ValueError(f"this native step has {self.batch} rows: use step_rows")
        return self.step_rows([token])[0]

    def step_rows(
        self, tokens: Sequence[int], rows: Sequence[int] | None = None, best: int | None = None
    ) -> Tensor:
        """Read one more token of each of `rows`, all where not given; logits (n, V), overwritten by the next step.

        The other rows stay as they are. best: how many of the likeliest tokens are of interest; the logits of all
        others may then be -inf, where finding that out is faster than computing them. Raises ValueError where a
        state is full, a row or a token unknown.
        """
        rows = range(self.batch) if rows is None else rows
        vocab_size = self._packed.sizes["vocab_size"]
        if len(tokens) != len(rows) or len(set(rows)) < len(rows) or not set(rows) <= set(range(self.batch)):
            raise ValueError(
                f"there must be one token for each of some of {self.batch} rows, each named once"
            )
        for token, row in zip(tokens, rows, strict=True):
            if self.positions[row] >= self.max_len:
                raise ValueError(f"the state holds {self.max_len} positions, one more was needed")
            if not 0 <= token < vocab_size:
                raise ValueError(f"token {token} lies outside the vocabulary of {vocab_size} tokens")
        self.screened = best is not None and self._screens(best, len(rows))
        numbers = torch.tensor([list(rows), list(tokens), [self.positions[row] for row in rows]])
        columns = (column.data_ptr() for column in numbers)
        described = Rows(len(rows), *columns, best if self.screened else 0, self.hidden.data_ptr())
        threads = self._threads or torch.get_num_threads()
        addresses = self._logits.data_ptr(), self._weights.data_ptr()
        self._library.native_step(self._described, self._kind, described, *addresses, threads)
        for row in rows:
            self.positions[row] += 1
        if self._packed.router is not None:
            self.routing = self._weights[: len(rows)]
        return self._logits[: len(rows), 0, :vocab_size]

    def read_out(self, hidden: Tensor) -> Tensor:
        """Logits (n, V) of rows (n, d_model padded) of `hidden`, to the bit what a step makes of each."""
        vocab_size = self._packed.sizes["vocab_size"]
        logits = torch.empty(len(hidden), padded(vocab_size))
        self._library.native_read_out(
            *(self._described, self._kind, hidden.data_ptr(), len(hidden), logits.data_ptr()),
            self._threads or torch.get_num_threads(),
        )
        return logits[:, :vocab_size]

    def _screens(self, best: int, rows: int) -> bool:
        sizes = self._packed.sizes
        if sizes.get("mixes_probabilities") or not pays(best, rows, self.precision, sizes["vocab_size"]):
            return False
        screen = self._packed.screen
        self._described.screen = screen.weights.data_ptr()
        self._described.screen_errors = screen.errors.data_ptr()
        return True

    def _describe(self) -> None:
        """The structs that every call passes, and what they point to."""
        made = self._packed
        self._kept: list[Any] = []  # tensors whose memory only the structs know
        parts = [self._part(i) for i in range(len(self._networks))]
        experts = parts[-made.sizes["num_experts"] :]
        attention = parts[: len(parts) - len(experts)]
        self._described = Model(
            **made.sizes,
            max_len=self.max_len,
            table=made.table.data_ptr(),
            router=None if made.router is None else made.router.data_ptr(),
            router_state=self._router_state.data_ptr(),
            head=made.weights.data_ptr() + made.head,
            attention=ctypes.pointer(attention[0]) if attention else None,
            experts=(Part * len(experts))(*experts),
        )

    def _part(self, index: int) -> Part:
        network, made = self._networks[index], self._packed.parts[index]
        rope = noise = None
        if made.rotation is not None:
            rope = torch.stack(rope_angles(torch.arange(self.max_len), *made.rotation))
        if isinstance(network, DiffuserExpert) and network.x_T == "table":
            table = network.noise
            if len(table) < self.max_len:
                table = noise_table(self.max_len, network.d_model, network.noise_seed)
            noise = pad_vectors(table[: self.max_len])
        self._kept += [rope, noise]
        return Part(
            **made.sizes,
            state_bytes=self._states[index].shape[1],
            weights=self.weights.data_ptr() + made.offset,
            mixers=made.mixers.data_ptr(),
            rope=None if rope is None else rope.data_ptr(),
            noise=None if noise is None else noise.data_ptr(),
            state=self._states[index].data_ptr(),
        )
