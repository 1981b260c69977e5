"""Evidence as the functions of this package return it, drawn: every number in a table, every figure there."""

from functools import partial

import numpy as np
import pytest
import torch

from nano_think.evals import plots
from nano_think.evals.bootstrap import Interval
from nano_think.evals.correlation import token_correlation
from nano_think.evals.denoiser import restoration, steps_curve
from nano_think.evals.drafting import block_drafts, infilling
from nano_think.evals.lengths import length_curve
from nano_think.evals.report import Report, plain
from nano_think.evals.spaces import shared_spaces
from nano_think.evals.specialisation import specialisation
from nano_think.evals.study_evidence import TITLES, evidence
from nano_think.evals.study_values import as_interval, generic, shown
from nano_think.evals.tokens import TokenTable
from nano_think.experts.diffuser import DiffuserExpert
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.model import ExpertLM, NanoThink

VOCAB, D, ROWS, LENGTH = 30, 16, 6, 20
DOMAINS = ["code", "general"]
transformer = partial(TransformerExpert, num_layers=1, num_heads=2, ffn_dim=20)


def batches():
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = -100
    return [
        {
            "tokens": tokens,
            "labels": labels,
            "positions": torch.arange(LENGTH).expand(ROWS, -1),
            "segments": torch.zeros_like(tokens),
            "doc_uid": torch.arange(ROWS).unsqueeze(1).expand(-1, LENGTH),
            "domain": torch.arange(ROWS) % 2,
        }
    ]


def tokens_of(experts):
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(ROWS), LENGTH)
    weights = rng.dirichlet(np.ones(len(experts)), len(document))
    nll = rng.gamma(4, size=(len(document), len(experts)))
    return TokenTable(
        experts=experts,
        uid=np.arange(ROWS),
        document=document,
        domain=document % 2,
        position=np.tile(np.arange(LENGTH), ROWS),
        token_class=rng.integers(0, 3, len(document)),
        weights=weights,
        nll=nll,
        fused=(weights * nll).sum(1),
        without=nll.mean(1, keepdims=True) + rng.normal(0, 0.1, nll.shape),
    )


def difference(estimate, verdict, documents=40):
    half = 0.05
    ends = {"low": estimate - half, "high": estimate + half}
    return {"estimate": estimate, **ends, "documents": documents, "verdict": verdict}


MEMORY = {
    "R1": {
        "modes": {name: {"loss": 4.0 + i / 10, "bits_per_byte": 1.5, "tokens": 1000, "documents": 40}
                  for i, name in enumerate(("none", "real", "shuffled", "random"))},
        "differences": {"real - none": difference(-0.02, "not distinguishable"),
                        "real - shuffled": difference(-0.3, "better"), "real - random": difference(0.2, "worse"),
                        "shuffled - none": {"estimate": 0.1, "low": None, "high": None, "documents": 1,
                                            "verdict": "not distinguishable"}},
        "helps": True,
        "domains": {"code": {"real - none": difference(-0.1234, "better"), "real - shuffled": difference(0, "x")}},
        "seeing": 0.625,
    },
    "R2": {"k": 2, "queries": 50, "precision": 0.7, "base_rate": 0.5, "lift": 1.4,
                  "interval": difference(0.2, "x"), "domains": {"code": {"queries": 50, "precision": 0.7}}},
    "R3": {"queries": 0},
    "R4": {"slots": None, "null": None, "tokens": 0, "heads": []},
    "R5": {
        "buckets": [{"low": 0.0, "high": high, "tokens": 10, "documents": 4,
                     "differences": {"real - none": difference(-0.1, "better"),
                                     "real - shuffled": difference(-high, "better")}}
                    for high in (0.0, 0.125, 1.0)],
        "copying": None,
    },
    "cost": {"records": 10, "ms_per_token": {"off": 1.5, "on": 2.5}},
    "planted": {"facts": 16, "answer_tokens": 40, "retrieved": 0.875, "recalls": False,
                "modes": {"off": {"loss": 5.0, "accuracy": 0.1}, "own": {"loss": 4.5, "accuracy": 0.2}},
                "differences": {"own - off": difference(-0.5, "better")}},
}  # fmt: skip


@pytest.fixture(scope="module")
def found(randomise):
    """Evidence of one seed as study.json would hold it."""
    teacher = randomise(ExpertLM((VOCAB, D), transformer)).eval()
    network = randomise(
        ExpertLM((VOCAB, D), partial(DiffuserExpert, num_layers=1, num_heads=2, ffn_dim=20, train_T=20)),
        seed=1,
    ).eval()
    network.expert.fit_statistics(torch.randn(50, D, generator=torch.Generator().manual_seed(2)))
    space = partial(StateSpaceExpert, num_layers=1, d_inner=16, d_state=4)
    model = randomise(NanoThink({"transformer": transformer, "state_space": space}, VOCAB, D)).eval()
    counts = torch.arange(VOCAB)
    texts = batches()[0]["tokens"]

    def targets(batch):
        return network.embedding(batch["tokens"]).detach(), batch["labels"] >= 0

    denoising = {
        "steps_curve": steps_curve(
            network, teacher, batches(), steps=(1, 2), decode_tokens=1, n_resamples=20
        ),
        "restoration": restoration(network, targets, batches(), levels=(2, 10, 20)),
        "block_drafts": block_drafts(
            network, teacher, texts[:, :14], counts, block=4, steps=(1, 2), n_resamples=20
        ),
        "infilling": infilling(network, teacher, texts, counts, right=6, span=4, steps=(1,), n_resamples=20),
        "more": {"x": 1.5},
    }
    losses = {name: lambda batch, i=i: batch["labels"] * 0.1 + i for i, name in enumerate("ab")}
    return plain(
        {
            "calibration": {
                "ece": {"bigram": 0.0123},
                "error_correlation": token_correlation(losses, batches()),
            },
            "routing": {"information": 0.2, "interval": Interval(0.2, 0.1, 0.3, 9), "p_value": 0.005},
            "specialisation": specialisation(tokens_of(["transformer", "diffuser"]), DOMAINS, n_resamples=20),
            "spaces": shared_spaces(model, batches(), np.arange(VOCAB) % 4, DOMAINS, n_resamples=20),
            "denoiser": denoising,
            "lengths": length_curve({"transformer": teacher}, batches(), (5, 10, 20), n_resamples=20),
            "memory": MEMORY,
            "own_topic": {"score": 0.123456, "list": [{"a": 1, "b": 2.5}, {"a": 2}]},
        }
    )


def figures_with(monkeypatch):
    """Names of the figures drawn; the drawing itself is checked by tests of plots."""
    drawn = []

    def save(figure, path):
        drawn.append(path.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x89PNG")
        return path

    monkeypatch.setattr(plots, "_save", save)
    return drawn


def test_every_topic_is_a_section_with_its_figures(make_study, found, tmp_path, monkeypatch):
    drawn = figures_with(monkeypatch)
    record = make_study()
    for facts in record.facts["seeds"].values():
        facts["evidence"] = found
    report = Report("T")
    evidence(report, record, tmp_path)
    text = report.markdown(tmp_path)
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles == [title for topic, title in TITLES.items() if topic in found] + ["Own topic"]
    assert (
        text.count("The main figures of every seed") == len(titles) - 1
    )  # calibration is in the table of losses
    assert len(drawn) == len(set(drawn)) == text.count("](<")
    expected = "knock_out weights_by_domain weights_by_class weights_by_position error_correlation oracle"
    expected += " cka_with_adaptors denoising_loss restoration_error drafts_agreement infilling length_loss"
    expected += " length_cut memory memory_overlap planted token_losses"
    assert {f"{name}.png" for name in expected.split()} <= set(drawn)


def test_numbers_of_the_evidence_are_in_its_tables(make_study, found, tmp_path, monkeypatch):
    figures_with(monkeypatch)
    record = make_study(seeds=(1,))
    record.facts["seeds"]["1"]["evidence"] = found
    report = Report("T")
    evidence(report, record, tmp_path)
    text = report.markdown(tmp_path)
    special, spaces, memory = found["specialisation"], found["spaces"], found["memory"]
    for expert, columns in special["knock_out"].items():
        (row,) = (
            line for line in text.split("What each expert is worth")[1].split("\n\n")[1].splitlines()
            if line.startswith(f"| {expert} ")
        )  # fmt: skip
        assert row == f"| {expert} | " + " | ".join(f"{as_interval(v):+.4f}" for v in columns.values()) + " |"
    for names in special["correlation"].values():
        for value in names.values():
            assert f"{as_interval(value):+.3f}" in text
    for part in ("with_adaptors", "without_adaptors"):
        for measure in ("cka", "cosine"):
            for row in spaces[part][measure].values():
                assert all(f"{value:.3f}" in text for value in row.values() if value is not None)
        for row in spaces[part]["r2"].values():
            assert all(f"{as_interval(value):.3f}" in text for value in row.values())
    for entry in found["denoiser"]["steps_curve"]["curve"]:
        assert f"{as_interval(entry['loss']):.4f}" in text
        assert f"{entry['kl']:.4f}" in text
    for level in found["denoiser"]["restoration"]["levels"]:
        assert all(
            f"{value:.3f}" in text for value in [*level["error"].values(), *level["agreement"].values()]
        )
    for drafter in found["denoiser"]["block_drafts"]["drafters"].values():
        assert f"{as_interval(drafter['accepted']):.3f}" in text
    for value in found["denoiser"]["infilling"]["accuracy"].values():
        assert f"{as_interval(value):.3f}" in text
    for entries in found["lengths"]["models"].values():
        assert all(f"{as_interval(entry['loss']):.4f}" in text for entry in entries)
        assert all(f"{as_interval(b['minus_cut']):+.4f}" in text for b in entries[-1]["buckets"])
    for value in memory["R1"]["differences"].values():
        assert f"{as_interval(value):+.4f} | {value['verdict']}" in text
    assert "here they are. 62.5% of the tokens see a record." in text
    assert "| share of the records that are of the questioner's domain | 0.7 |" in text
    assert "| milliseconds a token, memory off | 1.5 |" in text
    assert "| code | -0.1234 [-0.1734, -0.0734], better |" in text
    assert "measurably beat shuffled ones nowhere" in text
    assert "does not recall" in text
    assert (
        "trusts depends on the domain: I(domain; expert) is 0.2000 [0.1000, 0.3000] nats, p = 0.005" in text
    )
    assert "| bigram | 0.0123 |" in text
    assert "own topic: list" in text
    assert "0.1235" in text


def test_what_memory_gains_is_said_by_its_verdict(make_study, tmp_path, monkeypatch):
    figures_with(monkeypatch)
    for helps, copying, words in (
        (False, True, ("here they are not.", "only where there is text to copy")),
        (True, False, ("here they are.", "also where there is nothing to copy")),
    ):
        record = make_study(seeds=(1,))
        losses = MEMORY["R1"] | {"helps": helps}
        overlap = MEMORY["R5"] | {"copying": copying}
        record.facts["seeds"]["1"]["evidence"] = {"memory": {"R1": losses, "R5": overlap}}
        report = Report("T")
        evidence(report, record, tmp_path)
        assert all(word in report.markdown(tmp_path) for word in words)


def test_a_topic_that_could_not_be_measured_gives_its_reason(make_study, tmp_path):
    record = make_study(seeds=(1,))
    record.facts["seeds"]["1"]["evidence"] = {
        "lengths": {"reason": "the documents are too short"},
        "spaces": {"reason": "one document cannot be halved"},
        "routing": {"information": 0.001, "interval": None, "p_value": 0.4},
    }
    report = Report("T")
    evidence(report, record, tmp_path)
    text = report.markdown(tmp_path)
    assert "the documents are too short" in text
    assert "one document cannot be halved" in text
    assert "does not measurably depend on the domain" in text


def test_values_are_shown_with_four_digits():
    assert shown(None) == "–"
    assert shown({"estimate": 1.23456, "low": None, "high": None, "documents": 1}) == "1.235"
    assert shown(difference(0.5, "worse")) == "0.5 [0.45, 0.55], worse"
    assert shown([True, {"a": 1, "b": 0.123456}]) == "yes, a 1, b 0.1235"
    report = Report("T")
    generic(report, 3.5, "lone")
    assert report.tables[0].cells() == [["lone", "3.5"]]
    value = {"by_kind": {"code": {"hits": 2}}, "heads": [{"hits": 1, "of_all": 3}]}
    generic(report, value, "named", {"hits": "records found", "code": "program text"})
    _, values, heads = report.tables
    assert values.cells() == [["by kind, program text, records found", "2"]]
    assert (heads.title, heads.headers) == ("named: heads", ["records found", "of all"])
