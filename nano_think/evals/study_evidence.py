"""Every topic of a study's evidence as a section: figures for the topics we know, tables for all others."""

from __future__ import annotations

from pathlib import Path

from nano_think.evals.report import Report
from nano_think.evals.study_experts import calibration, lengths, routing, spaces, specialisation
from nano_think.evals.study_parts import denoiser, memory
from nano_think.evals.study_record import StudyRecord
from nano_think.evals.study_values import Values, as_interval, generic, over_seeds

TITLES = {
    "specialisation": "Do the experts specialise?",
    "routing": "Does the router's trust depend on the domain?",
    "calibration": "Do the models know what they know?",
    "spaces": "Do the experts share a space?",
    "denoiser": "What is denoising good for?",
    "lengths": "Longer texts than in training",
    "memory": "Does memory help, and why?",
}


def evidence(report: Report, record: StudyRecord, folder: Path) -> None:
    """A section a topic, those of TITLES first: details of the first seed, main figures of all."""
    found: dict[str, dict[int, Values]] = {}
    for seed, facts in record.seeds.items():
        for topic, value in facts.get("evidence", {}).items():
            found.setdefault(topic, {})[seed] = value
    drawn = {
        "specialisation": specialisation,
        "routing": routing,
        "calibration": calibration,
        "spaces": spaces,
        "denoiser": denoiser,
        "lengths": lengths,
        "memory": memory,
    }
    for topic in sorted(found, key=lambda name: list(TITLES).index(name) if name in TITLES else len(TITLES)):
        by_seed = found[topic]
        seed, value = next(iter(by_seed.items()))
        report.heading(TITLES.get(topic, topic.replace("_", " ").capitalize()))
        shown = f"; tables and figures show seed {seed}" if len(by_seed) > 1 else ""
        report.text(f"Measured on validation text, seed {', '.join(map(str, by_seed))}{shown}.")
        if topic in drawn and "reason" not in value:
            drawn[topic](report, value, folder)
        else:  # a topic of its own, or the reason why there is nothing to show
            generic(report, value, topic.replace("_", " "))
        over_seeds(report, by_seed, _main(topic, value), "The main figures of every seed")


def _main(topic: str, value: Values) -> dict[str, str]:
    """text -> path of the figures that every seed is asked for."""
    if topic == "specialisation":
        worth = {f"worth of {e} (nats/token)": f"knock_out/{e}/all" for e in value["experts"]}
        follow = {
            f"weight and worth of {e}, correlation": f"correlation/{e}/knock_out" for e in value["experts"]
        }
        return worth | follow | {f"oracle gain by {n}": f"oracle/{n}" for n in value["oracle"]}
    if topic == "calibration":
        return {}
    if topic == "spaces" and "spaces" in value:
        return {f"adaptor of {e}": f"adaptor_distance/{e}" for e in value["adaptor_distance"]}
    if topic == "denoiser":
        return _main_denoiser(value)
    if topic == "lengths" and "models" in value:
        return {
            f"{name}, {entry['length']} tokens": f"models/{name}/{i}/loss"
            for name, entries in value["models"].items()
            for i, entry in enumerate(entries)
        }
    if topic == "memory":
        return {
            "real minus none": "R1/differences/real - none",
            "real minus shuffled": "R1/differences/real - shuffled",
            "memory helps": "R1/helps",
            "precision minus base rate": "R2/interval",
            "reciprocal rank of the second half": "R3/interval",
            "planted facts recalled": "planted/recalls",
        }
    return {
        name: name for name in value if not isinstance(value[name], list | dict) or as_interval(value[name])
    }


def _main_denoiser(value: Values) -> dict[str, str]:
    paths = {}
    for i, entry in enumerate(value.get("steps_curve", {}).get("curve", [])):
        paths[f"loss, K = {entry['steps']}"] = f"steps_curve/curve/{i}/loss"
    for i, entry in enumerate(value.get("restoration", {}).get("levels", [])):
        paths[f"error of one pass, noise level {entry['tau']}"] = f"restoration/levels/{i}/error/network"
    for name in value.get("block_drafts", {}).get("drafters", {}):
        paths[f"tokens accepted, {name}"] = f"block_drafts/drafters/{name}/accepted"
    for name in value.get("infilling", {}).get("accuracy", {}):
        paths[f"gap filled, {name}"] = f"infilling/accuracy/{name}"
    return paths
