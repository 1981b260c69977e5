from __future__ import annotations

import json

import pytest

from nano_think.phases.choices import FILE, Choices


def _never():
    pytest.fail("a choice that was made is made again")


def test_a_choice_is_made_once_and_outlives_the_process(tmp_path):
    assert Choices(tmp_path / "work").choose("precision", lambda: "bf16-mixed") == "bf16-mixed"
    again = Choices(tmp_path / "work")
    assert again.choose("precision", _never) == "bf16-mixed"
    assert again.choose("scan", lambda: "cpp") == "cpp"
    assert Choices(tmp_path / "work").made == {"precision": "bf16-mixed", "scan": "cpp"}


def test_a_fresh_start_chooses_again(tmp_path):
    Choices(tmp_path).choose("precision", lambda: "bf16-mixed")
    assert Choices(tmp_path, reuse=False).choose("precision", lambda: "32-true") == "32-true"
    assert json.loads((tmp_path / FILE).read_text()) == {"precision": "32-true"}
