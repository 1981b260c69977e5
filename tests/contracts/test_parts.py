"""Contracts over all that a configuration can build: a new YAML or mixer is covered without editing this file.

A part is what an option of a config group or an experiment describes at size=tiny, or an expert made of a mixer of
`nano_think/nn/mixers`. Every check below holds for every part and knows none by name.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import nano_think.experts as expert_package
from nano_think.artifacts.build import build, complete
from nano_think.artifacts.checkpoint import load_checkpoint, save_expert, save_fused
from nano_think.config import register_schema
from nano_think.evals.audit.live import filled_memory, live_copy
from nano_think.evals.audit.plan import Plan
from nano_think.evals.audit.run import audit
from nano_think.evals.flops import parts_of
from nano_think.model import ExpertLM, NanoThink
from nano_think.nn import mixers as mixer_package
from nano_think.nn.flops import Reach
from nano_think.nn.slots import SlotReader
from nano_think.ops import attention_cpp
from nano_think.ops.selective_scan import BACKEND_VARIABLE
from nano_think.phases.mla import fused_spec, model_settings
from nano_think.phases.parameters import configured_network
from nano_think.phases.run import Run
from nano_think.retrieval import Retriever
from nano_think.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
NETWORK = re.compile(r"_target_: (nano_think\.(experts|mla|model|nn)|torch\.nn)\.")
MIXED = "nano_think.experts.transformer.TransformerExpert"
# A7 and A8 train, which takes minutes; a part alone cannot fail them and pass A1
UNTRAINED = ("A1", "A2", "A3", "A4", "A5", "A6", "A9", "A10")
# fp32: of the root mean square of what is compared, as in the audit. A sampler that predicts noise multiplies
# rounding by 100, everything else stays below 1e-5
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Part:
    """A language model of one configuration, untrained, and the spec it can be built from again.

    spec: of the whole model, or for an `ExpertLM` of its expert. chunk: tokens of a memory chunk.
    """

    network: ExpertLM | NanoThink
    spec: dict[str, Any]
    chunk: int
    tokenizer: Tokenizer

    @property
    def live(self) -> ExpertLM | NanoThink:
        """A copy in which no initial value hides a path."""
        return live_copy(self.network)[0]


def options(conf: Path) -> list[str]:
    """`group=option` for every file of the groups in which some file names a network."""
    found = []
    for group in sorted(folder for folder in conf.iterdir() if folder.is_dir()):
        files = sorted(group.glob("[!_]*.yaml"))
        if any(NETWORK.search(file.read_text()) for file in files):
            found += [f"{group.name}={file.stem}" for file in files]
    return found


def mixers() -> list[str]:
    """`mixer=path` for every class of `nn/mixers` that decodes."""
    found = []
    for module in pkgutil.iter_modules(mixer_package.__path__, f"{mixer_package.__name__}."):
        members = inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        own = [(name, kind) for name, kind in members if kind.__module__ == module.name]
        found += [f"mixer={module.name}.{name}" for name, kind in own if hasattr(kind, "init_state")]
    return found


PARTS = options(ROOT / "conf") + mixers()
PARTS += [f"experiments={path.stem}" for path in sorted((ROOT / "experiments").glob("*.yaml"))]


@pytest.fixture(scope="module")
def part_of(byte_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Part]:
    """`part_of("expert=diffuser", *folders)`: `folders` are searched for options besides conf/."""

    @cache
    def make(name: str, *folders: Path) -> Part:
        kind, _, value = name.partition("=")
        searched = ",".join(f"file://{folder}" for folder in (ROOT, *folders))
        overrides = ["size=tiny", f"size.vocab_size={byte_tokenizer.vocab_size}"]
        overrides += [f"hydra.searchpath=[{searched}]", *([] if kind == "mixer" else [name])]
        register_schema()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("config", overrides)
        run = Run(cfg, overrides, tmp_path_factory.mktemp("run"), Console(quiet=True))
        experts = {name: run.plain(cfg.experts[name]) for name in cfg.expert.names}
        sizes = (byte_tokenizer.vocab_size, cfg.size.d_model)
        torch.manual_seed(0)
        if kind == "mixer":
            spec = next(with_mixer(e, value) for e in experts.values() if e["_target_"] == MIXED)
            network: ExpertLM | NanoThink = ExpertLM(sizes, build(spec))
        else:
            network, spec = configured_network(run, "cpu"), next(iter(experts.values()))
            if len(experts) > 1:
                spec = fused_spec(model_settings(run), experts, *sizes, cfg.expert.embed == "own")
        return Part(network, spec, cfg.size.chunk, byte_tokenizer)

    return make


def with_mixer(expert: dict[str, Any], path: str) -> dict[str, Any]:
    """The spec of an expert with another mixer, which is told the expert's sizes that it asks for."""
    module, _, name = path.rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(module), name))
    asked = [p.name for p in signature.parameters.values() if p.default is p.empty and p.name != "d_model"]
    return {
        **expert,
        "mixer": {"_target_": path, "_partial_": True, **{name: expert[name] for name in asked}},
    }


def some_tokens(part: Part, rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(part.network.vocab_size, (rows, length), generator=generator)


def memory_of(network: ExpertLM | NanoThink, chunk: int) -> Retriever | None:
    """A filled memory for a network with parameters to read one."""
    reads = any(isinstance(module, SlotReader) for module in network.modules())
    return filled_memory(network.embedding.weight, chunk) if reads else None


def said(output: Any) -> dict[str, Tensor]:
    """Everything that an output says about each position."""
    found = {"logits": output.logits, "context": output.context, **output.expert_hidden}
    return found if output.weights is None else {**found, "weights": output.weights}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        off = (value - expected[name]).abs().max() / expected[name].square().mean().sqrt()
        assert off <= TOLERANCE, f"{name} is off by {float(off):.1g} of its size"


def keeps_shape_and_dtype(part: Part, folder: Path) -> None:
    """(B, L, d) in, (B, L, d) out, of one dtype, for every network inside; (B, L, V) fp32 logits."""
    network = part.live
    inside = dict(getattr(network, "experts", {"expert": getattr(network, "expert", None)}))
    if getattr(network, "mla", None) is not None:
        inside["mla"] = network.mla
    width = network.embedding.embedding_dim
    for name, module in inside.items():
        for dtype in (torch.float32, torch.bfloat16):
            typed = copy.deepcopy(module).to(dtype)
            for batch, length in ((1, 1), (3, 2), (2, 17)):
                out = typed(
                    torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0)).to(dtype)
                )
                assert (out.shape, out.dtype) == ((batch, length, width), dtype), name
                assert out.isfinite().all(), name
    for precise in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            output = network(some_tokens(part, 2, 17))
        assert output.logits.shape == (2, 17, network.vocab_size)
        assert output.logits.dtype == torch.float32
        assert output.logits.isfinite().all()
        assert all(hidden.shape == (2, 17, width) for hidden in output.expert_hidden.values())


def gradients_reach_every_parameter(part: Part, folder: Path) -> None:
    """Finite everywhere, and not all zero, on a batch whose tokens read a filled memory where there is one."""
    network, tokens = part.live.requires_grad_(True), some_tokens(part, 2, 2 * part.chunk + 3)
    memory = memory_of(network, part.chunk)
    logits = network(tokens, **({} if memory is None else {"memory": memory.retrieve(tokens)})).logits
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, f"{name} is not used"
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@torch.no_grad()
def step_equals_full(part: Part, folder: Path) -> None:
    """Read token by token, or a prompt and then token by token."""
    network, length = part.live, 2 * part.chunk + 3
    tokens = some_tokens(part, 2, length)
    full = said(network(tokens))
    for prompt in (1, part.chunk + 1):
        state = network.init_state(2, length)
        pieces = tokens.split([prompt] + [1] * (length - prompt), dim=1)
        steps = [said(network.extend(piece, state)) for piece in pieces]
        assert_same({name: torch.cat([step[name] for step in steps], dim=1) for name in full}, full)
        assert state.length == length


programs = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(1, 9)),
        st.tuples(st.just("read"), st.integers(1, 9)),
        st.tuples(st.just("rollback"), st.integers(1, 4)),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, 2), min_size=3, max_size=3)),
    ),
    min_size=3,
    max_size=10,
)


@torch.no_grad()
def any_cache_program_equals_recomputation(part: Part, folder: Path) -> None:
    """Reading, rolling back and reordering, of the model's cache and of its memory, in any order."""
    network = part.live
    memory = memory_of(network, part.chunk)

    @settings(max_examples=8)
    @given(program=programs)
    def check(program: list[tuple[str, Any]]) -> None:
        state, history, reach = network.init_state(3, 90, max_rollback=4), some_tokens(part, 3, 0), 0
        slots = None if memory is None else memory.init_state(3)
        for number, (action, value) in enumerate([*program, ("read", 1)]):
            if action == "read":
                new = some_tokens(part, 3, value, seed=number + 1)
                history, reach = torch.cat((history, new), dim=1), min(4, reach + value)
                found = network.extend(new, state, **({} if slots is None else {"memory": slots.step(new)}))
                whole = network(history, **({} if memory is None else {"memory": memory.retrieve(history)}))
                assert_same(said(found), {name: full[:, -value:] for name, full in said(whole).items()})
            elif action == "reorder":
                history = history[value]
                for cache in filter(None, (state, slots)):
                    cache.reorder(torch.tensor(value))
            elif value <= reach:
                history, reach = history[:, :-value], reach - value
                for cache in filter(None, (state, slots)):
                    cache.rollback(value)
            assert state.length == history.shape[1]

    check()


def comes_back_from_its_spec(part: Part, folder: Path) -> None:
    """Through JSON and the files of a checkpoint, to the same bits; written-out defaults change nothing more."""
    network, spec = part.live, complete(part.spec)
    assert json.loads(json.dumps(spec)) == complete(spec) == spec
    if isinstance(network, ExpertLM):
        save_expert(folder, "part", part.spec, network, part.tokenizer, seq_len=64)
    else:
        save_fused(folder, part.spec, network, part.tokenizer, seq_len=64)
    loaded, tokens = load_checkpoint(folder), some_tokens(part, 2, 9)
    assert loaded.spec["expert" if isinstance(network, ExpertLM) else "model"] == spec
    assert torch.equal(loaded.model(tokens).logits, network(tokens).logits)


def passes_the_audit(part: Part, folder: Path) -> None:
    """Every check that trains nothing applies and passes."""
    plan = Plan(part.network.vocab_size, length=2 * part.chunk + 5, border=part.chunk)
    found = audit(part.network, plan=plan, checks=UNTRAINED)
    assert all(finding.verdict == "pass" for finding in found.findings), str(found)


@torch.no_grad()
def states_its_products(part: Part, folder: Path) -> None:
    """All that torch's counter sees of a forward pass along the plain paths: no count of FLOPs leaves any out."""
    network, tokens = part.live, some_tokens(part, 2, 2 * part.chunk + 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BACKEND_VARIABLE, "ref")
        patch.setattr(attention_cpp, "fits", lambda *_: False)
        network(tokens)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(tokens)
    reach = Reach(tokens.shape[1], tokens=tokens.numel(), causal=False)
    stated = [product for component in parts_of(network, reach) for product in component.products]
    visible = sum(product.flops for product in stated if not product.elementwise)
    assert visible * tokens.numel() == pytest.approx(counter.get_total_flops())


CHECKS = [
    states_its_products,
    keeps_shape_and_dtype,
    gradients_reach_every_parameter,
    step_equals_full,
    any_cache_program_equals_recomputation,
    comes_back_from_its_spec,
    passes_the_audit,
]


@pytest.fixture(scope="module")
def shown() -> set[tuple[str, str]]:
    """What has been checked: some options and experiments describe the same network, which is checked once."""
    return set()


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_part(part_of, shown, tmp_path, name, check) -> None:
    part = part_of(name)
    key = (check.__name__, json.dumps(part.spec, sort_keys=True))
    if key not in shown:
        check(part, tmp_path / "checkpoint")
    shown.add(key)


def test_nothing_that_is_there_is_missed() -> None:
    assert {f"expert={path.stem}" for path in (ROOT / "conf" / "expert").glob("*.yaml")} < set(PARTS)
    assert {f"experiments={path.stem}" for path in (ROOT / "experiments").glob("*.yaml")} < set(PARTS)
    files = [path.stem for path in (ROOT / "nano_think" / "nn" / "mixers").glob("[!_]*.py")]
    assert all(any(f".{file}." in part for part in PARTS) for file in files)


RECURRENT = '''
import torch
from nano_think.cache import RingState
from nano_think.nn.block import ExpertInput
from nano_think.nn.norm import RMSNorm
from nano_think.ops.layout import Layout


class RecurrentExpert(torch.nn.Module):
    """h_t = decay h_(t-1) + tanh(W x_t), anew with each document."""

    def __init__(self, d_model: int = 384, decay: float = 0.5):
        super().__init__()
        self.d_model, self.decay, self.norm = d_model, decay, RMSNorm(d_model)
        self.entry, self.proj = ExpertInput(d_model), torch.nn.Linear(d_model, d_model)

    def forward(self, x, layout=None):
        h, rows = torch.zeros_like(x[:, 0]), []
        starts = Layout.of(x, layout).starts.expand(x.shape[:2])
        for t, u in enumerate(torch.tanh(self.proj(self.entry(x))).unbind(1)):
            h = self.decay * h.masked_fill(starts[:, t, None], 0) + u
            rows.append(h)
        return self.norm(torch.stack(rows, dim=1))

    def init_state(self, batch, max_len, max_rollback=0):
        return RingState(max_rollback, h=self.proj.weight.new_zeros(batch, self.d_model))

    def extend(self, x, state):
        rows = []
        for u in torch.tanh(self.proj(self.entry(x))).unbind(1):
            state.advance(1, h=self.decay * state["h"] + u)
            rows.append(state["h"])
        return self.norm(torch.stack(rows, dim=1))
'''
# what a careless author might write in place of what, and the checks that must say so
FAULTS = {
    "reads_the_whole_row": (
        "rows.append(h)",
        "rows.append(h + x.mean(1))",
        {step_equals_full, any_cache_program_equals_recomputation, passes_the_audit},
    ),
    "reads_other_documents": (".masked_fill(starts[:, t, None], 0)", "", {passes_the_audit}),
    "writes_into_snapshots": (
        'self.decay * state["h"] + u',
        'state["h"].mul_(self.decay).add_(u)',
        {any_cache_program_equals_recomputation, passes_the_audit},
    ),
    "stops_gradients": ("rows.append(h)", "rows.append(h.detach())", {gradients_reach_every_parameter}),
    "multiplies_and_does_not_say_so": (
        "rows.append(h)",
        "rows.append(h + h @ self.proj.weight)",
        {states_its_products},
    ),
    "widens_the_dtype": ("rows.append(h)", "rows.append(h.float())", {keeps_shape_and_dtype}),
    "has_what_its_spec_does_not_say": (
        "self.decay, self.norm = d_model, decay,",
        "self.decay, self.norm = d_model, hash(object()) % 97 / 97,",
        {comes_back_from_its_spec},
    ),
}


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str, str], Path]]:
    """`plant(name, source)`: an expert and its YAML as files, as a newcomer adds them; the folder of YAMLs."""
    monkeypatch.setattr(expert_package, "__path__", [*expert_package.__path__, str(tmp_path)])
    planted = []

    def write(name: str, source: str) -> Path:
        planted.append(f"{expert_package.__name__}.{name}")
        (tmp_path / f"{name}.py").write_text(source)
        conf = tmp_path / "conf"
        (conf / "expert").mkdir(parents=True)
        (conf / "expert" / f"{name}.yaml").write_text(
            f"# @package _global_\n"
            f"expert: {{name: {name}, names: [{name}], embed: shared_frozen}}\n"
            f"experts: {{{name}: {{_target_: {planted[-1]}.RecurrentExpert, d_model: '${{size.d_model}}'}}}}\n"
        )
        return conf

    yield write
    for module in planted:
        del sys.modules[module]


def test_a_new_expert_is_two_new_files(plant, part_of, tmp_path) -> None:
    conf = plant("recurrent", RECURRENT)
    assert options(conf) == ["expert=recurrent"]
    for check in CHECKS:
        check(part_of("expert=recurrent", conf), tmp_path / "checkpoint")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_new_expert_is_caught(plant, part_of, tmp_path, fault) -> None:
    old, new, checks = FAULTS[fault]
    assert RECURRENT.count(old) >= 1
    conf = plant(fault, RECURRENT.replace(old, new, 1))
    for check in checks:
        with pytest.raises(AssertionError):
            check(part_of(f"expert={fault}", conf), tmp_path / "checkpoint")
