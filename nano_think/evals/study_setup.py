"""How a study was made: question, data, models, what would change our mind, provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nano_think.evals.bootstrap import RESOLUTION
from nano_think.evals.report import Report
from nano_think.evals.seeds import SeedDifference
from nano_think.evals.study_record import MODELS, StudyRecord
from nano_think.evals.study_sections import headline, label
from nano_think.evals.study_statistics import RIVALS, StudyStatistics, word

# What a reader has to know of data and settings; names are those of study.json.
MEANINGS = {
    "source": "where the text comes from",
    "corpus_hash": "of all text and its splits",
    "tokenizer_hash": "of the tokenizer",
    "domains": "kinds of text; every one is measured by itself too",
    "train_tokens": "tokens that an expert may read",
    "expert_tokens": "tokens that an expert may read",
    "fusion_tokens": "tokens beside them that the mixture's stages may read; a single Transformer may read both",
    "test_tokens": "tokens of test text that every model is judged on",
    "test_documents": "documents that they belong to",
    "seeds": "each is a pipeline of its own: initial weights, order of the text, dropout",
    "optimizer": "of every fit",
    "tuning.factors": "learning rates tried in pre-training, as factors of the default",
    "tuning.fusion_factors": "the same for stage 7c and its control",
    "tuning.share": "share of the steps after which a learning rate is judged",
    "tuning.dropouts": "tried after that, in whole runs",
    "tuning.horizons": "shares of its FLOPs that the Transformer of equal training FLOPs is planned for",
    "rows": "rows of size.seq_len tokens that are measured of each domain",
    "evidence_tokens": "tokens of validation text that the costlier evidence reads",
    "pool": "Transformers of different seeds that are averaged (B9)",
    "size.name": "of this set of dimensions",
    "size.d_model": "numbers in a hidden state",
    "size.vocab_size": "tokens that the tokenizer knows",
    "size.seq_len": "tokens of a row in training",
    "size.chunk": "tokens that share one question to the memory",
}
WORDS = {
    "expert": "a language model that was trained alone and then frozen. There are three kinds: a Transformer; a "
    "diffuser, which denoises the hidden state that the Transformer would have; a state-space model. All read "
    "and speak through one embedding table",
    "mixture": "the experts behind a router, which gives each a weight at every token, from the text so far",
    "7a, 7b, 7c, 7d": "its stages: constant weights; a trained router; also the table and a latent attention over "
    "the text that the experts read; also a memory, vectors of text that are looked up",
    "B0 to B10": "the baselines",
    "loss": "nats a token: minus the mean logarithm of the probability of the right token. Lower is better",
    "bits a byte": "the same in bits, by bytes of text, so that the tokenizer does not matter",
    "difference": "the first loss minus the second, on the same documents: below 0 the first is better",
    "oracle": "a choice that sees the right answers: a bound, no model",
    "ECE": "expected calibration error: how far the probability of the likeliest token lies from how often it is "
    "right",
    "KL": "mean divergence of two models' predictions, nats a token: 0 where they say the same",
}


def settings_rows(facts: Mapping[str, Any], prefix: str = "") -> Iterator[list[str]]:
    """Nested settings as rows of dotted name and value."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from settings_rows(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            yield [f"{prefix}{key}", f"{text:,}" if isinstance(text, int) else str(text)]


def question(report: Report, stats: StudyStatistics) -> None:
    """The question, what is missing from the answer, and a failed audit, with which there is none."""
    facts = stats.record.facts
    report.heading("Question").text(str(facts.get("question", "No question was recorded.")))
    if missing := stats.record.missing():
        report.text("**This study is not whole.** Missing:\n\n" + "\n".join(f"- {line}" for line in missing))
    if changed := stats.record.changed:
        report.text(f"**Changed since SHA256SUMS was written:** {', '.join(changed)}.")
    audits = {seed: found for seed, made in stats.record.seeds.items() if (found := made.get("audit"))}
    for seed, found in audits.items():
        if not found["passed"]:
            report.text(f"**Seed {seed}: {found['mark']}.**")


def setup(report: Report, stats: StudyStatistics) -> None:
    """Data, settings and models, and how figures are made."""
    record = stats.record
    report.heading("Set-up")
    report.text("\n".join(f"- **{word}**: {meaning}." for word, meaning in WORDS.items()))
    for title, name in (("Data", "data"), ("Settings", "settings")):
        rows = [[*row, MEANINGS.get(row[0], "")] for row in settings_rows(record.facts.get(name, {}))]
        report.table(
            [title.lower().removesuffix("s"), "value", "meaning"], rows, align=["l"] * 3, title=title
        )
    models = [
        [label(stats, key), MODELS[key], facts.get("description"), facts.get("trained_parameters")]
        for key, facts in record.models.items()
    ]
    headers = ["model", "is", "what it is", "parameters trained"]
    report.table(headers, models, formats=["", "", "", ","], title="Models")
    report.text(_method(stats))


def _method(stats: StudyStatistics) -> str:
    """How figures are made, and when a difference is claimed."""
    fused, best = (label(stats, key) if key else "none" for key in (stats.fused, stats.best_expert))
    over_seeds = (
        "They also cover the choice of seeds (Student's t over the seeds). A difference is called better or "
        f"worse only where its interval leaves out 0 and it is at least {RESOLUTION:g} and twice the "
        "deviation of the baseline over its seeds."
        if len(stats.record.seeds) > 1
        else "They know nothing of other seeds. A difference is called better or worse only where its interval "
        f"leaves out 0 and it is at least {RESOLUTION:g}."
    )
    return (
        f"The mixture that is compared ({fused}) and the best expert ({best}) are those of the lowest loss "
        "on validation. A loss is nats a token, the mean over seeds. Intervals (95% each, however many there "
        f"are) cover the choice of documents: bootstrap over documents, never tokens, {stats.n_resamples:,} "
        f"resamples, both models of a comparison on the same ones. {over_seeds} Bounds (oracles that see the "
        "labels, choices that know the domain) are no models, and nothing is claimed against them."
    )


def change_our_mind(report: Report, stats: StudyStatistics) -> None:
    """For each headline verdict the figure that would turn it."""
    fused = stats.fused
    lines = []
    pairs = dict(headline(stats))
    if fused is not None:
        pairs |= {f"mixture minus {label(stats, key)}": stats.difference(fused, key) for key in RIVALS}
    pairs["router (7b) minus static weights (7a)"] = stats.difference("fused_7b", "static")
    for text, difference in pairs.items():
        if difference is None:
            lines.append(f"{text}: any measurement, as there is none.")
            continue
        lines.append(f"{text} ({word(difference)}): {_turn(difference)}.")
    lines.append(
        "Size: everything here holds for the number of parameters and tokens of the set-up. A different "
        "order at a larger size would change what we recommend, not these figures."
    )
    lines += [str(line) for line in stats.record.facts.get("change_our_mind", [])]
    report.heading("What would change our mind").text("\n".join(f"- {line}" for line in lines))


def _turn(difference: SeedDifference) -> str:
    """The figures that would turn a verdict."""
    low, high, least = f"{difference.low:+.4f}", f"{difference.high:+.4f}", f"{difference.least:.4f}"
    if difference.verdict == "better":
        moved = f"moved the upper end above 0 (it is {high}) or the gain below {least}"
        return f"we would give the claim up if more seeds or other text {moved}"
    if difference.verdict == "worse":
        more = f"{difference.estimate + difference.least:.4f}"
        fell = f"the upper end, now {high}, fell below 0 and the loss by {more} nats or more"
        return f"we would claim a gain if {fell}"
    if difference.significant:
        return f"we would decide if the difference, now {difference.estimate:+.4f}, grew to {least} or more"
    moved = f"moved one end of [{low}, {high}] over 0 and the difference were at least {least}"
    return f"we would decide if more seeds or documents {moved}"


def provenance(report: Report, stats: StudyStatistics) -> None:
    """Commands, commit and machine that wrote the record, reads of the test split and hashes of all inputs."""
    record, facts = stats.record, stats.record.facts
    report.heading("How to repeat it")
    commands = "\n".join(map(str, facts.get("commands", []))) or "no commands were recorded"
    report.text(f"```\n{commands}\n```")
    rows: list[list[Any]] = [
        ["leak audit", _audits(record)],
        ["reads of the test split", str(facts.get("test_reads", "not recorded"))],
        ["hash of all inputs", f"`{record.digest()}`"],
        *settings_rows(facts.get("versions", {})),
    ]
    for seed, made in record.seeds.items():
        if where := made.get("measured_with"):
            rows.append([f"seed {seed}", f"commit {where['commit']}, {where['machine']}"])
    report.table(["what", "value"], rows, align=["l", "l"], title="What this report comes from")
    findings = [found for made in record.seeds.values() if (found := made.get("audit", {}).get("findings"))]
    if findings:
        rows = [[one["check"], one["title"], one["verdict"]] for one in findings[0]]
        title = "Leak audit: does anything that the mixture says depend on later tokens?"
        report.table(["check", "what must hold", "verdict"], rows, align=["l"] * 3, title=title)
    commands_of = {
        label(stats, key): fit["command"]
        for seed in record.seeds.values()
        for key, fit in seed.get("fits", {}).items()
        if fit.get("command")
    }
    if commands_of:
        rows = [[name, f"`{command}`"] for name, command in commands_of.items()]
        report.table(["fit", "command"], rows, title="The command of each fit, last seed")
    hashes = [[name, f"`{value}`"] for name, value in sorted(record.hashes.items())]
    report.table(["input", "SHA-256"], hashes, align=["l", "l"], title="Inputs of this report")


def _audits(record: StudyRecord) -> str:
    """What the leak audit of each seed's mixture said, seeds that agree together."""
    said: dict[str, list[str]] = {}
    for seed, made in record.seeds.items():
        said.setdefault(made.get("audit", {}).get("mark", "not recorded"), []).append(str(seed))
    if len(said) < 2:
        return "".join(said) or "not recorded"
    return "; ".join(f"seed {', '.join(seeds)}: {mark}" for mark, seeds in said.items())
