"""Evidence about the experts: what each is worth, which spaces they share, how they bear long texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nano_think.evals import plots
from nano_think.evals.bootstrap import RESOLUTION, Interval
from nano_think.evals.gates import SIGNIFICANT
from nano_think.evals.report import Report
from nano_think.evals.study_values import Values, as_interval, matrix, number, table


def specialisation(report: Report, value: Values, folder: Path) -> None:
    """Knock-outs, weights, who is best where, and whether weights follow what an expert is worth."""
    experts, domains, classes = value["experts"], value["domains"], value["classes"]
    columns = ["all", *domains]
    out = value["knock_out"]
    report.text(
        f"Over {value['tokens']:,} tokens of {value['documents']:,} documents, in the mixture after 7c: its "
        "experts read what 7c made of table and latent attention. An expert is worth the loss that its "
        "removal adds. Weights follow an expert's worth if the correlation of the two over tokens is above 0."
    )
    report.table(
        table(
            ["expert left out", *columns],
            [[e, *(out[e].get(c) for c in columns)] for e in experts],
            "What each expert is worth: loss without it minus loss with it (nats/token)",
            ["", *["+.4f"] * len(columns)],
        )
    )
    path = plots.heatmap(
        folder / "knock_out.png", matrix(out, experts, columns), experts, columns,
        label="loss added by leaving it out (nats/token)", around_zero=True, digits=3,
    )  # fmt: skip
    report.figure(path, "Loss added by leaving an expert out, by domain; above 0 the expert is worth having.")
    names = ("alone", "knock_out", "alone_within_domain", "knock_out_within_domain")
    texts = ["advantage alone", "worth in the mixture", "alone, within domains", "worth, within domains"]
    correlation = value["correlation"]
    report.table(
        table(
            ["weight of", *texts],
            [[e, *(correlation[e].get(n) for n in names)] for e in experts],
            "Correlation of a token's weight with what the expert gains there",
            ["", *["+.3f"] * 4],
        )
    )
    _weights(report, value, folder)
    errors = matrix(value["error_correlation"], experts, experts)
    path = plots.heatmap(
        folder / "error_correlation.png", errors, experts, experts, label="correlation of losses over tokens"
    )
    report.figure(
        path, "How alike the losses of the experts are inside the mixture: the lower, the more it can gain."
    )
    _classes(report, value, experts, classes)
    gains = {f"best expert of each {name}": i for name, v in value["oracle"].items() if (i := as_interval(v))}
    if gains:
        path = plots.interval_bars(
            folder / "oracle.png", gains, y_label="gain over the best single expert (nats/token)"
        )
        report.figure(path, "What an oracle that picks one expert would gain over the best single expert.")


def _weights(report: Report, value: Values, folder: Path) -> None:
    experts, weights = value["experts"], value["weights"]
    groups = {"all": weights["all"]} | weights["domain"]
    path = plots.heatmap(
        folder / "weights_by_domain.png", matrix(groups, list(groups), experts), list(groups), experts,
        label="mean router weight",
    )  # fmt: skip
    report.figure(path, "Mean router weight by domain.")
    by_class = weights["class"]
    path = plots.heatmap(
        folder / "weights_by_class.png", matrix(by_class, list(by_class), experts), list(by_class), experts,
        label="mean router weight",
    )  # fmt: skip
    report.figure(path, "Mean router weight by kind of token.")
    if position := weights.get("position"):
        places = [str(p["from"]) if p["from"] == p["to"] else f"{p['from']}–{p['to']}" for p in position]
        x = np.arange(len(position))
        curves = {e: (x, [number(p["weights"].get(e)) for p in position]) for e in experts}
        path = plots.line_chart(
            folder / "weights_by_position.png", curves, ticks=places,
            x_label="position in the document (tokens)", y_label="mean router weight",
        )  # fmt: skip
        report.figure(path, "Mean router weight by position.")


def _classes(report: Report, value: Values, experts: list[str], classes: list[str]) -> None:
    by_class, best = value["by_class"], value["best"]
    report.table(
        table(
            ["tokens that are", "share", "mixture", *experts, "oracle gain"],
            [
                [c, by_class[c]["share"], by_class[c]["fused"], *(by_class[c]["loss"].get(e) for e in experts),
                 by_class[c].get("oracle_gain")]
                for c in classes if c in by_class
            ],
            "Loss by kind of token (nats/token)",
            ["", ".1%", ".4f", *[".4f"] * len(experts), ".4f"],
        )
    )  # fmt: skip
    groups = {"all": best["all"]} | best["domain"] | best["class"]
    report.table(
        table(
            ["tokens of", *experts],
            [[name, *(shares.get(e) for e in experts)] for name, shares in groups.items()],
            "How often each expert has the lowest loss on a token",
            ["", *[".1%"] * len(experts)],
        )
    )


def routing(report: Report, value: Values, folder: Path) -> None:
    """Whether the weights of 7b, where only the router has learned, depend on the domain beyond chance."""
    interval, p_value = as_interval(value.get("interval")), number(value.get("p_value"))
    depends = "depends" if p_value < SIGNIFICANT else "does not measurably depend"
    information = "–" if interval is None else f"{interval:.4f} nats"
    report.text(
        f"Which expert the router (7b) trusts {depends} on the domain: I(domain; expert) is {information}, p "
        f"= {p_value:.3g} against labels permuted over documents. Such an information is biased upwards, so "
        "p decides."
    )


def calibration(report: Report, value: Values, folder: Path) -> None:
    """Expected calibration errors, and how the experts' losses go together token by token."""
    chance = value.get("ece_by_chance", {})
    rows = [[name, error, chance.get(name)] for name, error in value.get("ece", {}).items()]
    title = "Expected calibration error (share of probability)"
    headers = ["model", "ECE", "of a model that is right as often as it says"]
    report.table(table(headers, rows, title, ["", ".4f", ".4f"]))
    if errors := value.get("error_correlation"):
        names = errors["names"]
        path = plots.heatmap(
            folder / "token_losses.png", [[number(v) for v in row] for row in errors["matrix"]], names, names,
            label="correlation of losses over tokens",
        )  # fmt: skip
        tokens = f"{errors['count']:,} tokens"
        report.figure(
            path, f"How alike the losses of the experts are, each alone as pre-trained, over {tokens}."
        )


def spaces(report: Report, value: Values, folder: Path) -> None:
    """Whether the experts' outputs live in one space: similarity, linear probes, with and without adaptors."""
    names = value["spaces"]
    report.text(
        f"Over {value['tokens']:,} tokens of {value['documents']:,} documents. CKA ({value['cka_variant']}) "
        "does not change when a space is rotated, the cosine does: a high CKA beside a low cosine means the "
        "same information in other coordinates. Linear probes are fitted on half of the documents and tested "
        "on the others."
    )
    if "with_adaptors" in value:
        report.text(
            "The adaptor is a square matrix at the entry of each expert, which it learns in pre-training. Without "
            "adaptors means the same experts with theirs left out, for which they were never trained: how much "
            "they lose says how much they rely on it."
        )
    if distance := value["adaptor_distance"]:
        headers = ["expert", "distance of its entry adaptor from the identity"]
        report.table(table(headers, list(distance.items()), "Adaptors"))
    for key, text in (("with_adaptors", "with adaptors"), ("without_adaptors", "without adaptors")):
        part = value.get(key)
        if not part:
            continue
        path = plots.heatmap(
            folder / f"cka_{key}.png", matrix(part["cka"], names, names), names, names, label="CKA"
        )
        report.figure(path, f"CKA of the spaces, {text}.")
        for measure, title in (("cka", "CKA"), ("cka_shuffled", "CKA by chance"), ("cosine", "Mean cosine")):
            report.table(
                table(
                    ["space", *names],
                    [[a, *(part[measure].get(a, {}).get(b) for b in names)] for a in names],
                    f"{title}, {text}",
                    ["", *[".3f"] * len(names)],
                )
            )
        report.table(
            table(
                ["from", *names],
                [[a, *(part["r2"].get(a, {}).get(b) for b in names)] for a in names if a in part["r2"]],
                f"Variance of one space that a linear map from another explains (R²), {text}",
                ["", *[".3f"] * len(names)],
            )
        )
        rows = [[a, part["class_accuracy"].get(a), part["domain_accuracy"].get(a)] for a in names]
        rows.append(["most frequent answer", part["class_majority"], part["domain_majority"]])
        title = f"Accuracy of linear probes, {text}"
        report.table(table(["space", "kind of token", "domain"], rows, title, ["", ".3f", ".3f"]))
        title = f"Loss of each expert alone, {text}"
        report.table(table(["expert", "nats a token"], list(part["loss"].items()), title, ["", ".4f"]))


def lengths(report: Report, value: Values, folder: Path) -> None:
    """Loss and speed at lengths beyond the one trained at."""
    models, train = value["models"], value["train_length"]
    report.text(
        f"Trained at {train} tokens; {value['tokens']:,} tokens of {value['documents']:,} documents. "
        f"{value['method']}"
    )
    losses, speeds, rows, cuts = {}, {}, [], []
    for name, entries in models.items():
        places = [entry["length"] for entry in entries]
        losses[name] = (places, [number(entry["loss"]["estimate"]) for entry in entries])
        speeds[name] = (places, [number(entry["tokens_per_second"]) for entry in entries])
        rows += [
            [name, e["length"], e["loss"], e["seconds_per_token"], e["tokens_per_second"]] for e in entries
        ]
        cuts += [
            [name, entry["length"], f"{b['from']}–{b['to']}", b["tokens"], b["loss"], b["minus_cut"]]
            for entry in entries
            for b in entry["buckets"]
            if entry is entries[-1]
        ]
    for key, curves, y_label in (
        ("loss", losses, "loss (nats per token)"),
        ("speed", speeds, "tokens per second"),
    ):
        path = plots.line_chart(
            folder / f"length_{key}.png", curves, x_label="length (tokens)", y_label=y_label, x_scale="log"
        )
        report.figure(path, f"{y_label.capitalize()} by length; trained at {train} tokens.")
    headers = ["model", "length", "loss (nats/token)", "seconds a token", "tokens a second"]
    report.table(table(headers, rows, "Loss and speed by length", ["", ",", ".4f", ".3g", ",.0f"]))
    cut = "minus the same text cut to the trained length"
    headers = ["model", "length", "positions", "tokens", "loss (nats/token)", cut]
    title = "Does more context help? The longest length by position"
    report.table(table(headers, cuts, title, ["", ",", "", ",", ".4f", "+.4f"]))
    bars = {
        f"{name} {entries[-1]['length']}": Interval(i.estimate, i.low, i.high, i.documents)
        for name, entries in models.items()
        if entries[-1]["buckets"] and (i := as_interval(entries[-1]["buckets"][-1]["minus_cut"])) is not None
    }
    if bars:
        path = plots.intervals(
            folder / "length_cut.png",
            bars,
            x_label="last positions: long minus cut text (nats/token)",
            least=RESOLUTION,
        )
        report.figure(path, "Loss of the last positions with long context minus with the trained length.")
