"""`phase=audit` and what evaluation makes of it. The checks themselves are tested in tests/evals/audit."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from nano_think.errors import UserError
from nano_think.evals.audit.finding import Audit, Finding
from nano_think.evals.audit.run import CHECKS, UNTRAINED
from nano_think.phases import audit as phase
from nano_think.phases import study_audit

FAILED = Finding("A1", "title", "fail", 0.5, 7, "router", "weights")


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, ...]]:
    """The checks of every audit that is made; each is made in full, but with A1 and A10 alone."""
    made, real = [], phase.audit

    def quick(model, **settings):
        made.append(tuple(settings["checks"]))
        return real(model, **{**settings, "checks": ("A1", "A10")})

    monkeypatch.setattr(phase, "audit", quick)
    return made


@pytest.fixture
def failing(monkeypatch) -> None:
    monkeypatch.setattr(phase, "audit", lambda model, **settings: Audit("model", (FAILED,)))


@pytest.mark.parametrize("expert", ["transformer", "all"])
def test_an_untrained_network_is_audited_once(expert, project, asked, printed):
    result, run = project.go("phase=audit", f"expert={expert}")
    assert result["passed"]
    data = json.loads((run.dir / "audit.json").read_text())
    assert [f["check"] for f in data["findings"]] == ["A1", "A10"]
    assert "| A1 |" in (run.dir / "audit.md").read_text()
    again = project.go("phase=audit", f"expert={expert}")[1]
    assert "reused audit" in printed(again)
    assert asked == [CHECKS]


def test_a_leak_is_an_error_that_names_its_component(project, asked):
    with pytest.raises(UserError, match=r"A1 fail \(router\)"):
        project.go("phase=audit", "expert=all", "model.router.pool=sequence")
    project.go("phase=audit", "expert=all")


def test_changed_code_is_audited_anew(project, asked, monkeypatch):
    project.go("phase=audit", "expert=transformer")
    monkeypatch.setattr(phase, "code_hash", lambda: "other code")
    project.go("phase=audit", "expert=transformer")
    assert len(asked) == 2


def test_losses_carry_the_mark_of_the_audit(built, asked):
    _, run = built.go("phase=eval", "expert=transformer")
    report = json.loads((run.dir / "report.json").read_text())
    assert report["audit"] == {"passed": True, "mark": "leak audit passed: A1, A10"}
    assert "leak audit passed" in (run.dir / "report.md").read_text()
    assert asked == [UNTRAINED]


def test_a_failed_audit_marks_the_losses_or_forbids_them(built, failing, monkeypatch):
    monkeypatch.setattr(phase, "code_hash", lambda: "leaky code")
    _, run = built.go("phase=eval", "expert=transformer")
    assert "these losses mean nothing" in (run.dir / "report.md").read_text()
    with pytest.raises(UserError, match=r"audit=require.*A1 fail"):
        built.go("phase=eval", "expert=transformer", "audit=require")


@pytest.fixture
def plan_of(project, monkeypatch):
    """`plan_of(*overrides)`: a plan of a study whose mixture has its first numbers."""

    def make(*overrides):
        run = project.new("phase=study", *overrides)
        model = phase.untrained(run)
        spec = {"model": phase.network_spec(run)}
        checkpoint = SimpleNamespace(
            kind="nano_think", spec=spec, model=model, name="mla_7d", path=run.artifacts
        )
        monkeypatch.setattr(study_audit, "load_checkpoint", lambda path, command: checkpoint)
        maker = SimpleNamespace(recipe=SimpleNamespace(path=lambda root: root), command="")
        return SimpleNamespace(run=run, trained={"fused_7d": maker}, stages=("7a", "7b", "7c", "7d"))

    return make


def test_a_study_audits_its_mixture_in_full_and_once(plan_of, asked):
    plan = plan_of()
    found = study_audit.audited(plan)
    assert found["passed"]
    assert found["mark"] == "leak audit passed: A1, A10"
    assert [one["check"] for one in found["findings"]] == ["A1", "A10"]
    assert all(one["title"] and one["verdict"] == "pass" for one in found["findings"])
    assert study_audit.audited(plan) == found
    assert asked == [CHECKS]


def test_a_study_says_that_its_mixture_leaks_or_stops(plan_of, failing):
    found = study_audit.audited(plan_of())
    assert not found["passed"]
    assert "did not pass (A1 fail): these losses mean nothing" in found["mark"]
    assert found["findings"] == [{"check": "A1", "title": "title", "verdict": "fail"}]
    with pytest.raises(UserError, match=r"audit=require.*A1 fail"):
        study_audit.audited(plan_of("audit=require"))


def test_nothing_is_audited_where_nothing_may_be_built(built, monkeypatch):
    monkeypatch.setattr(phase, "code_hash", lambda: "code never audited")
    _, run = built.go("phase=eval", "expert=transformer", "prerequisites=require")
    assert "not audited: run `python train.py phase=audit ckpt=" in (run.dir / "report.md").read_text()
