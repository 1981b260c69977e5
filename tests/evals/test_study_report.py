"""The report of a study against numbers recomputed from its files with plain numpy, and its verdicts turned."""

import dataclasses
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from nano_think.evals import plots
from nano_think.evals.report import Report
from nano_think.evals.study_record import MODELS, StudyRecord
from nano_think.evals.study_report import study_report, write_study_report
from nano_think.evals.study_sections import gates, standing
from nano_think.evals.study_setup import change_our_mind, provenance, question
from nano_think.evals.study_stages import router_bounds, stage_gains
from nano_think.evals.study_statistics import StudyStatistics
from nano_think.evals.study_training import TRIAL, training

COMMITTED = Path(__file__).resolve().parents[2] / "experiments" / "results" / "study"
RESAMPLES = 2000
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]\d+)?%?")


class Recomputed:
    """Losses and differences from the files alone, written down from the description of the method."""

    def __init__(self, folder):
        self.facts = json.loads((folder / "study.json").read_text())
        self.files, self.draws = {}, {}
        for path in sorted((folder / "losses").glob("*.npz")):
            split, seed = re.fullmatch(r"(\w+)_seed(\d+)", path.stem).groups()
            with np.load(path) as arrays:
                self.files[split, int(seed)] = dict(arrays)
        self.domains = self.facts["data"]["domains"]

    def seeds(self, *models, split="test"):
        return [
            seed
            for (name, seed), file in sorted(self.files.items())
            if name == split and set(models) <= set(file["models"].tolist())
        ]

    def nll(self, model, seed, split="test"):
        file = self.files[split, seed]
        return file["nll"][file["models"].tolist().index(model)].astype(float)

    def times(self, documents, seed):
        """How often each document was drawn: (resamples, documents)."""
        if (documents, seed) not in self.draws:
            drawn = np.random.default_rng(seed).integers(documents, size=(RESAMPLES, documents))
            self.draws[documents, seed] = np.stack([np.bincount(row, minlength=documents) for row in drawn])
        return self.draws[documents, seed]

    def interval(self, values, metric="loss", domain=None, macro=False):
        """(estimate, low, high, each seed) of sums (S, M), t over seeds beside the bootstrap over documents."""
        file = next(file for (split, _), file in self.files.items() if split == "test")
        units = file["num_tokens"] * 1.0 if metric == "loss" else file["num_bytes"] * math.log(2)
        strata = [np.ones(len(units), bool)] if domain is None else [file["domain"] == domain]
        if macro:
            strata = [file["domain"] == d for d in np.unique(file["domain"])]
        if not all(chosen.any() for chosen in strata):
            return None
        per_seed = np.mean([values[:, c].sum(1) / units[c].sum() for c in strata], axis=0)
        estimate, count = per_seed.mean(), len(per_seed)
        if min(chosen.sum() for chosen in strata) < 2:
            return estimate, math.nan, math.nan, per_seed
        drawn, between, within, sizes = [], 0.0, 0.0, []
        for index, chosen in enumerate(strata):
            part, weight = values[:, chosen], units[chosen]
            documents = len(weight)
            times = self.times(documents, index)
            drawn.append((times @ part.mean(0)) / (times @ weight))
            rest = (part - (part.sum(1) / weight.sum())[:, None] * weight) / weight.sum()
            scale = documents / (documents - 1)
            between += scale * (rest.mean(0) ** 2).sum()
            within += scale * ((rest - rest.mean(0)) ** 2).sum() / max(1, count * (count - 1))
            sizes.append(weight.sum() ** 2 / (weight**2).sum())
        return self.ends(estimate, per_seed, np.mean(drawn, axis=0), min(sizes), between, within)

    @staticmethod
    def ends(estimate, per_seed, drawn, effective, between, within):
        n, count = max(2, int(effective + 0.5)), len(per_seed)
        tail = scipy.stats.norm.cdf(-scipy.stats.t.ppf(0.975, n - 1) * math.sqrt(n / (n - 1)))
        low, high = np.quantile(drawn, [tail, 1 - tail])
        if count > 1:
            half = scipy.stats.t.ppf(0.975, count - 1) * per_seed.std(ddof=1) / math.sqrt(count)
            own = math.sqrt(max(0.0, 1 - within / between)) if between else 0.0
            low = estimate - math.hypot(own * (estimate - low), half)
            high = estimate + math.hypot(own * (high - estimate), half)
        return estimate, low, high, per_seed

    def loss(self, model, **how):
        seeds = self.seeds(model)
        return self.interval(np.stack([self.nll(model, seed) for seed in seeds]), **how) if seeds else None

    def difference(self, model, baseline, domain=None):
        """(estimate, low, high, each seed, smallest effect, verdict)."""
        seeds = self.seeds(model, baseline)
        if not seeds:
            return None
        ours, theirs = (np.stack([self.nll(name, seed) for seed in seeds]) for name in (model, baseline))
        found = self.interval(ours - theirs, domain=domain)
        if found is None:
            return None
        estimate, low, high, per_seed = found
        level = self.interval(theirs, domain=domain)[3]
        least = max(5e-4, 2 * level.std(ddof=1) if len(seeds) > 1 else 0.0)
        verdict = "not distinguishable"
        if abs(estimate) >= least and (high < 0 or low > 0):
            verdict = "better" if estimate < 0 else "worse"
        return estimate, low, high, per_seed, least, verdict

    def static(self):
        """Expert -> weights of 7a seed by seed, then its gap and mean KL under the first seed."""
        fits = [facts["static"] for facts in self.facts["seeds"].values()]
        return {
            name: [*(fit["weights"][name] for fit in fits), fits[0]["gap"][name], fits[0]["mean_kl"][name]]
            for name in fits[0]["weights"]
        }

    def validation(self, model):
        seeds = self.seeds(model, split="val")
        values = [self.nll(model, s, "val").sum() / self.files["val", s]["num_tokens"].sum() for s in seeds]
        return float(np.mean(values)) if values else math.nan

    def chosen(self, keys):
        return min((key for key in keys if self.seeds(key)), key=self.validation)


def tables(markdown):
    """Title -> rows of cells, headers first; titles of several tables get a number."""
    found, title = {}, ""
    for line in markdown.splitlines():
        if match := re.fullmatch(r"\*\*(.+)\*\*", line):
            title = match[1]
            found[title] = []
        elif line.startswith("| ") and not re.fullmatch(r"[|: -]+", line):
            cells = re.split(r" (?<!\\)\| ", line.strip()[2:-2])
            found.setdefault(title, []).append([cell.strip().replace("\\|", "|") for cell in cells])
    return found


def numbers(text):
    found = [match.replace(",", "") for match in NUMBER.findall(text)]
    return [float(match[:-1]) / 100 if match.endswith("%") else float(match) for match in found]


def agree(text, values, step=1.01e-4):
    """The cell shows these numbers to its last digit (step None: its third); a dash shows None or NaN."""
    if values is None or (values[0] is None or math.isnan(values[0])):
        return text == "–"
    shown = [value for value in values if not math.isnan(value)]
    return len(numbers(text)) == len(shown) and np.allclose(
        numbers(text), shown, rtol=5e-3 if step is None else 0, atol=step or 0
    )


NONE_YET = "no study is committed yet: make study writes one, for experiments/results/study"
ONLY_COMMITTED = pytest.param("committed", marks=pytest.mark.skipif(not COMMITTED.is_dir(), reason=NONE_YET))


@pytest.fixture(scope="module", params=["synthetic", ONLY_COMMITTED])
def drawn(request, make_study, with_ablations, tmp_path_factory):
    """(folder, recomputed numbers, report.md as drawn here)."""
    folder = tmp_path_factory.mktemp("study") / "study"
    if request.param == "synthetic":
        with_ablations(make_study()).save(folder)
    else:
        shutil.copytree(COMMITTED, folder)
    write_study_report(folder, RESAMPLES)
    return folder, Recomputed(folder), tables((folder / "report.md").read_text())


def calibration(seed):
    return seed["evidence"].get("calibration", {}).get("ece", {})


def label(plain, key):
    return plain.facts["models"].get(key, {"label": key.replace("_", " ")})["label"]


def named(plain, rows, column=0):
    """Model key -> cells of its row."""
    keys = {label(plain, key): key for key in plain.facts["models"]}
    return {keys[row[column]]: row for row in rows[1:]}


def test_every_loss_with_its_interval(drawn):
    _, plain, found = drawn
    rows = named(plain, found["Every model: what it costs and what it reaches"])
    assert list(rows) == [key for key in MODELS if key in plain.facts["models"]]
    for key, row in rows.items():
        facts = plain.facts["models"][key]
        assert row[1] == MODELS[key]
        for cell, name in zip(
            row[2:5], ("parameters", "training_flops", "inference_flops_per_token"), strict=True
        ):
            assert agree(cell, [facts.get(name)], step=None if name != "parameters" else 0.1)
        assert agree(row[5], [plain.validation(key)])
        for cell, how in zip(
            row[6:9], ({}, {"metric": "bpb"}, {"metric": "bpb", "macro": True}), strict=True
        ):
            value = plain.loss(key, **how)
            assert agree(cell, value and value[:3]), (key, how, cell, value)
        errors = [one[key] for one in map(calibration, plain.facts["seeds"].values()) if key in one]
        assert agree(row[9], [np.mean(errors)] if errors else None)
        assert int(row[10]) == len(plain.seeds(key))
    for key, row in named(plain, found["Bits a byte by domain, test"]).items():
        for index, cell in enumerate(row[1:]):
            value = plain.loss(key, metric="bpb", domain=index)
            assert agree(cell, value and value[:3]), (key, index)


def check_difference(cells, value):
    """Cells of difference, each seed, smallest effect and verdict."""
    if value is None:
        assert cells == ["–", "–", "–", "not measured"]
        return
    assert agree(cells[0], value[:3]), (cells, value)
    assert agree(cells[1], list(value[3]))
    assert agree(cells[2], [value[4]])
    assert cells[3] == value[5]


def test_every_difference_with_interval_and_verdict(drawn):
    _, plain, found = drawn
    fused = plain.chosen(["fused_7b", "fused_7c", "fused_7d"])
    rows = named(plain, found[f"{label(plain, fused)} minus each baseline, test"])
    bounds = {"oracle_token", "oracle_document", "oracle_domain", "static_per_domain"}
    assert set(rows) == {key for key in plain.facts["models"] if plain.seeds(key)} - bounds - {fused}
    for key, row in rows.items():
        check_difference(row[1:], plain.difference(fused, key))
    for key, row in named(plain, found["The same by domain (nats/token)"]).items():
        for index, cell in enumerate(row[1:]):
            value = plain.difference(fused, key, domain=index)
            if value is None:
                assert cell == "–"
            else:
                assert agree(cell.rsplit(", ", 1)[0], value[:3])
                assert cell.endswith(f", {value[5]}")


def test_every_stage_and_bound(drawn):
    _, plain, found = drawn
    best = plain.chosen(["transformer", "diffuser", "state_space"])
    pairs = [
        ("static", best),
        ("fused_7b", "static"),
        ("fused_7c", "fused_7b"),
        ("fused_7d", "fused_7c"),
        ("finetuned_transformer", "transformer"),
        ("fused_7c", "finetuned_transformer"),
    ]
    for (model, before), row in zip(pairs, found["What each stage gains, test"][1:], strict=True):
        assert row[2] == f"{label(plain, model)} − {label(plain, before)}"
        check_difference(row[3:], plain.difference(model, before))
    router = plain.difference("fused_7b", "static")
    rows = named(plain, found["Bounds of routing, test (nats/token)"])
    assert list(rows) == ["static_per_domain", "oracle_domain", "oracle_document", "oracle_token"]
    for key, row in rows.items():
        over_static = plain.difference(key, "static")
        for cell, value in zip(
            row[2:5],
            (plain.difference(key, best), over_static, plain.difference("fused_7b", key)),
            strict=True,
        ):
            assert agree(cell, value and value[:3])
        reachable = over_static and over_static[5] == "better"
        assert agree(row[5], [router[0] / over_static[0]] if reachable else None, step=0.0051)


def test_every_fact_of_the_set_up_and_training(drawn):
    folder, plain, found = drawn
    facts, seeds = plain.facts, plain.facts["seeds"].values()
    for title, part in (("Data", facts["data"]), ("Settings", facts["settings"])):
        shown = " ".join(" ".join(row) for row in found[title])
        for value in part.values():
            if not isinstance(value, dict | list):
                assert (f"{value:,}" if isinstance(value, int) else str(value)) in shown
    for key, row in named(plain, found["Models"]).items():
        assert row[1:3] == [MODELS[key], facts["models"][key]["description"]]
        assert agree(row[3], [facts["models"][key].get("trained_parameters")], step=0.1)
    names, *trials = found["Tuning record"]
    for trial, row in zip(facts["tuning"], trials, strict=True):
        assert names == [*(TRIAL.get(name, name) for name in trial if name != "chosen"), "chosen"]
        for cell, (name, value) in zip(
            row[:-1], ((n, v) for n, v in trial.items() if n != "chosen"), strict=True
        ):
            assert cell == value if isinstance(value, str) else agree(cell, [value], step=None), name
        assert (row[-1] == "chosen") == trial["chosen"]
    for key, fits in plain.static().items():
        (row,) = (
            row for row in found[next(t for t in found if t.startswith("Constant weights"))] if row[0] == key
        )
        for cell, value in zip(row[1:], fits, strict=True):
            assert agree(cell, [value], step=6e-4)
    rows = {
        row[0].replace(" ", "_"): row for row in found["Where each fit stood at its end, mean over seeds"][1:]
    }
    keys = {key: label(plain, key).replace(" ", "_") for s in seeds for key in s["fits"]}
    assert sorted(keys.values()) == sorted(rows)
    for key, shown in keys.items():
        row, fits = rows[shown], [s["fits"][key] for s in seeds if key in s["fits"]]
        names = ("steps", "tokens", "epochs", "best_step", "val_loss", "fall_per_epoch", "lr")
        steps = (0.51, 0.51, 0.0051, 0.51, 1.01e-4, 5.1e-5, None)
        for cell, name, step in zip(row[1:8], names, steps, strict=True):
            assert agree(cell, [np.mean([fit[name] for fit in fits])], step=step), (key, name)
        assert int(row[8]) == len(fits)
    hashes = {row[0]: row[1].strip("`") for row in found["Inputs of this report"][1:]}
    listed = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert hashes == listed


def test_every_gate_and_try(drawn):
    _, plain, found = drawn
    seeds = list(plain.facts["seeds"].values())
    words = {True: "yes", False: "no", None: "undecided"}
    names = {gate["name"] for facts in seeds for gate in facts["gates"]}
    rows = {row[0]: row for row in found.get("Gates", [[]])[1:]}
    assert rows.keys() == names
    for name, row in rows.items():
        for cell, facts in zip(row[2:], seeds, strict=False):
            passed = [words[gate["passed"]] for gate in facts["gates"] if gate["name"] == name]
            assert cell == (passed or ["–"])[0]
    tried = found.get("What was tried to improve the mixture", [[]])[1:]
    assert [row[0] for row in tried] == [one["what"] for one in plain.facts["tries"]]


@pytest.mark.skipif(not COMMITTED.is_dir(), reason=NONE_YET)
def test_the_committed_record_is_as_it_was_written_and_says_what_it_lacks():
    record = StudyRecord.load(COMMITTED)
    assert record.changed == ()
    text = (COMMITTED / "report.md").read_text()
    for line in record.missing():
        assert f"- {line}" in text
    assert record.digest() in text
    for figure in re.findall(r"\]\(<(figures/[^>]+)>\)", text):
        assert (COMMITTED / figure).is_file()


@pytest.mark.parametrize("drawn", [ONLY_COMMITTED], indirect=True)
def test_the_committed_text_differs_in_no_word(drawn):
    folder, _, _ = drawn
    ours, theirs = ((path / "report.md").read_text() for path in (folder, COMMITTED))
    # another processor may round the last digit otherwise
    assert NUMBER.sub("#", ours) == NUMBER.sub("#", theirs)
    np.testing.assert_allclose(numbers(ours), numbers(theirs), atol=1.01e-4)


def section(record, write, tmp_path, resamples=300):
    report = Report("Part")
    write(report, StudyStatistics(record, resamples), *([tmp_path] if write in DRAWS else []))
    return report.markdown()


DRAWS = (stage_gains, router_bounds, training)


@pytest.mark.parametrize(
    ("effect", "words"),
    [
        (0.3, "is better than it: -0."),
        (-0.6, "is worse than it: +0."),
        (-0.2, "cannot be told apart from it: "),
    ],
)
def test_the_standing_against_one_transformer_follows_its_loss(make_study, tmp_path, effect, words):
    text = section(make_study({"equal_parameters": effect}), standing, tmp_path)
    (line,) = (
        line for line in text.splitlines() if line.startswith("**Against one Transformer of equal para")
    )
    assert words in line


def test_the_reason_adds_up(make_study, tmp_path):
    record = make_study(reasons={"seed_pool": "Pools of one kind err alike."})
    text = section(record, standing, tmp_path)
    stats = StudyStatistics(record, 300)
    assert stats.fused == "fused_7d"
    for key in ("equal_parameters", "equal_training_flops", "equal_inference_flops", "seed_pool"):
        line = next(line for line in text.splitlines() if f"{stats.difference('fused_7d', key):+.4f}" in line)
        steps = [float(value) for value in re.findall(r"([-+]\d\.\d+) by 7", line)]
        start = float(re.search(r"is (\d\.\d+) nats (?:behind|ahead of) it", line)[1])
        assert len(steps) == 4
        assert sum(steps) + start == pytest.approx(stats.difference("fused_7d", key).estimate, abs=4e-4)
        assert ("more than that distance" in line) == (stats.difference("fused_7d", key).estimate < 0)
    assert "Pools of one kind err alike." in text
    ours, theirs = record.models["fused_7d"], record.models["equal_parameters"]
    flops = ours["training_flops"] / theirs["training_flops"]
    assert (
        f"The mixture takes 1.00 times its parameters, {flops:.2f} times its planned training FLOPs" in text
    )


def test_an_expert_ahead_of_the_rival_is_called_so(make_study, tmp_path):
    text = section(make_study({"equal_parameters": 0.5}), standing, tmp_path)
    assert "nats ahead of it, and mixing" in text


def test_stage_sentences_turn_with_the_gain(make_study, tmp_path):
    effects = {"fused_7b": -0.3, "fused_7c": -0.05, "fused_7d": -0.05}
    text = section(make_study(effects, noise=0.002), stage_gains, tmp_path)
    assert "**7b.** Routing: a gain of 0.2" in text
    assert "**7c.** Extra trainable parameters: a loss of 0." in text
    assert "**7d.** Memory: not told from noise" in text
    assert "7c is worse than the same training with the Transformer alone (B5): +0.0" in text
    assert "was not measured, so no gain of 7d is put down to memory" in text


def test_memory_gains_only_where_real_records_beat_shuffled_ones(make_study, tmp_path):
    record = make_study()
    for helps, facts in zip((True, False), record.facts["seeds"].values(), strict=True):
        facts["evidence"]["memory"] = {"R1": {"helps": helps}}
    text = section(record, stage_gains, tmp_path)
    assert "under 1 of 2 seeds, so a gain of 7d is not put down to what is retrieved" in text
    assert "7c is better than the same training with the Transformer alone (B5): -0." in text


def test_a_router_without_gain_shows_how_much_there_was(make_study, tmp_path):
    won = section(make_study(), router_bounds, tmp_path)
    assert "The router (7b) is better than static weights (7a)" in won
    assert "How much there was to gain" not in won
    lost = section(make_study({"fused_7b": -0.05}), router_bounds, tmp_path)
    assert "The router (7b) cannot be told apart from static weights (7a)" in lost
    gain = re.search(r"of each domain.* gain \+(0\.\d+) nats a token .*nobody is, gains (0\.\d+)\.", lost)
    assert float(gain[1]) == pytest.approx(0.02, abs=0.01)
    assert float(gain[2]) == pytest.approx(0.55, abs=0.01)


TRY = {
    "what": "floor of the router", "why": "weights were stuck", "command": "make mla", "commit": "abc",
    "val_before": 4.0, "val_after": 3.9, "kept": True, "note": "",
}  # fmt: skip


def test_a_lost_comparison_names_the_failed_gate_and_what_was_tried(make_study, tmp_path):
    worse = {"fused_7b": 0.5, "fused_7c": 0.5, "fused_7d": 0.5}
    text = section(make_study(worse, tries=[TRY] * 5), gates, tmp_path)
    assert "Not won on test" in text
    assert "mixture minus transformer" in text
    assert "The gates that failed: G7 (Does memory help?)." in text
    assert text.count("floor of the router") == 5
    assert "Only" not in text
    few = section(make_study(worse, tries=[TRY] * 3), gates, tmp_path)
    assert "Only 3 of at least 5 tries are recorded" in few
    won = section(make_study(), gates, tmp_path)
    assert "Not won" not in won
    assert "Nothing had to be mended" in won


def test_what_would_change_our_mind_follows_the_verdicts(make_study, tmp_path):
    text = section(make_study(), change_our_mind, tmp_path)
    assert "mixture minus equal inference flops (worse): we would claim a gain if the upper end" in text
    assert "mixture minus equal training flops (not distinguishable): we would decide if" in text
    assert "mixture minus transformer (better): we would give the claim up" in text
    # surely below its baseline, by less than that varies over seeds: only a larger gain would decide
    sure = section(make_study({"fused_7b": -0.055}, noise=0.0005), change_our_mind, tmp_path)
    assert re.search(
        r"static weights \(7a\) \(not distinguishable\): we would decide if the difference, now -", sure
    )


def test_one_seed_claims_no_knowledge_of_others(make_study, tmp_path):
    effects = {"fused_7b": -0.0502}
    report = study_report(make_study(effects, seeds=(1,), noise=0.0), tmp_path, 200)
    text = report.markdown(tmp_path)
    assert "They know nothing of other seeds." in text
    assert "Student's t" not in text
    # sure of its sign, but the last digit that is printed: nothing is claimed, and the least that is stands there
    assert "the interval leaves out 0, but less than 0.0005 is not claimed" in text


def trials_of(family, rates, best, **more):
    return [
        {"family": family, "rate": rate, "dropout": None, "horizon": None, "tokens": 100, "val_loss": 5.0,
         "chosen": rate == best, **more}
        for rate in rates
    ]  # fmt: skip


def test_a_learning_rate_at_the_edge_of_its_grid_is_said_to_be_there(make_study, tmp_path):
    tuning = [
        *trials_of("transformer", (0.003, 0.001, 0.002), 0.003),
        *trials_of("transformer", (0.003,), 0.003, dropout=0.1),
        *trials_of("diffuser", (0.1, 0.2, 0.4), 0.2),
        *trials_of("state_space", (0.1, 0.2), 0.1),
        *trials_of("equal_training_flops", (0.5,), 0.5),
        *trials_of("equal_training_flops", (0.5,), 0.5, horizon=0.2),
    ]
    settings = {"seeds": [1, 2], "tuning": {"share": 0.2}}
    text = section(make_study(tuning=tuning, settings=settings), training, tmp_path)
    assert tables(text)["Where the best learning rate lies"][1:] == [
        ["transformer", "0.001, 0.002, 0.003", "0.003", "the highest of them"],
        ["diffuser", "0.1, 0.2, 0.4", "0.2", "between others"],
        ["state space", "0.1, 0.2", "0.1", "the lowest of them"],
        ["equal training flops", "0.5", "0.5", "the only one"],
    ]
    assert "is the highest that was tried for transformer. A higher one might be better still" in text
    assert "is the lowest that was tried for state space. A lower one might be better still" in text
    assert "are judged after runs of 20% of the steps" in text
    inside = trials_of("diffuser", (0.1, 0.2, 0.4), 0.2)
    text = section(make_study(tuning=inside), training, tmp_path)
    assert "that was tried for" not in text
    assert "are judged after" not in text  # whole runs, or nobody knows


def test_fits_that_were_best_long_before_their_end_are_named(make_study, tmp_path):
    record = make_study()
    text = section(record, training, tmp_path)
    assert "Best before" not in text
    assert "gained nothing" not in text
    for facts in record.facts["seeds"].values():
        facts["fits"]["diffuser"]["best_step"] = 0
        facts["fits"]["transformer"]["best_step"] = 224
        facts["fits"]["equal_parameters"]["best_step"] = 225
    text = section(record, training, tmp_path)
    assert "Training gained nothing in diffuser: no step was better than its start" in text
    assert "Best before 75% of their steps: transformer (step 224 of 300). A learning rate" in text


def test_the_leak_audit_of_each_seed_is_shown(make_study, tmp_path):
    record = make_study()
    found = tables(section(record, provenance, tmp_path))
    assert ["leak audit", "leak audit passed: A1, A10"] in found["What this report comes from"]
    title = next(title for title in found if title.startswith("Leak audit"))
    assert found[title][1:] == [["A1", "what A1 is about", "pass"], ["A10", "what A10 is about", "pass"]]
    del record.facts["seeds"]["1"]["audit"]
    found = tables(section(record, provenance, tmp_path))
    said = "seed 1: not recorded; seed 2: leak audit passed: A1, A10"
    assert ["leak audit", said] in found["What this report comes from"]
    assert "mean nothing" not in section(record, question, tmp_path)
    record.facts["seeds"]["2"]["audit"] |= {
        "passed": False,
        "mark": "it did not pass: these losses mean nothing",
    }
    assert "**Seed 2: it did not pass: these losses mean nothing.**" in section(record, question, tmp_path)


def test_a_curve_that_still_falls_is_named(make_study, tmp_path):
    record = make_study()
    assert "a plateau" in section(record, training, tmp_path)
    for facts in record.facts["seeds"].values():
        facts["fits"]["diffuser"]["fall_per_epoch"] = 0.2
    assert "so not fully trained: diffuser." in section(record, training, tmp_path)
    for facts in record.facts["seeds"].values():
        facts["fits"]["diffuser"]["fall_per_epoch"] = None
    assert "a plateau" not in section(record, training, tmp_path)  # one curve is not known


def test_curves_of_a_mixture_begin_where_its_experts_ended(make_study, tmp_path, monkeypatch):
    drawn, limits = {}, {}

    def keep(path, curves, y_most, **_):
        drawn[path.stem], limits[path.stem] = curves, y_most
        return path

    monkeypatch.setattr(plots, "line_chart", keep)
    record = make_study()
    # 7b: 600,000 of the 1,200,000 planned tokens were read, half of 4e9 FLOPs on top of what came before
    total = record.models["fused_7b"]["training_flops"]
    for facts in record.facts["seeds"].values():
        facts["fits"]["fused_7b"] |= {"planned_flops": 4e9, "planned_tokens": 1_200_000}
        facts["fits"]["fused_7b"]["history"] = [[0, 17.0], *facts["fits"]["fused_7b"]["history"]]
    section(record, training, tmp_path)
    tokens, _ = drawn["curves_tokens"]["fused 7b"]
    flops, losses = drawn["curves_flops"]["fused 7b"]
    assert limits["curves_flops"] == pytest.approx(min(losses) + 1.5)
    np.testing.assert_allclose(tokens, [200_000, 400_000, 600_000])
    np.testing.assert_allclose(flops, total - 4e9 + 4e9 * np.array([1, 2, 3]) / 6)


def test_a_partial_study_is_drawn_and_says_what_is_missing(make_study, tmp_path):
    whole = make_study()
    facts = whole.facts | {"settings": {"seeds": [1, 2, 3]}}
    facts["models"] = {k: v for k, v in whole.models.items() if k in ("bigram", "transformer", "diffuser")}
    part = whole.losses["test", 1]
    rows = [part.models.index(key) for key in ("bigram", "transformer")]
    losses = dataclasses.replace(part, models=("bigram", "transformer"), nll=part.nll[rows])
    text = study_report(StudyRecord(facts, {("test", 1): losses}), tmp_path, 200).markdown(tmp_path)
    assert "This study is not whole" in text
    assert "- seed 3: not run" in text
    assert "- seed 1: not scored on test: diffuser" in text
    assert "No mixture was scored" in text
    assert "one seed" not in text  # nothing is claimed where nothing was compared
    empty = study_report(StudyRecord(facts | {"seeds": {}}, {}), tmp_path, 200).markdown(tmp_path)
    assert "never built" in empty


def test_redrawing_gives_the_same_bytes_and_a_changed_input_another_hash(make_study, tmp_path):
    make_study().save(tmp_path)
    first = write_study_report(tmp_path, 200)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len([path for path in files if path.suffix == ".png"]) == 5
    assert write_study_report(tmp_path, 200) == first
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    study = tmp_path / "study.json"
    study.write_text(study.read_text().replace("two cores", "four cores"))
    second = write_study_report(tmp_path, 200)
    assert second != first
    assert second in (tmp_path / "report.md").read_text()
    assert "**Changed since SHA256SUMS was written:** study.json." in (tmp_path / "report.md").read_text()


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tables, self.images, self.addresses = 0, 0, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tables += tag == "table"
        self.images += tag == "img"
        self.addresses += [value for name, value in attributes if name in ("src", "href")]


def test_the_html_file_holds_everything(drawn):
    folder, _, _ = drawn
    markdown, page = (folder / "report.md").read_text(), Page((folder / "report.html").read_text())
    assert page.tables == len(re.findall(r"^\| [:-]", markdown, re.MULTILINE))
    assert page.images == markdown.count("](<figures/")
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
