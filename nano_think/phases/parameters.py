"""`phase=parameters`: what each part of the configured model has in parameters, without allocating any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from nano_think.artifacts.build import build as build_network
from nano_think.artifacts.outline import outlined
from nano_think.evals.parameters import PLAN_ESTIMATES, count_parameters
from nano_think.evals.report import Table, render_table
from nano_think.experts.diffuser import DiffuserExpert
from nano_think.files import atomic_write, write_json
from nano_think.model import ExpertLM, NanoThink
from nano_think.nn.slots import SlotReader
from nano_think.phases.mla import fused_spec, model_settings
from nano_think.phases.run import Run


def network_spec(run: Run) -> dict[str, Any]:
    """The network that a run's configuration describes, as plain values: of one expert or of a `NanoThink`."""
    names = list(run.cfg.expert.names)
    return mixture_spec(run, names) if len(names) > 1 else run.plain(run.cfg.experts[names[0]])


def mixture_spec(run: Run, names: Iterable[str]) -> dict[str, Any]:
    """The `NanoThink` of a run's configuration over some of its experts, or one."""
    size, own = run.cfg.size, run.cfg.expert.embed == "own"
    experts = {name: run.plain(run.cfg.experts[name]) for name in names}
    return fused_spec(model_settings(run), experts, size.vocab_size, size.d_model, own)


def configured_network(run: Run, device: str = "meta") -> ExpertLM | NanoThink:
    """The untrained network of `network_spec`; on `meta` it holds no numbers."""
    size, spec = run.cfg.size, network_spec(run)
    with outlined() if device == "meta" else torch.device(device):
        network = build_network(spec)
        return network if "experts" in spec else ExpertLM((size.vocab_size, size.d_model), network)


def run(run: Run) -> dict[str, Any]:
    """Tables to the screen, to parameters.md and to parameters.json."""
    network, size = configured_network(run), run.cfg.size.name
    counted = count_parameters(network)
    components = Table(**{**vars(counted.table()), "title": f"Components at size={size}"})
    made_of = parts(network)
    inside = Table(["part", "parameters"], made_of, formats=["", ","], title="What they are made of")
    options = Table(
        ["optional part", "parameters", "here"],
        [[name, count, "yes" if there else "no"] for name, count, there in optional_parts(network)],
        formats=["", ",", ""],
        title="Optional parts",
    )
    tables = [components, inside, options]
    for table in tables:
        render_table(table, run.console)
    atomic_write(run.dir / "parameters.md", "\n\n".join(table.markdown() for table in tables) + "\n")
    data = {
        "size": size,
        "total": counted.total,
        "trainable": counted.trainable,
        "components": {component.name: component.total for component in counted.components},
        "plan": PLAN_ESTIMATES,
        "parts": dict(parts(network)),
        "optional": {name: {"parameters": n, "here": there} for name, n, there in optional_parts(network)},
    }
    write_json(run.dir / "parameters.json", data)
    return {"total": counted.total, "report": str(run.dir / "parameters.md")}


def parts(network: nn.Module) -> list[tuple[str, int]]:
    """Unique parameters of every part below the components, layers of a stack as one; they add up to the total."""
    seen: set[nn.Parameter] = set()
    found: dict[str, int] = {}
    for name, parameter in network.named_parameters():
        if parameter not in seen:
            seen.add(parameter)
            part = _part(name)
            found[part] = found.get(part, 0) + parameter.numel()
    return list(found.items())


def _part(name: str) -> str:
    """`experts.diffuser.denoiser.blocks.0.ffn.gate` -> `experts.diffuser.denoiser.blocks`."""
    *path, _ = name.split(".")
    numbers = [i for i, step in enumerate(path) if step.isdigit()]
    path = path[: numbers[0]] if numbers else path
    return ".".join(path[:4]) or name


def optional_parts(network: nn.Module) -> Iterator[tuple[str, int, bool]]:
    """Name, parameters (also where it is left out), and whether the network has it."""
    mla = getattr(network, "mla", None)
    if mla is not None:
        slots = mla.attention.slots
        width, heads = mla.attention.out_proj.out_features, mla.attention.heads.num_heads
        with outlined():
            reader = SlotReader if slots is None else type(slots)
            count = sum(p.numel() for p in reader(width, heads).parameters())
        yield "memory: norm, null slot and bias a head of the MLA (retrieval.k > 0)", count, slots is not None
    for module in network.modules():
        if isinstance(module, DiffuserExpert):
            here = module.denoiser.estimate_in is not None
            yield "diffuser: input of the earlier estimate (self_cond)", module.d_model**2, here
            here = module.target != "hidden_same"
            name = "diffuser: read-out of targets that are no hidden state (target)"
            yield name, module.d_model**2 + module.d_model, here
