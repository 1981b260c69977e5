from __future__ import annotations

import json

import pytest

from nano_think.errors import UserError
from nano_think.phases.journal import DONE, Journal
from nano_think.phases.sweep import settings_in


@pytest.fixture
def journal(tmp_path):
    made = Journal(tmp_path)
    made.open("python train.py -m seed=1,2", ["seed=1,2"], [["seed=1"], ["seed=2"]], again=False)
    made.begin(0, ["seed=1"])
    made.end(0, DONE, objective=5.0, figures={"loss": 5.0})
    return made


@pytest.mark.parametrize(
    "change",
    [
        lambda c: [],
        lambda c: {},
        lambda c: c | {"jobs": []},
        lambda c: c | {"asked": "seed=1,2"},
        lambda c: c["jobs"]["0"].update(state="over") or c,
        lambda c: c["jobs"]["0"].update(folder="../../elsewhere") or c,
        lambda c: c["jobs"]["0"].update(overrides=None) or c,
        lambda c: c["jobs"]["0"].update(attempts="1") or c,
        lambda c: c["jobs"]["0"].update(objective="small") or c,
        lambda c: c["jobs"]["0"].update(figures=[1]) or c,
        lambda c: c["jobs"]["0"].update(error=7) or c,
        lambda c: c["jobs"].update({"first": c["jobs"]["0"]}) or c,
        lambda c: c["jobs"]["0"].pop("state") and c,
    ],
    ids=range(13),
)
def test_a_journal_that_is_none_is_damage(journal, change):
    assert journal.read()["jobs"]["0"]["objective"] == 5.0
    journal.path.write_text(json.dumps(change(json.loads(journal.path.read_text()))))
    with pytest.raises(
        UserError, match=r"sweep\.json is damaged .*delete it, and the same command runs all jobs"
    ):
        journal.read()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_so_is_what_is_no_json(journal, content):
    journal.path.write_bytes(content)
    with pytest.raises(UserError, match=r"sweep\.json is damaged"):
        journal.read()


@pytest.mark.parametrize("content", [b"a: [", b"\xff", b"a: ${b}", b"just text: : :", None])
def test_settings_of_a_job_that_cannot_be_read_are_named(tmp_path, content):
    path = tmp_path / "0" / "config.yaml"
    if content is not None:
        path.parent.mkdir()
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml is damaged .*: delete .*/0, or"):
        settings_in(path)
