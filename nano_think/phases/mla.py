"""Phase 7: the fused model over frozen experts, stage by stage.

7a static weights (a convex fit), 7b the router alone, 7c table, MLA and router, 7d memory. Each stage starts from
the selected weights of the one before, and what it gains is therefore its own.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nano_think.artifacts.build import build as build_network
from nano_think.artifacts.build import check as check_network
from nano_think.artifacts.checkpoint import Checkpoint, load_checkpoint, save_fused
from nano_think.artifacts.memory import Memory, build_memory, load_memory, save_memory
from nano_think.artifacts.outline import outlined
from nano_think.errors import UserError
from nano_think.evals.flops import forward_flops
from nano_think.evals.forgetting import forgetting
from nano_think.evals.pools import ExpertOutputs, expert_outputs
from nano_think.evals.report import Table, render_table
from nano_think.files import write_json
from nano_think.model import NanoThink
from nano_think.nn.leaks import leaks, refusal
from nano_think.ops.pooling import StaticFit, fit_static_weights, usefulness
from nano_think.phases.data import shards_maker
from nano_think.phases.expert import expert_maker
from nano_think.phases.fit import Fit
from nano_think.phases.run import Maker, Run
from nano_think.phases.stage_gates import CAUSES, Judge, gain_in_words, pass_gates
from nano_think.retrieval import leaky_settings

if TYPE_CHECKING:
    from nano_think.data.module import TokenDataModule
    from nano_think.tasks.expert_cache import ExpertCache

STAGES = ("7a", "7b", "7c", "7d")
SPLIT = "fusion_train"


def last_stage(run: Run) -> str:
    """The stage that `stage=` asks for; `all` ends with memory, or before it where retrieval.k is 0."""
    if run.cfg.stage != "all":
        return run.cfg.stage
    return "7d" if run.cfg.model.retrieval.k else "7c"


def stage_numbers(run: Run, stage: str) -> dict[str, Any]:
    """The numbers of a stage's fit, as `Fit` takes them."""
    training = run.plain(run.cfg.training.mla)
    own = training.get(f"stage_{stage}", {})
    return {**training, "lr": 0.0, "weight_decay": 0.0, "warmup_steps": 0, "max_steps": None, **own}


def mla_maker(run: Run, stage: str) -> Maker:
    """The fused model after `stage`, on top of the stage before it; UserError for settings that leak."""
    training, numbers = run.plain(run.cfg.training.mla), stage_numbers(run, stage)
    fit = Fit(run, shards_maker(run), numbers, f"mla_{stage}", train_split=SPLIT, key="training.mla")
    spec = {"experts": list(run.cfg.expert.names), "seed": run.cfg.seed}
    needs: dict[str, Maker] = {"shards": fit.shards}
    if stage == "7a":
        needs |= {name: expert_maker(run.sub("expert", name), name) for name in run.cfg.expert.names}
        spec |= {"model": model_settings(run), "static_tokens": training["static_tokens"]}
        _refuse_leaks(spec["model"]["router"], *(needs[name].spec["network"] for name in spec["experts"]))
        spec |= {"seq_len": run.cfg.size.seq_len, "mode": run.cfg.data.mode}
    else:
        # a router over one expert has nothing to learn
        one = len(run.cfg.expert.names) == 1
        needs["before"] = mla_maker(run, "7a" if one and stage == "7c" else STAGES[STAGES.index(stage) - 1])
        keys = ("anchor", "entropy_token", "entropy_mean", "memory_dropout", "router_lr_scale")
        spec |= {"fit": fit.spec, **{key: training[key] for key in keys}}
        if stage == "7c" and training["unfreeze"] != "none":
            spec["unfreeze"] = _unfreeze(training["unfreeze"])
    if stage == "7d":
        spec |= {"retrieval": _retrieval(run), "store": run.plain(run.cfg.model.store)}

    def build(path: Path) -> dict[str, Any]:
        return _static(run, maker, fit, path) if stage == "7a" else _train(run, maker, stage, fit, path)

    names = run.cfg.expert.names
    phase, expert = ("mla", run.cfg.expert.name) if len(names) > 1 else ("finetune", names[0])
    command = run.command(phase=phase, expert=expert, stage=stage)
    maker = Maker(f"mla_{stage}", spec, build, needs, command, trains=stage != "7a")
    return maker


def _unfreeze(choice: str) -> str:
    from nano_think.tasks.route import UNFROZEN  # here, so that naming a stage does not import Lightning

    if choice not in UNFROZEN:
        raise UserError(f"training.mla.unfreeze={choice} is unknown: choose {', '.join(UNFROZEN)}")
    return choice


def _refuse_leaks(*networks: dict[str, Any]) -> None:
    """Raise UserError where one of these specs describes a network that reads later tokens."""
    with outlined():
        parts = nn.ModuleList(build_network(network) for network in networks)
    if found := leaks(parts):
        raise UserError(refusal(found))


def _retrieval(run: Run) -> dict[str, Any]:
    """How memory is asked in training; raises UserError for settings that let a token learn of later ones."""
    settings = run.plain(run.cfg.model.retrieval)
    if found := leaky_settings(settings):
        raise UserError(refusal(found))
    return settings


def model_settings(run: Run) -> dict[str, Any]:
    """MLA, router and fusion as plain values; private tables force raw input and probability space."""
    settings = {key: run.plain(run.cfg.model[key]) for key in ("mla", "router", "fusion", "expert_input")}
    settings["mla"] = {**settings["mla"], "memory": run.cfg.model.retrieval.k > 0}
    for part in ("mla", "router"):
        check_network(settings[part], f"model.{part}")
    if run.cfg.expert.embed == "own":
        settings |= {"fusion": {"space": "prob"}, "expert_input": "raw"}
    return settings


def fused_spec(
    settings: dict[str, Any], experts: dict[str, Any], vocab_size: int, d_model: int, own_tables: bool
) -> dict[str, Any]:
    """The spec of a `NanoThink` of expert specs by name; own_tables: they were trained with private ones."""
    spec = {
        "_target_": "nano_think.model.NanoThink",
        "experts": experts,
        "vocab_size": vocab_size,
        "d_model": d_model,
        "mla": settings["mla"],
        "router": {**settings["router"], "num_experts": len(experts)},
        "fusion": settings["fusion"]["space"],
        "expert_input": settings["expert_input"],
    }
    if own_tables and (spec["fusion"], spec["expert_input"]) == ("prob", "raw"):
        table = {"_target_": "torch.nn.Embedding", "num_embeddings": vocab_size, "embedding_dim": d_model}
        spec["tables"] = {name: dict(table) for name in experts}
    return spec


def _assemble(maker: Maker, experts: dict[str, Checkpoint]) -> tuple[NanoThink, dict[str, Any]]:
    """The fused model around pre-trained experts, and its spec."""
    first = next(iter(experts.values())).model
    specs = {name: checkpoint.spec["expert"] for name, checkpoint in experts.items()}
    settings, d_model = maker.spec["model"], first.embedding.embedding_dim
    spec = fused_spec(settings, specs, first.vocab_size, d_model, _private(maker))
    model = build_network(spec)
    for name, checkpoint in experts.items():
        model.experts[name].load_state_dict(checkpoint.model.expert.state_dict())
        if name in model.tables:
            model.tables[name].load_state_dict(checkpoint.model.embedding.state_dict())
    model.embedding.load_state_dict(first.embedding.state_dict())
    model.freeze_experts()
    return model, spec


def _private(maker: Maker) -> bool:
    """Whether an expert other than the first was trained with a table of its own."""
    names = maker.spec["experts"]
    return any(maker.needs[name].spec["own_table"] for name in names[1:])


def _static(run: Run, maker: Maker, fit: Fit, path: Path) -> dict[str, Any]:
    """7a: assemble the model and fit one constant weight an expert, on text that no expert saw."""
    experts = {
        name: load_checkpoint(maker.needs[name].recipe.path(run.artifacts), maker.needs[name].command)
        for name in maker.spec["experts"]
    }
    fit.seed_everything()
    model, spec = _assemble(maker, experts)
    model.eval()
    data, tokenizer = fit.data(), fit.tokenizer()
    sample = _sample(model, data, maker.spec["static_tokens"])
    hidden, heads, labels = sample.hidden, sample.heads, sample.labels
    space = "prob" if model.fusion == "prob" else "hidden"
    fitted = fit_static_weights(hidden, heads, labels, space=space)
    useful = usefulness(hidden, heads, labels)
    model.router.set_static(fitted.weights)
    save_fused(path, spec, model, tokenizer, run.cfg.size.seq_len)
    result = {
        "weights": dict(zip(hidden, fitted.weights.tolist(), strict=True)),
        "loss": fitted.nll,
        "loss_per_expert": dict(zip(hidden, fitted.nll_per_expert.tolist(), strict=True)),
        "gap": dict(zip(hidden, useful.gap.tolist(), strict=True)),
        "mean_kl": dict(zip(hidden, useful.kl.tolist(), strict=True)),
        "helps": dict(zip(hidden, useful.helps.tolist(), strict=True)),
        "reference": list(hidden)[useful.reference],
        "tokens": len(labels),
    }
    write_json(path / "static.json", result)
    result |= {
        "trained_parameters": len(fitted.weights),
        "flops": _static_flops(model, data, fitted, len(labels)),
    }
    return result | Judge(model, data, tokenizer, path).static(sample, fitted, result)


def _static_flops(model: NanoThink, data: TokenDataModule, fitted: StaticFit, num_tokens: int) -> float:
    """What 7a takes: the experts' outputs once, and the products of the fit with the head."""
    from nano_think.phases.cost import document_length  # here, as it imports Lightning

    outputs = forward_flops(model, document_length(data, SPLIT))
    experts = sum(flops for name, flops in outputs.items() if name.startswith(("mla", "experts.")))
    return num_tokens * experts + fitted.products * 2 * model.embedding.weight.numel()


def _sample(model: NanoThink, data: TokenDataModule, num_tokens: int) -> ExpertOutputs:
    """The experts' outputs for tokens spread evenly over the fusion split."""
    rows = -(-num_tokens // (data.seq_len * len(data.domains)))
    return expert_outputs(model, data.dataloader(SPLIT, rows=rows), num_tokens)


def _train(run: Run, maker: Maker, stage: str, fit: Fit, path: Path) -> dict[str, Any]:
    """7b, 7c, 7d: train the declared set of the stage with Lightning."""
    from nano_think.tasks.route import RouteTask  # here, so that naming a stage does not import Lightning

    before = maker.needs["before"]
    start = load_checkpoint(before.recipe.path(run.artifacts), before.command)
    model, data, tokenizer = start.model, fit.data(), start.tokenizer
    fit.seed_everything()
    memory = None
    if stage == "7d":
        memory = run.ranks.after_first(f"fill memory {fit.label}", lambda: _memory(run, maker, model, data))
    cache = expert_cache(run, fit, model, data, run.work_dir(maker)) if stage == "7b" else None
    training = run.plain(run.cfg.training.mla)
    scale = {"router": training["router_lr_scale"]} if stage != "7b" else None
    options = {key: training[key] for key in ("anchor", "entropy_token", "entropy_mean", "memory_dropout")}
    task = RouteTask(
        model,
        domains=data.domains,
        byte_lengths=torch.as_tensor(tokenizer.byte_lengths),
        stage=stage,
        slots=memory.slots if memory else None,
        seed=run.cfg.seed,
        cache=cache,
        unfreeze=maker.spec.get("unfreeze", "none"),
        **fit.factories(scale),
        **options,
    )
    held = copy.deepcopy(model) if "unfreeze" in maker.spec else None
    result = fit(task, data, run.work_dir(maker))
    if held is not None:
        result["alone"] = forgetting(held, model.cpu(), list(data.val_dataloader()))
    save_fused(path, start.spec["model"], model.cpu(), tokenizer, run.cfg.size.seq_len)
    write_json(path / "static.json", json.loads((start.path / "static.json").read_text()))
    if memory is not None:
        save_memory(memory, path / "memory")
        result["memory"] = memory.figures
    judged = Judge(model, data, tokenizer, path).trained(stage, start, memory)
    return result | judged


def expert_cache(
    run: Run, fit: Fit, model: NanoThink, data: TokenDataModule, folder: Path
) -> ExpertCache | None:
    """What keeps the experts' outputs in 7b, in memory or on disk as they fit; None to recompute them."""
    from nano_think.tasks.expert_cache import ExpertCache

    settings = run.plain(run.cfg.training.mla.cache)
    if settings["mode"] not in ("auto", "off"):
        raise UserError(f"training.mla.cache.mode={settings['mode']} is unknown: choose auto or off")
    if settings["mode"] == "off":
        return None
    steps, _ = fit.steps(data)
    drawn = steps * fit.accumulate * data.batch_size
    trained = data.num_rows(SPLIT)
    if fit.training["max_flops"] is None:  # how long a budget lasts is known later
        trained = min(drawn, trained)
    rows = trained + data.num_rows(data.val_split, data.val_rows)
    cache = ExpertCache(model, rows, data.seq_len)
    size = cache.bytes / 1e9
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    said = f"7b keeps what the experts say of {rows} rows instead of computing it every time they come"
    if size <= settings["memory_gb"]:
        run.say(f"{said}: up to {size:.2g} GB in memory (training.mla.cache.mode=off recomputes)")
        return cache
    if size <= min(settings["disk_gb"], free / 2):
        run.say(f"{said}: up to {size:.2g} GB on disk, more than training.mla.cache.memory_gb")
        return ExpertCache(model, rows, data.seq_len, folder)
    run.say(
        f"7b computes the experts' outputs anew every time: keeping them would take {size:.2g} GB, more than "
        "training.mla.cache.memory_gb and disk_gb or half of the free disk"
    )
    return None


def _memory(run: Run, maker: Maker, model: NanoThink, data: TokenDataModule) -> Memory:
    """The frozen store of 7d, filled once by the model of 7c; a resumed run finds it where it left it."""
    folder = run.work_dir(maker) / "memory"
    memory = load_memory(folder)
    if memory is None:
        run.say("filling the memory from the experts' training text")
        store = dict(maker.spec["store"])
        batches = data.dataloader("expert_train", rows=store.pop("rows"))
        memory = build_memory(model, batches, maker.spec["retrieval"], store)
        save_memory(memory, folder)
    return memory


def stages_of(maker: Maker) -> Iterator[tuple[str, Maker]]:
    """The stages that lead to `maker`, first one first."""
    if "before" in maker.needs:
        yield from stages_of(maker.needs["before"])
    yield maker.kind.removeprefix("mla_"), maker


def run(run: Run) -> dict[str, Any]:
    """`phase=mla`: make the stages in order, show what each gained, publish the model."""
    maker = mla_maker(run, last_stage(run))
    gates = _make_stages(run, maker)
    path = maker.recipe.path(run.artifacts)
    names = run.cfg.expert.names
    published = run.publish(path, "nano_think" if len(names) > 1 else f"finetuned_{names[0]}")
    rows, causes = [], []
    for stage, made in stages_of(maker):
        if not made.recipe.exists(run.artifacts):
            continue  # an earlier stage that somebody deleted
        result = run.result_of(made.recipe.path(run.artifacts))
        if stage == "7a":
            show_static(run, result)
            causes.append([stage, CAUSES[stage], gain_in_words(result.get("gain"))])
        else:
            first, best = result["history"][0][1], result["val_loss"]
            causes.append([stage, CAUSES[stage], gain_in_words(result.get("gain"))])
            rows.append([stage, first, best, first - best, result["best_step"], result["steps"]])
    table = Table(
        ["stage", "val loss before", "after", "gain", "selected step", "steps"],
        rows,
        title="What each stage gained",
    )
    render_table(table, run.console)
    headers = ["stage", "cause", "difference in nats a token [95% over documents]"]
    render_table(Table(headers, causes, title="Why it gained"), run.console)
    run.say(f"[bold]model[/bold]: {published}")
    return {
        "checkpoint": str(published),
        "stages": {row[0]: row[2] for row in rows},
        "objective": _last(rows),
        "gates": gates,
    }


def _make_stages(run: Run, maker: Maker) -> list[dict[str, Any]]:
    """Make the stages up to `maker` in order, each after the gates of those before it; the answers of all gates.

    An earlier stage that somebody deleted is made again only where what follows it is missing too.
    """
    stages, gates = list(stages_of(maker)), []
    there = [index for index, (_, made) in enumerate(stages) if made.recipe.exists(run.artifacts)]
    for index, (stage, made) in enumerate(stages):
        if index in there or index > max(there, default=-1):
            path = run.obtain(made, named=made is maker or run.cfg.stage == "all")
            gates += pass_gates(run, stage, run.result_of(path))
    return gates


def show_static(run: Run, result: dict[str, Any]) -> None:
    """The usefulness criterion and the static weights on screen."""
    rows = [
        [name, result["loss_per_expert"][name], result["gap"][name], result["mean_kl"][name], weight]
        + (["reference"] if name == result["reference"] else ["yes" if result["helps"][name] else "no"])
        for name, weight in result["weights"].items()
    ]
    headers = ["expert", "loss", "gap", "mean KL", "static weight", "helps (gap < KL)"]
    render_table(
        Table(headers, rows, title="7a: static weights on text that no expert saw, nats a token"), run.console
    )


def _last(rows: list[list[Any]]) -> float | None:
    return rows[-1][2] if rows else None
