"""Every topic of a study's evidence as a section: figures for the topics we know, tables for all others."""

from __future__ import annotations

from pathlib import Path

from nano_think.evals.report import Report
from nano_think.evals.study_experts import lengths, spaces, specialisation
from nano_think.evals.study_parts import drafts, infilling, memory, planted, restoration, steps
from nano_think.evals.study_record import StudyRecord
from nano_think.evals.study_values import Values, as_interval, generic, over_seeds

TITLES = {
    "specialisation": "Do the experts specialise?",
    "spaces": "Do the experts share a space?",
    "steps": "What are denoising steps worth?",
    "restoration": "Does the denoiser denoise?",
    "drafts": "Can the diffuser draft for the Transformer?",
    "infilling": "Can the diffuser fill gaps?",
    "lengths": "Longer texts than in training",
    "memory": "Does memory help, and why?",
    "planted": "Are planted facts recalled?",
}


def evidence(report: Report, record: StudyRecord, folder: Path) -> None:
    """One section a topic, in the order of TITLES, then any other; details of the first seed, main "
    "figures of all."""
    found: dict[str, dict[int, Values]] = {}
    for seed, facts in record.seeds.items():
        for topic, value in facts.get("evidence", {}).items():
            found.setdefault(topic, {})[seed] = value
    drawn = {
        "specialisation": specialisation,
        "spaces": spaces,
        "steps": steps,
        "restoration": restoration,
        "drafts": drafts,
        "infilling": infilling,
        "lengths": lengths,
        "memory": memory,
        "planted": planted,
    }
    for topic in sorted(found, key=lambda name: list(TITLES).index(name) if name in TITLES else len(TITLES)):
        by_seed = found[topic]
        seed, value = next(iter(by_seed.items()))
        report.heading(TITLES.get(topic, topic.replace("_", " ").capitalize()))
        report.text(
            f"Measured under seed {', '.join(map(str, by_seed))}; tables and figures show seed {seed}."
        )
        if topic in drawn:
            drawn[topic](report, value, folder)
        else:
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
    if topic == "spaces":
        return {f"adaptor of {e}": f"adaptor_distance/{e}" for e in value["adaptor_distance"]}
    if topic == "steps":
        return {f"loss, K = {entry['steps']}": f"curve/{i}/loss" for i, entry in enumerate(value["curve"])}
    if topic == "restoration":
        levels = enumerate(value["levels"])
        return {
            f"error of one pass, noise level {entry['tau']}": f"levels/{i}/error/network"
            for i, entry in levels
        }
    if topic == "lengths":
        return {
            f"{name}, {entry['length']} tokens": f"models/{name}/{i}/loss"
            for name, entries in value["models"].items()
            for i, entry in enumerate(entries)
        }
    if topic == "drafts":
        return {f"tokens accepted, {name}": f"drafters/{name}/accepted" for name in value["drafters"]}
    if topic == "infilling":
        return {f"gap filled, {name}": f"accuracy/{name}" for name in value["accuracy"]}
    if topic == "memory":
        return {
            "real minus none": "losses/differences/real - none",
            "real minus shuffled": "losses/differences/real - shuffled",
            "memory helps": "losses/helps",
            "precision minus base rate": "precision/interval",
            "reciprocal rank of the second half": "known_item/interval",
            "planted facts recalled": "planted/recalls",
        }
    return {
        name: name for name in value if not isinstance(value[name], list | dict) or as_interval(value[name])
    }
