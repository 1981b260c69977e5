"""Where the gain of a mixture comes from: each stage beside its control, and what routing could gain at most."""

from __future__ import annotations

import math
from pathlib import Path

from nano_think.evals import plots
from nano_think.evals.report import Report
from nano_think.evals.study_sections import HEADERS, difference_cells, label, sentence
from nano_think.evals.study_statistics import EXPERTS, Stage, StudyStatistics


def stage_gains(report: Report, stats: StudyStatistics, folder: Path) -> None:
    """What each step of the mixture brought, and the controls that its cause must survive."""
    rows, bars = [], {}
    for stage in stats.stages():
        difference = stats.difference(stage.model, stage.before)
        pair = f"{label(stats, stage.model)} − {label(stats, stage.before)}"
        rows.append([stage.name, stage.cause, pair, *difference_cells(difference)])
        if difference is not None:
            bars[f"{stage.name} {stage.cause.split(':')[0]}"] = difference
    for cause, model, baseline in (
        ("the same parameters with the Transformer alone", "finetuned_transformer", "transformer"),
        ("experts and router beside that", "fused_7c", "finetuned_transformer"),
    ):
        pair = f"{label(stats, model)} − {label(stats, baseline)}"
        rows.append(["control of 7c", cause, pair, *difference_cells(stats.difference(model, baseline))])
    report.table(
        ["stage", "cause", "compared", *HEADERS],
        rows,
        formats=["", "", "", "+.4f", "", ".4f", ""],
        title="What each stage gains, test",
    )
    for stage in stats.stages():
        report.text(_stage_sentence(stats, stage))
        if stage.name == "7c":
            beside = stats.difference("fused_7c", "finetuned_transformer")
            report.text(sentence(beside, "7c", "the same training with the Transformer alone (B5)"))
        if stage.name == "7d":
            report.text(_memory_control(stats))
    _static(report, stats)
    if bars:
        path = plots.interval_bars(folder / "stages.png", bars, y_label="change of loss (nats per token)")
        report.figure(path, "Gain of each stage over the one before it, 95% intervals; below 0 is a gain.")


def _memory_control(stats: StudyStatistics) -> str:
    """Whether a gain of 7d can be due to what is retrieved: only if real records beat shuffled ones and none."""
    seeds = stats.record.seeds
    found = [
        facts.get("evidence", {}).get("memory", {}).get("R1", {}).get("helps") for facts in seeds.values()
    ]
    known = [helps for helps in found if helps is not None]
    if not known:
        return "Whether real records beat shuffled ones was not measured, so no gain of 7d is put down to memory."
    ending = "" if all(known) else ", so a gain of 7d is not put down to what is retrieved"
    beaten = f"under {sum(known)} of {len(known)} seeds"
    return f"On validation real records beat both shuffled ones and none {beaten}{ending}."


def _static(report: Report, stats: StudyStatistics) -> None:
    """The constant weights of 7a, and whether an expert's gap is below its mean KL, so that it can help."""
    seeds = stats.record.seeds
    fitted = {
        seed: facts["static"] for seed, facts in seeds.items() if facts.get("static", {}).get("weights")
    }
    if not fitted:
        return
    first = next(iter(fitted.values()))
    rows = [
        [name, *(fit["weights"].get(name) for fit in fitted.values()), first.get("gap", {}).get(name),
         first.get("mean_kl", {}).get(name)]
        for name in first["weights"]
    ]  # fmt: skip
    report.table(
        ["expert", *(f"weight, seed {seed}" for seed in fitted), "gap to the best expert", "mean KL from it"],
        rows,
        formats=["", *[".3f"] * len(fitted), ".4f", ".4f"],
        title="Constant weights (7a); an expert can help where its gap is below the KL (first seed, nats/token)",
    )


def _stage_sentence(stats: StudyStatistics, stage: Stage) -> str:
    difference = stats.difference(stage.model, stage.before)
    cause = stage.cause.split(":")[0].capitalize()
    if difference is None:
        return f"**{stage.name}.** {cause}: not measured."
    found = {
        "better": f"a gain of {-difference.estimate:.4f} nats a token",
        "worse": f"a loss of {difference.estimate:.4f} nats a token",
        "not distinguishable": "too small to be claimed" if difference.significant else "not told from noise",
    }[difference.verdict]
    return f"**{stage.name}.** {cause}: {found} ({difference:+.4f})."


def router_bounds(report: Report, stats: StudyStatistics, folder: Path) -> None:
    """How much routing could gain at most, by oracles that see the labels, and what it did gain."""
    best = stats.best_expert
    router = stats.difference("fused_7b", "static")
    rows = []
    bounds = {
        "static_per_domain": "constant weights of each domain, fitted on the fusion's text",
        "oracle_domain": "the best expert of each domain, chosen on validation",
        "oracle_document": "the best expert of each document, chosen by these very losses",
        "oracle_token": "the best expert of each token, chosen by these very losses",
    }
    for key, what in bounds.items():
        over_static, over_best = stats.difference(key, "static"), stats.difference(key, best or EXPERTS[0])
        gain = router.estimate if router else math.nan
        regret = stats.difference("fused_7b", key)
        # a share of what cannot be told from nothing is no share
        share = gain / over_static.estimate if over_static and over_static.verdict == "better" else None
        rows.append([label(stats, key), what, over_best, over_static, regret, share])
    report.table(
        ["bound", "it takes", "minus best expert", "minus static weights", "router's regret (7b minus it)",
         "share of it that routing gains"],
        rows,
        formats=["", "", "+.4f", "+.4f", "+.4f", ".0%"],
        title="Bounds of routing, test (nats/token)",
    )  # fmt: skip
    report.text(sentence(router, "The router (7b)", "static weights (7a)"))
    per_domain = stats.difference("static_per_domain", "static")
    if router is None or router.verdict != "better":
        if per_domain is None:
            report.text("The bound of a perfect domain router was not measured.")
        else:
            token = stats.difference("oracle_token", "static")
            most = f"; an oracle of the token, which nobody is, gains {-token.estimate:.4f}" if token else ""
            report.text(
                "How much there was to gain: weights of each domain, fitted on the same split as the one set "
                f"of weights, gain {-per_domain.estimate:+.4f} nats a token over it ({per_domain.verdict}). "
                f"About so much is there for a router that only tells domains apart{most}."
            )
