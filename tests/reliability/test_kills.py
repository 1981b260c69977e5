"""One chain of kills; all of them are `make kills`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.kill_results import PLACES, Kill, Outcome, enough, outcomes
from tests.reliability.kills import INTERVAL, SHORT, _count_recomputed
from tests.reliability.moments import ROOT, place_of


def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path) -> None:
    command = [sys.executable, "-m", "tests.reliability.kills", "--short", "--out", str(tmp_path / "kills")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = Outcome.read(tmp_path / "kills" / "short-1.json").kills
    planned = [place for stage in SHORT.plan for place, count in stage.items() for _ in range(count)]
    assert [kill.place for kill in kills] == planned
    assert max(kill.recomputed for kill in kills) <= INTERVAL
    # the last step, and the rename of the artefact
    assert sum(kill.after_checkpoint for kill in kills) >= 2


def test_steps_done_again_are_counted_from_the_journal() -> None:
    """Or no chain could ever lose too many."""
    kills = [Kill("c", "anywhere", "", False, True) for _ in range(2)]
    journal = ["from\ta\t0", "step\ta\t1", "step\ta\t7", "killed\tanywhere\t", "from\ta\t3", "step\ta\t4"]
    journal += ["killed\tanywhere\t", "from\ta\t4", "step\ta\t5"]
    _count_recomputed(kills, journal)
    assert [kill.recomputed for kill in kills] == [4, 0]


def test_a_campaign_goes_on_with_chains_that_ended_well_and_keeps_to_one_commit(tmp_path) -> None:
    kills = [Kill("data", "shards", "0.bin", True, False)]
    Outcome("data", 1, "abc", kills, "", 2, 1).write(tmp_path)
    Outcome("6a", 1, "abc", [], "weights", 2, 1).write(tmp_path)
    [(key, found)] = outcomes(tmp_path, "abc").items()
    assert key == ("data", 1)
    assert found.kills == kills
    with pytest.raises(SystemExit, match="holds results of abc, the code is def"):
        outcomes(tmp_path, "def")


def test_two_hundred_kills_are_enough_with_a_share_in_every_place() -> None:
    kills = [Kill("c", place, "", False, True) for place in PLACES for _ in range(30)]
    assert enough(kills, 200)
    assert not enough(kills, 211)
    assert not enough([kill for kill in kills if kill.place != "store"] + kills[:30], 200)
    for kill in kills[:61]:
        kill.after_checkpoint = False
    assert not enough(kills, 200)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/o/artifacts/.work/transformer-1f/.newest.ckpt.12-0123abcd.tmp", "checkpoint"),
        ("/o/artifacts/shards/.9e.12-0123abcd.tmp/.shards.12-0123abcd.tmp/test/a.tokens.bin", "shards"),
        ("/o/artifacts/mla_7d/.9e.12-0123abcd.tmp/memory/store/generation-000001/keys.npy", "store"),
        ("/o/artifacts/.work/mla_7d-1f/memory/settings.json", "store"),
        ("/o/runs/eval/2026/.report.html.12-0123abcd.tmp", "report"),
        ("/o/runs/eval/2026/manifest.json", "manifest"),
        ("/o/runs/eval/2026/tensorboard/transformer/events.out", None),
        ("/o/artifacts/.work/transformer-1f/choices.json", None),
    ],
)
def test_a_place_is_told_by_the_path_that_is_written(path, place) -> None:
    assert place_of(path) == place


def test_a_kill_comes_where_and_when_it_was_asked_for(tmp_path) -> None:
    """In a process of its own: it dies at the second file, with half of it on disk, and has noted so."""
    code = """
import os, sys
from tests.reliability.moments import Moment, Moments
moments = Moments(Moment("tokenizer", 3, True, "journal"))
os.fsync, os.replace = moments._around_sync(os.fsync), moments._around_rename(os.replace)
from nano_think import files
for number in range(9):
    files.atomic_write(f"artifacts/tokenizer/x/{number}", "0123456789")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == -9
    word, place, path = (tmp_path / "journal").read_text().splitlines()[-1].split("\t")
    assert (word, place) == ("killed", "tokenizer")
    folder = tmp_path / "artifacts" / "tokenizer" / "x"
    assert not (folder / "0").exists() or (folder / "0").read_text() == "0123456789"
    assert Path(path).read_text() == "01234"
