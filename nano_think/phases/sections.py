"""The parts of the evaluation report, each a table or figure with the sentence that says how to read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from nano_think.artifacts.memory import Memory
from nano_think.chunks import complete_chunks
from nano_think.engine.sampling import SamplingConfig
from nano_think.evals.bootstrap import bootstrap, paired_difference
from nano_think.evals.losses import DocumentLosses
from nano_think.evals.parameters import count_parameters
from nano_think.evals.plots import (
    domain_bars,
    loss_curves,
    routing_heatmap,
    weight_by_position,
)
from nano_think.evals.report import Table
from nano_think.evals.routing import analyse_routing, document_weights, knockout_matrix
from nano_think.evals.samples import diffusion_drafts, prompts_of, sample_sheet
from nano_think.metrics.routing import RoutingStats
from nano_think.ops.layout import Layout
from nano_think.phases.machine import versions
from nano_think.vector_records import Reader

if TYPE_CHECKING:
    from nano_think.phases.evaluate import Evaluation

SAMPLE_ROWS = 8
HITS_SHOWN = 6
STILL_FALLING = 0.01


def setting(evaluation: Evaluation) -> None:
    """What was evaluated on which text, by which code, so that the report can be made again."""
    run, corpus, made = evaluation.run, evaluation.corpus, versions()
    synthetic = [name for name, flag in corpus["synthetic"].items() if flag]
    kind = f"{evaluation.checkpoint.kind}, {evaluation.checkpoint.provenance.get('hash', 'no hash')}"
    rows = [
        ["checkpoint", f"{evaluation.checkpoint.name} ({kind})"],
        ["command", run.command(phase=run.cfg.phase.name, expert=run.cfg.expert.name)],
        ["seed", run.cfg.seed],
        ["weights", evaluation.quantize or "as saved"],
        ["text", f"{corpus['source']['name']}, corpus {corpus['hash'][:12]}"],
        ["synthetic domains", ", ".join(synthetic) or "none"],
        ["code", f"nano_think {made['nano_think']}, commit {made['commit']}"],
        ["machine", made["machine"]],
        ["leak audit", evaluation.audit["mark"]],
    ]
    evaluation.report.table(["", "setting"], rows).json({"audit": evaluation.audit})
    if synthetic:
        evaluation.report.text(
            f"**Synthetic text**: {', '.join(synthetic)} come from seeded grammars. Their losses say that the "
            "pipeline works, not how well the model knows English."
        )


def loss_tables(evaluation: Evaluation, losses: dict[str, DocumentLosses]) -> None:
    """Loss, perplexity and bits per byte with intervals; differences to the model on the same documents."""
    settings, report = evaluation.settings, evaluation.report
    own = evaluation.checkpoint.name
    shown = {name: value for name, value in losses.items() if not name.startswith("without ")}
    rows, bars = [], {}
    for name, value in sorted(shown.items(), key=lambda item: item[1].loss()):
        intervals = [
            bootstrap(value, metric, n_resamples=settings["resamples"]) for metric in ("loss", "bpb")
        ]
        difference = "" if name == own else _difference(losses[own], value, settings["resamples"])
        rows.append([name, f"{intervals[0]:.3f}", value.perplexity(), f"{intervals[1]:.3f}", difference])
    headers = ["model", "loss (nats/token)", "perplexity", "bits per byte", f"{own} minus it"]
    tokens, documents = int(losses[own].num_tokens.sum()), len(losses[own])
    report.heading("Losses")
    report.text(
        f"{tokens:,} tokens of {documents:,} documents of the split `{settings['split']}`; 95% intervals over "
        "documents (bootstrap). The last column is paired: the same documents, read by both models. The n-gram "
        "models were fitted on exactly the text that the experts read."
    )
    report.table(
        headers, rows, title=f"Loss on text that no part of the model has seen ({evaluation.audit['mark']})"
    )
    best = min((name for name in evaluation.alone), key=lambda name: losses[name].loss(), default=own)
    compared = [own, best, "Kneser-Ney bigram"] if best != own else [own, "Kneser-Ney bigram"]
    for name in compared:
        bars[name] = {
            domain: bootstrap(losses[name], "loss", domain=i, n_resamples=settings["resamples"])
            for i, domain in enumerate(evaluation.domains)
        }
    figure = domain_bars(evaluation.figures / "domains.png", bars, title="Loss by domain")
    _domain_table(evaluation, losses, [*evaluation.alone, own] if evaluation.fused else [own])
    report.figure(figure, "Loss by domain, with 95% intervals over documents")
    _verdicts(evaluation, losses)


def _verdicts(evaluation: Evaluation, losses: dict[str, DocumentLosses]) -> None:
    """Plain sentences: does each expert beat the n-grams, does the mixture beat the best expert."""
    lines, facts = [], {}
    for name in evaluation.alone:
        for baseline in ("Kneser-Ney bigram", "Kneser-Ney trigram"):
            difference = paired_difference(
                losses[name], losses[baseline], n_resamples=evaluation.settings["resamples"]
            )
            facts[f"{name} vs {baseline}"] = difference.verdict
            lines.append(
                f"- {name} is **{difference.verdict}** than the {baseline} ({difference:+.3f} nats)."
            )
    if evaluation.fused and evaluation.alone:
        best = min(evaluation.alone, key=lambda name: losses[name].loss())
        difference = paired_difference(
            losses["fused"], losses[best], n_resamples=evaluation.settings["resamples"]
        )
        facts["fused vs best expert"] = difference.verdict
        lines.append(
            f"- The mixture is **{difference.verdict}** than the best single expert, {best} "
            f"({difference:+.3f} nats)."
        )
    lines = [line.replace("**not distinguishable** than", "**not distinguishable** from") for line in lines]
    evaluation.report.text("\n".join(lines)).json({"verdicts": facts})


def _difference(own: DocumentLosses, other: DocumentLosses, resamples: int) -> str:
    difference = paired_difference(own, other, n_resamples=resamples)
    return f"{difference:+.3f}, {difference.verdict}"


def _domain_table(evaluation: Evaluation, losses: dict[str, DocumentLosses], names: list[str]) -> None:
    headers = ["domain", "documents", *(f"{name}: perplexity, bits per byte" for name in names)]
    rows = []
    for i, domain in enumerate(evaluation.domains):
        cells = [f"{losses[name].perplexity(i):.1f}, {losses[name].bpb(i):.3f}" for name in names]
        rows.append([domain, losses[names[0]].documents(i), *cells])
    evaluation.report.table(headers, rows, title="Perplexity and bits per byte by domain")


def routing(evaluation: Evaluation, weights: Sequence[torch.Tensor]) -> None:
    """Who is trusted, overall, by domain and by position, tested against chance.

    weights: (B, L, N) of every batch of the evaluated split.
    """
    model, report = evaluation.checkpoint.model, evaluation.report
    names, domains = model.expert_names, evaluation.domains
    stats, in_order = RoutingStats(names, domains), iter(weights)

    def of_batch(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        chosen = next(in_order)
        stats.update(chosen, batch["domain"], batch["positions"], batch["labels"] != -100)
        return chosen

    collected = document_weights(of_batch, evaluation.batches(), len(domains))
    analysis = analyse_routing(collected, n_resamples=evaluation.settings["resamples"])
    values = {name: float(value) for name, value in stats.compute().items()}
    static = evaluation.results().get("mla_7a", {}).get("weights", {})
    columns = ("mean", "std", "argmax_share")
    rows = [[name, static.get(name, ""), *(values[f"routing/{name}/{c}"] for c in columns)] for name in names]
    report.heading("Routing")
    report.table(
        ["expert", "static weight", "mean", "deviation", "share of tokens where it leads"],
        rows,
        title="Trust in the experts",
    )
    verdict = "depends" if analysis.specialised else "does not demonstrably depend"
    report.text(
        f"Effective experts: {values['routing/effective_experts_mean']:.2f} on average over tokens, "
        f"{values['routing/effective_experts_token']:.2f} at a single token (1 = one expert, {len(names)} = all "
        f"alike). Trust {verdict} on the domain: mutual information {analysis.information.estimate:.4f} nats, "
        f"p = {analysis.test.p_value:.3f} against domain labels permuted over documents."
    )
    report.json({"routing": values, "mutual_information_p": analysis.test.p_value})
    figures = evaluation.figures
    report.figure(
        routing_heatmap(figures / "routing.png", analysis.domain_table, names, domains),
        "Mean weight by domain",
    )
    curve = weight_by_position(
        figures / "positions.png", stats.position_curve().cpu().numpy(), stats.position_bins(), names
    )
    report.figure(curve, "Mean weight by position in the document")


def knock_outs(evaluation: Evaluation, losses: dict[str, DocumentLosses]) -> None:
    """What the model loses without each expert, by domain."""
    names = evaluation.checkpoint.model.expert_names
    without = {name: losses[f"without {name}"] for name in names}
    matrix = knockout_matrix(
        losses["fused"], without, evaluation.domains, n_resamples=evaluation.settings["resamples"]
    )
    columns = ["all", *evaluation.domains]
    rows = [[name, *(f"{matrix[name][column]:+.3f}" for column in columns)] for name in names]
    evaluation.report.heading("Knock-outs")
    evaluation.report.text(
        "Loss added when an expert is left out and the others are scaled up; positive: it helps."
    )
    evaluation.report.table(["without", *columns], rows, title="Knock-out losses (nats per token)")


@torch.no_grad()
def retrieval(evaluation: Evaluation) -> None:
    """What the memory returns: hits a query, attention on them, and their text."""
    memory, model = evaluation.memory, evaluation.checkpoint.model
    if memory is None:
        evaluation.report.heading("Memory").text("This model has no memory (stage 7d adds it).")
        return
    hits, queries, same, mass, null, tokens = 0, 0, 0, 0.0, 0.0, 0
    shown: list[list[Any]] = []
    for batch in evaluation.batches():
        slots = memory.slots(batch)
        if slots.hits is None:
            continue
        found = slots.hits.ids[slots.hits.asked]
        hits, queries = hits + int((found >= 0).sum()), queries + len(found)
        domain = batch["domain"].unsqueeze(1).expand_as(slots.hits.asked)[slots.hits.asked]
        where = memory.store.lookup(found)["domain"]
        same += int(((where == domain.numpy()[:, None]) & (where >= 0)).sum())
        layout = Layout(batch["positions"], batch["segments"])
        assert model.mla is not None  # a model with memory reads it there
        real, empty = model.mla.slot_mass(model.embedding(batch["tokens"]), layout, slots)
        seeing = (slots.index >= 0).unsqueeze(1).expand_as(real)
        mass, null = mass + float(real[seeing].sum()), null + float(empty[seeing].sum())
        tokens += int(seeing.sum())
        shown += _hit_texts(evaluation, memory, batch) if len(shown) < HITS_SHOWN else []
    report = evaluation.report.heading("Memory")
    report.text(
        f"{len(memory.store):,} records. {hits / max(queries, 1):.2f} valid hits a query of {memory.retriever.k} "
        f"asked for, {same / max(hits, 1):.0%} of them from the reader's own domain; attention puts "
        f"{mass / max(tokens, 1):.4f} of its mass on them and {null / max(tokens, 1):.4f} on the null slot."
    )
    report.json({"memory": {"hits_per_query": hits / max(queries, 1), "slot_mass": mass / max(tokens, 1)}})
    report.table(["domain", "asked with", "nearest record"], shown[:HITS_SHOWN], title="Retrieved passages")


def _hit_texts(evaluation: Evaluation, memory: Memory, batch: dict[str, torch.Tensor]) -> list[list[Any]]:
    """Query chunk and text of its best hit, one row a batch."""
    tokenizer, layout = evaluation.tokenizer, Layout(batch["positions"], batch["segments"])
    chunks = complete_chunks(batch["tokens"], layout, memory.retriever.chunk)
    if len(chunks.tokens) == 0:
        return []
    row, column = int(chunks.rows[0]), int(chunks.begin[0])
    reader = Reader(batch["doc_uid"][row, column].view(1), batch["cluster"][row, column].view(1))
    found = memory.retriever.search(chunks.tokens[:1], reader)
    if not bool(found.valid[0, 0]):
        return []
    text = memory.store.lookup(found.ids[0, :1])["tokens"][0]
    domain = evaluation.domains[int(batch["domain"][row])]
    asked = tokenizer.decode(chunks.tokens[0].tolist())
    return [[domain, _short(asked), _short(tokenizer.decode([t for t in text.tolist() if t >= 0]))]]


def training(evaluation: Evaluation) -> None:
    """Validation curves of everything that was trained, and whether any was still falling."""
    results = {kind: value for kind, value in evaluation.results().items() if "history" in value}
    rows, curves, falls = [], {}, {}
    for kind, value in results.items():
        steps, losses = zip(*value["history"], strict=True)
        curves[kind] = (steps, losses)
        falls[kind] = fall_per_epoch(value["history"], value["steps"] / value["epochs"])
        keys = ("steps", "epochs", "tokens", "best_step", "val_loss")
        rows.append([kind, *(value[key] for key in keys), f"{falls[kind]:.1%}", value["peak_memory_gb"]])
    headers = [
        "what",
        "steps",
        "epochs",
        "tokens",
        "selected step",
        "val loss",
        "falls an epoch",
        "peak GB",
    ]
    report = evaluation.report.heading("Training")
    report.table(headers, rows, title="How each part was trained")
    still = [kind for kind, fall in falls.items() if fall > STILL_FALLING]
    if still:
        report.text(
            f"**Not at a plateau**: the validation loss of {', '.join(still)} was still falling by more than 1% "
            "an epoch when training ended. More steps would lower it further."
        )
    for kind, curve in curves.items():
        report.figure(
            loss_curves(
                evaluation.figures / f"val_{kind}.png", {kind: curve}, y_label="validation loss (nats)"
            ),
            f"Validation loss of {kind}",
        )


def fall_per_epoch(history: Sequence[tuple[int, float]], steps_per_epoch: float) -> float:
    """Share of its value by which a validation loss fell an epoch, over the last quarter of the run.

    A quarter, or a whole epoch where that is shorter: two neighbouring validations may lie a few steps apart.
    0.0 where the curve has a single point.
    """
    last_step, last = history[-1]
    back = min(last_step / 4, steps_per_epoch)
    earlier = [(step, loss) for step, loss in history if step <= last_step - back and step < last_step]
    if not earlier:
        return 0.0
    step, loss = earlier[-1]
    return (loss - last) / loss * steps_per_epoch / (last_step - step)


def samples(evaluation: Evaluation) -> None:
    """The same prompts and seeds for the mixture and each expert, and the diffuser's own full-sequence mode."""
    count, length = evaluation.settings["prompts"], evaluation.settings["sample_tokens"]
    if not count:
        return
    batches = evaluation.batches(rows=SAMPLE_ROWS)
    prompts = prompts_of(batches, evaluation.domains, count, evaluation.tokenizer.bos_id)
    models = {evaluation.checkpoint.name: evaluation.checkpoint.model}
    models |= {name: checkpoint.model for name, checkpoint in evaluation.alone.items()}
    config = SamplingConfig(temperature=0.8, top_k=50, seed=evaluation.run.cfg.seed)
    memories, memory = {}, evaluation.memory
    if memory is not None:
        memories[evaluation.checkpoint.name] = lambda: memory.retriever.init_state(1)
    sheet = sample_sheet(models, prompts, evaluation.tokenizer, length, config, memories)
    if "diffuser" in evaluation.alone:
        drafter = evaluation.alone["diffuser"].model
        sheet += diffusion_drafts(drafter, prompts, evaluation.tokenizer, length, config.seed)
    report = evaluation.report.heading("Samples")
    report.text(
        f"Seed {config.seed}, temperature {config.temperature}, top-k {config.top_k}. The full-sequence rows are "
        "denoised all at once from noise; they have no likelihood and are not comparable with the others."
    )
    order = sorted(sheet, key=lambda sample: (sample.domain, sample.prompt))
    rows = [[s.domain, s.model, _short(s.prompt), _short(s.text, 240)] for s in order]
    report.table(Table(["domain", "model", "prompt", "continuation"], rows))
    report.json({"samples": [sample.__dict__ for sample in order]})


def parameters(evaluation: Evaluation) -> None:
    """Every component as built, beside the plan's estimates."""
    counted = count_parameters(evaluation.full[evaluation.checkpoint.name].model)
    evaluation.report.heading("Parameters").table(counted.table())


def _short(text: str, length: int = 120) -> str:
    """One line, cut at `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
