"""Phase 6: pre-train experts one by one; each becomes an artefact and is published by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from torch import nn

from nano_think.artifacts.build import build as build_network
from nano_think.artifacts.build import check as check_network
from nano_think.artifacts.checkpoint import load_checkpoint, save_expert
from nano_think.errors import UserError
from nano_think.model import ExpertLM
from nano_think.nn.leaks import leaks, refusal
from nano_think.phases.data import shards_maker
from nano_think.phases.fit import Fit
from nano_think.phases.run import Maker, Run

STATISTICS_ROWS = 64
# Training keys that are arguments of an objective, not of the fit.
OBJECTIVE_KEYS = ("mse_weight", "ce_weight", "mse_of", "time_sampler")


def expert_maker(run: Run, name: str) -> Maker:
    """The expert `name`, with the experts it needs: a teacher, or the owner of the shared table."""
    training = run.plain(run.cfg.training[name])
    shards = shards_maker(run)
    fit = Fit(run, shards, training, name, train_split="expert_train", key=f"training.{name}")
    own_table = training["trains_embedding"] or run.cfg.expert.embed == "own"
    needs = {need: expert_maker(_run_of(run, need), need) for need in _needs(run, name, training)}
    network = run.plain(run.cfg.experts[name])
    if found := leaks(check_network(network, f"experts.{name}")):
        raise UserError(refusal(found))
    objective = {key: training[key] for key in OBJECTIVE_KEYS if key in training}
    spec = {
        "network": network,
        "vocab_size": run.cfg.size.vocab_size,
        "own_table": own_table,
        "objective": [training["objective"], objective],
        "fit": fit.spec,
    }

    def build(path: Path) -> dict[str, Any]:
        return _train(run, maker, fit, path)

    command = run.command(phase="expert", expert=name)
    maker = Maker(name, spec, build, {"shards": shards, **needs}, command, trains=True)
    return maker


def _needs(run: Run, name: str, training: dict[str, Any]) -> list[str]:
    """Experts to be made before: none for a private table, unless one is needed as a teacher."""
    if run.cfg.expert.embed == "own" and name != "diffuser":
        return []
    if run.cfg.expert.embed not in ("own", "shared_frozen"):
        raise UserError(f"expert.embed={run.cfg.expert.embed} is not one of shared_frozen, own")
    return training["needs"]


def _run_of(run: Run, name: str) -> Run:
    """This run where it names the expert itself, else the run of a prerequisite."""
    own = run.cfg.phase.name == "expert" and name in run.cfg.expert.names
    return run if own else run.sub("expert", name)


def _train(run: Run, maker: Maker, fit: Fit, path: Path) -> dict[str, Any]:
    """Build network and objective, fit, write the checkpoint into `path`."""
    spec, tokenizer, data = maker.spec, fit.tokenizer(), fit.data()
    fit.seed_everything()
    expert = build_network(spec["network"])
    table, teacher = _table_and_teacher(run, maker, tokenizer.vocab_size)
    network = ExpertLM(table, expert)
    objective, arguments = get_object(spec["objective"][0]), dict(spec["objective"][1])
    if teacher is not None and hasattr(expert, "fit_statistics"):
        from nano_think.tasks.denoise import fit_target_statistics

        fit_target_statistics(network, teacher, data.dataloader("expert_train", rows=STATISTICS_ROWS))
        arguments |= {"teacher": teacher, "seed": run.cfg.seed}
    lengths = torch.as_tensor(tokenizer.byte_lengths)
    task = objective(network, domains=data.domains, byte_lengths=lengths, **fit.factories(), **arguments)
    result = fit(task, data, run.work_dir(maker))
    save_expert(path, maker.kind, spec["network"], network.cpu(), tokenizer, run.cfg.size.seq_len)
    return result


def _table_and_teacher(run: Run, maker: Maker, vocab_size: int) -> tuple[nn.Embedding, ExpertLM | None]:
    """The embedding table to train with, and the frozen Transformer where one is needed."""
    d_model = run.cfg.size.d_model
    teacher = None
    if "transformer" in maker.needs:
        folder = maker.needs["transformer"].recipe.path(run.artifacts)
        teacher = load_checkpoint(folder, maker.needs["transformer"].command).model
    if maker.spec["own_table"] or teacher is None:
        table = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(table.weight, std=0.02)
        return table, teacher
    table = copy.deepcopy(teacher.embedding)
    table.requires_grad_(False)
    return table, teacher


def run(run: Run) -> dict[str, Any]:
    """`phase=expert`: make every expert that `expert=` names, publish each by name."""
    made, losses = {}, {}
    for name in run.cfg.expert.names:
        path = run.obtain(expert_maker(run, name), named=True)
        losses[name] = run.result_of(path)["val_loss"]
        made[name] = str(run.publish(path, f"{name}_expert"))
        run.say(f"[bold]{name}[/bold]: validation loss {losses[name]:.4f}, {made[name]}")
    return {"checkpoints": made, "val_loss": losses, "objective": sum(losses.values()) / len(losses)}
