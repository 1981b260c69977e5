"""Evidence about the diffuser (steps, restoration, drafts, gaps) and about the memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nano_think.evals import plots
from nano_think.evals.bootstrap import RESOLUTION, Interval
from nano_think.evals.report import Report
from nano_think.evals.study_sections import COLOURS
from nano_think.evals.study_values import Values, as_interval, generic, number, table

DIFFERENCE = "difference of loss (nats per token)"
# What the values of R2 to R4 and of the costs are.
MEMORY_WORDS = {
    "k": "records a question",
    "queries": "questions",
    "precision": "share of the records that are of the questioner's domain",
    "base_rate": "the same by chance",
    "lift": "times as often as by chance",
    "mrr@10": "mean reciprocal rank among the first ten",
    "recall@1": "found at the first rank",
    "recall@10": "found among the first ten",
    "chance_mrr": "reciprocal rank by chance",
    "same_domain_chance_mrr": "the same where the domain is known",
    "slots": "share of the attention that goes to records",
    "null": "share that goes to the empty slot",
    "tokens": "tokens that see a record",
    "records": "records in the memory",
    "chunk": "tokens a record and a question",
    "ms_per_token": "milliseconds a token",
    "flops_per_token": "FLOPs a token",
    "equal_compute": "by compute",
    "search": "of the search",
    "loss_off": "loss without memory (nats/token)",
    "loss_on": "loss with memory (nats/token)",
    "flops_off": "FLOPs a token without",
    "flops_on": "FLOPs a token with",
    "nats_per_gflop": "nats gained by a GFLOP more",
    "off": "memory off",
    "on": "memory on",
    "model": "of the model",
    "share": "share of the memory in all",
    "domains": "domain",
    "heads": "by head",
}
# What is not the same in all of them.
OWN_WORDS = {
    "R2": {"interval": "share beyond chance, with its interval over documents"},
    "R3": {"interval": "mean reciprocal rank, with its interval over documents"},
    "cost": {"slots": "of reading records"},
}


def denoiser(report: Report, value: Values, folder: Path) -> None:
    """What the diffuser's denoising is good for: steps, restoration, drafts, gaps."""
    drawn = {
        "steps_curve": ("What are more steps worth?", _steps),
        "restoration": ("Does it denoise?", _restoration),
        "block_drafts": ("Can it draft for the Transformer?", _drafts),
        "infilling": ("Can it fill gaps?", _infilling),
    }
    for name, part in value.items():
        if name in drawn:
            title, draw = drawn[name]
            report.heading(title, 3)
            if set(part) == {"reason"}:
                report.text(str(part["reason"]))
            else:
                draw(report, part, folder)
        else:
            generic(report, part, name.replace("_", " "))


def _steps(report: Report, value: Values, folder: Path) -> None:
    """Loss and time by the number of denoising steps, beside the Transformer that was its teacher."""
    curve = value["curve"]
    counts = [entry["steps"] for entry in curve]
    path = steps_chart(folder / "denoising_loss.png", {"diffuser": value})
    report.figure(path, "Loss by number of denoising steps.")
    path = plots.line_chart(
        folder / "denoising_time.png",
        {"noisy passes": (counts, [number(entry["seconds_per_token"]) for entry in curve])},
        x_label="denoising steps K",
        y_label="seconds a token",
        x_scale="log",
    )
    report.figure(path, "Time by number of denoising steps.")
    names = ("steps", "network_passes", "loss", "minus_one_step", "gap", "kl", "helps", "seconds_per_token",
             "decode_seconds_per_token")  # fmt: skip
    headers = ["steps", "passes", "loss (nats/token)", "minus one step", "minus teacher", "KL(teacher, it)",
               "gap below KL", "seconds a token", "decoding, seconds a token"]  # fmt: skip
    rows = [[entry.get(name) for name in names] for entry in curve]
    title = f"Denoising steps, {value['tokens']:,} tokens of {value['documents']:,} documents"
    formats = ["", "", ".4f", "+.4f", "+.4f", ".4f", "", ".3g", ".3g"]
    report.table(table(headers, rows, title, formats))
    report.text(
        f"Teacher {_loss(value.get('teacher_loss'))} nats a token; steps inside the mixture: "
        f"{value.get('fused_steps')}. A gap below the KL is the diffuser's chance in a pool."
    )


def steps_chart(path: Path, values: Mapping[str, Values]) -> Path:
    """Loss by the number of denoising steps, a curve a diffuser, and that of the first one's teacher."""
    curves = {
        name: ([e["steps"] for e in value["curve"]], [number(e["loss"]["estimate"]) for e in value["curve"]])
        for name, value in values.items()
    }
    first = next(iter(values.values()))
    if (teacher := as_interval(first.get("teacher_loss"))) is not None:
        counts = [entry["steps"] for entry in first["curve"]]
        curves["Transformer (its teacher)"] = (counts, [teacher.estimate] * len(counts))
    return plots.line_chart(
        path, curves, x_label="denoising steps K", y_label="loss (nats per token)", x_scale="log"
    )


def _loss(value: object) -> str:
    """A loss with its interval, or a dash."""
    interval = as_interval(value)
    return "–" if interval is None else f"{interval:.4f}"


def _restoration(report: Report, value: Values, folder: Path) -> None:
    """How well one pass restores latents of each noise level, beside what needs no network."""
    levels = value["levels"]
    places = [f"{entry['tau']} ({entry['signal_power']:.2f})" for entry in levels]
    for measure, y_label in (
        ("error", "squared error, share of predicting the mean"),
        ("agreement", "share of tokens restored"),
    ):
        names = list(levels[0][measure])
        x = np.arange(len(levels))
        curves = {n.replace("_", " "): (x, [number(e[measure].get(n)) for e in levels]) for n in names}
        path = plots.line_chart(
            folder / f"restoration_{measure}.png", curves, ticks=places,
            x_label="noise level (signal power left)", y_label=y_label,
        )  # fmt: skip
        report.figure(path, f"Restoring noised latents in one pass: {y_label}.")
        rows = [
            [entry["tau"], entry["signal_power"], *(entry[measure].get(n) for n in names)] for entry in levels
        ]
        report.table(
            table(
                ["noise level", "signal power", *(n.replace("_", " ") for n in names)],
                rows,
                f"Restoration: {y_label}",
                ["", ".3f", *[".3f"] * len(names)],
            )
        )


def _drafts(report: Report, value: Values, folder: Path) -> None:
    """How many tokens of a drafted block the Transformer would accept, by drafter."""
    drafters = value["drafters"]
    x = np.arange(value["block"])
    for measure, y_label in (
        ("truth", "share equal to the text"),
        ("agreement", "share equal to the Transformer's choice"),
    ):
        curves = {name: (x, [number(v) for v in entry[measure]]) for name, entry in drafters.items()}
        path = plots.line_chart(
            folder / f"drafts_{measure}.png",
            curves,
            ticks=[str(place + 1) for place in x],
            x_label="token of the block",
            y_label=y_label,
        )
        report.figure(path, f"Drafted blocks: {y_label}.")
    rows = [
        [name, entry.get("network_passes"), entry.get("accepted"), entry.get("seconds_per_block")]
        for name, entry in drafters.items()
    ]
    title = f"Drafts of {value['block']} tokens for {value['prompts']:,} prompts"
    headers = ["drafter", "network passes", "tokens accepted a block", "seconds a block"]
    report.table(table(headers, rows, title, ["", "", ".3f", ".3g"]))


def _infilling(report: Report, value: Values, folder: Path) -> None:
    """Gaps filled from the left alone and from both sides."""
    accuracy = {name: i for name, v in value["accuracy"].items() if (i := as_interval(v))}
    path = plots.interval_bars(folder / "infilling.png", accuracy, y_label="share of gap tokens right")
    report.figure(path, f"Filling gaps of {value['span']} tokens.")
    title = f"Filling {value['prompts']:,} gaps of {value['span']} tokens"
    report.table(table(["with", "share right"], list(accuracy.items()), title, ["", ".3f"]))
    report.text(str(value.get("reason", "")))


def memory(report: Report, value: Values, folder: Path) -> None:
    """Does memory help, and because of what it retrieves?"""
    drawn = {"R1": _memory_losses, "R5": _overlap, "planted": _planted}
    titles = {
        "R2": "Are retrieved records of the reader's own domain more often than by chance?",
        "R3": "Does the first half of a document find its second half?",
        "R4": "Attention that goes to the memory",
        "cost": "What the memory costs",
    }
    report.text(
        "A record is the vector of a piece of the experts' text. At every chunk the mixture asks for those "
        "nearest to what it has read so far, and its latent attention may read them."
    )
    for name, part in value.items():
        if name in drawn:
            drawn[name](report, part, folder)
        else:
            generic(report, part, titles.get(name, name), MEMORY_WORDS | OWN_WORDS.get(name, {}))


def _memory_losses(report: Report, value: Values, folder: Path) -> None:
    report.text(
        "Memory helps only if real records are better than none and than shuffled ones, which fill the same "
        f"slots with what others found: here they {'are' if value['helps'] else 'are not'}. "
        f"{value['seeing']:.1%} of the tokens see a record."
    )
    modes = [[name, entry["loss"], entry["tokens"]] for name, entry in value["modes"].items()]
    report.table(
        table(
            ["memory", "loss (nats/token)", "tokens"],
            modes,
            "Loss by what the memory shows",
            ["", ".4f", ","],
        )
    )
    _difference_table(report, value, "Memory: paired differences (nats/token)")
    found = {name: i for name, v in value["differences"].items() if (i := as_interval(v))}
    path = plots.intervals(folder / "memory.png", found, x_label=DIFFERENCE, least=RESOLUTION)
    report.figure(path, f"Loss with real records against none, shuffled and random ones: {COLOURS}")
    if domains := value.get("domains"):
        names = list(next(iter(domains.values())))
        rows = [[domain, *(entry.get(n) for n in names)] for domain, entry in domains.items()]
        report.table(table(["domain", *names], rows, "Memory by domain (nats/token)"))


def _difference_table(report: Report, value: Values, title: str) -> None:
    rows = [
        [name, as_interval(entry), entry.get("verdict"), entry.get("documents")]
        for name, entry in value["differences"].items()
    ]
    report.table(
        table(["compared", "difference", "verdict", "documents"], rows, title, ["", "+.4f", "", ","])
    )


def _overlap(report: Report, value: Values, folder: Path) -> None:
    buckets, name = value["buckets"], "real - shuffled"
    shares = [f"{b['low']:g} to {b['high']:g}" if b["high"] else "0" for b in buckets]
    rows = [
        [share, b["tokens"], b["documents"], b["differences"].get("real - none"), b["differences"].get(name)]
        for share, b in zip(shares, buckets, strict=True)
    ]
    headers = ["share of the chunk that is copied", "tokens", "documents", "real - none", name]
    title = "Gain by how much of the text its records repeat (nats/token)"
    report.table(table(headers, rows, title, ["", ",", ",", "", ""]))
    found: dict[str, Interval] = {
        share: i
        for share, b in zip(shares, buckets, strict=True)
        if (i := as_interval(b["differences"].get(name)))
    }
    if found:
        path = plots.intervals(
            folder / "memory_overlap.png",
            found,
            y_label="share copied",
            x_label="real minus shuffled records (nats per token)",
            least=RESOLUTION,
        )
        report.figure(path, "Gain of real over shuffled records, by how much of the text they repeat.")
    report.text(
        {
            None: "Real records measurably beat shuffled ones nowhere, so there is no gain to explain.",
            True: "Real records measurably beat shuffled ones only where there is text to copy.",
            False: "Real records measurably beat shuffled ones also where there is nothing to copy.",
        }[value["copying"]]
    )


def _planted(report: Report, value: Values, folder: Path) -> None:
    """Are invented facts recalled from an earlier session?"""
    recalls = "recalls" if value["recalls"] else "does not recall"
    report.text(
        f"{value['facts']:,} invented facts were put into the memory; the mixture {recalls} them. The fact's "
        f"record is among the hits for {value['retrieved']:.1%} of them."
    )
    modes = [[name, entry["loss"], entry["accuracy"]] for name, entry in value["modes"].items()]
    headers = ["memory", "loss of the fact (nats/token)", "accuracy"]
    report.table(table(headers, modes, "Planted facts", ["", ".4f", ".3f"]))
    _difference_table(report, value, "Planted facts: paired differences (nats/token)")
    found = {name: i for name, v in value["differences"].items() if (i := as_interval(v))}
    path = plots.intervals(folder / "planted.png", found, x_label=DIFFERENCE, least=RESOLUTION)
    report.figure(path, "Loss of planted facts with their own record against none, shuffled and random ones.")
