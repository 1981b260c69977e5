"""What else a study tried, as the report shows it: every cell recomputed from the files, sentences that turn."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest

from nano_think.errors import UserError
from nano_think.evals import plots
from nano_think.evals.bootstrap import RESOLUTION
from nano_think.evals.losses import DocumentLosses
from nano_think.evals.report import Report, plain
from nano_think.evals.seeds import seed_deviation
from nano_think.evals.spaces import CKA_VARIANT, States, compare_spaces
from nano_think.evals.study_ablations import ablations
from nano_think.evals.study_record import StudyRecord
from nano_think.evals.study_report import write_study_report
from nano_think.evals.study_statistics import StudyStatistics


@pytest.fixture
def drawn(tmp_path):
    """`drawn(record)`: (tables by title, texts, differences that were plotted)."""

    def draw(record, resamples=300):
        report, plotted = Report("Part"), {}

        def keep(path, rows, **_):
            plotted[path.stem] = rows
            return path

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plots, "intervals", keep)
            ablations(report, StudyStatistics(record, resamples), tmp_path)
        return {table.title: table for table in report.tables}, report.markdown(), plotted

    return draw


def rows_of(table):
    return {row[0]: dict(zip(table.headers, row, strict=True)) for row in table.rows}


def test_every_ablation_is_compared_with_what_it_is_to_be_compared_with(make_study, with_ablations, drawn):
    record = with_ablations(make_study())
    tables, _, plotted = drawn(record)
    rows, part = rows_of(tables["Ablations, validation"]), record.losses["ablations", 1]
    val = record.losses["val", 1]
    tokens = val.num_tokens
    expected = {
        "prob": ("fused_7c", -0.05, "better"),
        "unfreeze all": ("fused_7c", 0.1, "worse"),
        "more text": ("fused_7c", -0.3, "better"),
        "own text": ("more_text", 0.05, "worse"),
        "token memory": ("fused_7d", 0.0, "not distinguishable"),
        "width 96": ("fused_7c", 0.2, "worse"),
    }
    assert list(rows) == ["fused 7c", "fused 7d", *expected]
    deviation = seed_deviation([record.of("fused_7c", "val", seed) for seed in (1, 2)])
    for name, (baseline, effect, verdict) in expected.items():
        key, row = name.replace(" ", "_"), rows[name]
        ours = part.nll[part.models.index(key)].astype(float)
        there = part if baseline == "more_text" else val
        theirs = there.nll[there.models.index(baseline)].astype(float)
        found = row["difference (nats/token)"]
        assert found.estimate == pytest.approx((ours - theirs).sum() / tokens.sum(), abs=1e-6)
        assert found.estimate == pytest.approx(effect, abs=0.01)
        assert found.low < found.estimate < found.high
        assert row["validation loss"] == pytest.approx(ours.sum() / tokens.sum(), abs=1e-6)
        assert row["verdict"] == verdict
        assert row["compared with"] == baseline.replace("_", " ")
        assert row["what changed"] == f"what {key} is"
        assert row["parameters"] == record.facts["seeds"]["1"]["ablations"][key]["parameters"]
    sets = rows_of(tables["What each ablation sets"])
    assert sets["prob"]["settings beyond the study's"] == "`model.x=prob`"
    assert sets["width 96"]["command"] == "`train width_96`"
    # another ablation has one seed; the study's own mixture has a deviation over two
    assert rows["prob"]["smallest effect claimed"] == pytest.approx(2 * deviation)
    assert rows["own text"]["smallest effect claimed"] == RESOLUTION
    assert [name.split(" −")[0] for name in plotted["ablations"]] == list(expected)
    assert rows["fused 7c"]["validation loss"] == pytest.approx(record.of("fused_7c", "val", 1).loss())


def test_the_interval_is_that_of_the_documents(make_study, with_ablations, drawn):
    """Against the plain formula: of many documents a percentile interval is 1.96 standard errors of a ratio."""
    record = with_ablations(make_study(), noise=0.1)
    tables, _, _ = drawn(record, resamples=4000)
    found = rows_of(tables["Ablations, validation"])["prob"]["difference (nats/token)"]
    part, val = record.losses["ablations", 1], record.losses["val", 1]
    nll = (part.nll[part.models.index("prob")] - val.nll[val.models.index("fused_7c")]).astype(float)
    rest = nll - found.estimate * val.num_tokens
    error = np.sqrt((rest**2).sum()) / val.num_tokens.sum()
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.15)


def test_experts_alone_show_what_was_forgotten(make_study, with_ablations, drawn):
    record = with_ablations(make_study())
    tables, text, _ = drawn(record)
    rows = tables["Experts alone, validation (nats/token)"].rows
    assert [row[:2] for row in rows] == [
        ["unfreeze all", "transformer"], ["unfreeze all", "state space"], ["own text", "diffuser"],
    ]  # fmt: skip
    for row, effect, verdict in zip(
        rows, (0.2, 0.0, -0.1), ("worse", "not distinguishable", "better"), strict=True
    ):
        assert row[2] == pytest.approx(record.of(row[1].replace(" ", "_"), "val", 1).loss())
        assert row[3] - row[2] == pytest.approx(effect, abs=0.01)
        assert row[4].estimate == pytest.approx(row[3] - row[2])
        assert row[5] == verdict
    assert "what it is worse by, it has forgotten" in text
    _, text, _ = drawn(with_ablations(make_study(), tried={"own_text": ("7c", None, 0.1)}))
    assert "forgotten" not in text


def test_memory_is_shown_off_and_on_with_its_compute(make_study, with_ablations, drawn):
    record = with_ablations(make_study())
    tables, _, _ = drawn(record)
    off, on = tables["Memory of token memory: loss by compute"].rows
    assert on[2] - off[2] == pytest.approx(-0.02, abs=0.005)
    assert (off[1], on[1]) == (3e6, 4e6)
    assert on[5] == pytest.approx((off[2] - on[2]) / 1e-3)
    assert on[4] == "better"
    assert "Are retrieved records of the reader's own domain more often than by chance?" in tables


def curve(target, *losses):
    """Losses of 1, 2, 4, ... denoising steps, as `steps_curve` gives them."""

    def interval(value):
        return {"estimate": value, "low": value - 0.1, "high": value + 0.1, "documents": 9}

    rows = [
        {"steps": 2**i, "loss": interval(loss), "minus_one_step": interval(loss - losses[0])}
        for i, loss in enumerate(losses)
    ]
    return {"target": target, "tokens": 400, "documents": 9, "teacher_loss": interval(4.0), "curve": rows}


def test_denoising_steps_stand_beside_those_of_the_study(make_study, with_ablations, drawn, monkeypatch):
    lines = {}
    monkeypatch.setattr(plots, "line_chart", lambda path, curves, **_: lines.update(curves) or path)
    record = with_ablations(make_study())
    facts = record.facts["seeds"]["1"]
    facts["ablations"]["prob"]["evidence"] = {"steps_curve": curve("next_embed", 5.5, 5.25, 6.0)}
    title = "Denoising steps of prob (nats/token), 400 tokens"
    alone = drawn(record)[0][title]
    assert alone.headers == ["steps", "loss of prob (next_embed)", "minus one step"]
    facts["evidence"]["denoiser"] = {"steps_curve": curve("hidden_same", 5.0, 5.125)}
    tables, text, _ = drawn(record)
    zero = "+0.0000 [-0.1000, +0.1000]"
    assert tables[title].cells() == [
        ["1", "5.0000 [4.9000, 5.1000]", zero, "5.5000 [5.4000, 5.6000]", zero],
        ["2", "5.1250 [5.0250, 5.2250]", "+0.1250 [+0.0250, +0.2250]",
         "5.2500 [5.1500, 5.3500]", "-0.2500 [-0.3500, -0.1500]"],
        ["4", "–", "–", "6.0000 [5.9000, 6.1000]", "+0.5000 [+0.4000, +0.6000]"],
    ]  # fmt: skip
    assert "Lowest loss of the study's own (hidden_same) with K = 1; K = 2 minus K = 1 is +0.1250 [" in text
    assert "Lowest loss of prob (next_embed) with K = 2; K = 4 minus K = 1 is +0.5000 [" in text
    assert lines["prob (next_embed)"] == ([1, 2, 4], [5.5, 5.25, 6.0])
    assert lines["the study's own (hidden_same)"] == ([1, 2], [5.0, 5.125])
    assert lines["Transformer (its teacher)"] == ([1, 2], [4.0, 4.0])


def test_the_spaces_of_a_mixture_built_without_adaptors_are_shown(
    make_study, with_ablations, drawn, tmp_path
):
    rng = np.random.default_rng(0)
    rows = np.arange(40)
    shape = {"document": rows // 4, "domain": rows % 2, "token_class": rows % 3}
    states = States({name: rng.normal(size=(40, 3)) for name in ("input", "b")}, {"b": 5.4321}, **shape)
    value = {
        "tokens": 40, "documents": 10, "spaces": ["input", "b"], "cka_variant": CKA_VARIANT,
        "adaptor_distance": {},
        "without_adaptors": compare_spaces(states, 1e-3, n_resamples=20, seed=0),
    }  # fmt: skip
    record = with_ablations(make_study())
    record.facts["seeds"]["1"]["ablations"]["prob"]["evidence"] = {"spaces": plain(value)}
    tables, text, _ = drawn(record)
    assert "Whether the experts of prob share a space, as for those of the study:" in text
    cka = value["without_adaptors"]["cka"]["input"]["b"]
    assert rows_of(tables["CKA, without adaptors"])["input"]["b"] == pytest.approx(cka)
    assert "Adaptors" not in tables
    assert not any("with adaptors" in title for title in tables)
    assert (tmp_path / "prob" / "cka_without_adaptors.png").is_file()


def test_another_machine_is_named_and_its_own_difference_shown(make_study, with_ablations, drawn):
    _, text, _ = drawn(with_ablations(make_study()))
    assert "made again" not in text
    record = make_study()
    record.facts["seeds"]["1"]["measured_with"] = {"commit": "1", "machine": "one core"}
    record = with_ablations(record, tried={"again_7c": ("7c", None, 0.01), "prob": ("7c", None, 0.0)})
    _, text, _ = drawn(record)
    assert "Seed 1 was made on one core, ablations also on two cores." in text
    assert "What the study has (fused 7c), made again for the ablations, differs by +0.0" in text


def test_nothing_tried_is_no_section(make_study, drawn):
    tables, text, _ = drawn(make_study())
    assert (tables, text) == ({}, "# Part\n")


def test_the_report_holds_them_and_the_hash_follows_their_losses(make_study, with_ablations, tmp_path):
    record = with_ablations(make_study())
    record.save(tmp_path)
    digest = write_study_report(tmp_path, 200)
    assert "## What else was tried" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "figures" / "ablations.png").is_file()
    part = record.losses["ablations", 1]
    part.nll[0, 0] += 1
    record.save(tmp_path)
    assert write_study_report(tmp_path, 200) != digest


def test_a_record_says_what_was_not_run_and_refuses_what_it_does_not_know(
    make_study, with_ablations, tmp_path
):
    record = with_ablations(make_study())
    assert record.missing() == []
    record.save(tmp_path)
    again = StudyRecord.load(tmp_path)
    assert again.losses["ablations", 1].models == record.losses["ablations", 1].models
    facts = copy.deepcopy(record.facts)
    facts["planned_ablations"] += ["router_of_words"]
    assert StudyRecord(facts, record.losses).missing() == ["ablations not run: router_of_words"]
    del facts["seeds"]["1"]["ablations"]["prob"]
    with pytest.raises(
        UserError, match=r"ablations_seed1\.npz holds models that study\.json does not have: prob"
    ):
        StudyRecord(facts, record.losses)
    part = record.losses["ablations", 1]
    other = dataclasses.replace(part, uid=part.uid + 1)
    with pytest.raises(UserError, match="scored on other documents"):
        StudyRecord(record.facts, {**record.losses, ("ablations", 1): other})
    assert isinstance(again.of("prob", "ablations", 1), DocumentLosses)
