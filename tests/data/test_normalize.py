from __future__ import annotations

import unicodedata
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_think.data.normalize import fold, normalize
from tests.reliability.mutations import patience


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("end  \t\nnext \u00a0\nlast ", "end\nnext\nlast"),
        ("bell\x07 null\x00 form\x0cfeed \x1b[0m tab\tkept", "bell null formfeed [0m tab\tkept"),
        ("cafe\u0301", "caf\u00e9"),
        # An accent behind a control character meets its letter once the control character is gone.
        ("cafe\x00\u0301", "caf\u00e9"),
        ("  indent\n\n\nblank lines", "  indent\n\n\nblank lines"),
    ],
)
def test_prose_gets_its_canonical_form(raw, expected):
    assert normalize(raw, "general") == expected


def test_code_keeps_everything_but_the_unicode_form():
    raw = "x = 1  \r\n\x0c# cafe\u0301\n"
    assert normalize(raw, "code") == "x = 1  \r\n\x0c# caf\u00e9\n"


@given(st.text(), st.sampled_from(["general", "code"]))
def test_normalising_twice_changes_nothing(text, domain):
    once = normalize(text, domain)
    assert normalize(once, domain) == once
    assert unicodedata.is_normalized("NFC", once)


MARKS = "\u0301\u0323\u05b0\u0344\u0f73\u0f72\u0340"


@given(
    st.text(alphabet=st.sampled_from(MARKS + "a\u00e9\uac00 "), max_size=200),
    st.sampled_from(["general", "code"]),
)
def test_runs_of_marks_are_broken_once_and_keep_their_marks(text, domain):
    text += "\u0301\u0323" * (3 * len(text))
    once = normalize(text, domain)
    assert normalize(once, domain) == once
    assert unicodedata.is_normalized("NFC", once)
    apart = unicodedata.normalize("NFD", once)
    runs = ["".join(run) for mark, run in groupby(apart, lambda c: unicodedata.combining(c) > 0) if mark]
    assert max(map(len, runs), default=0) <= 31  # thirty, and one that a letter brings along
    kept = sorted(unicodedata.normalize("NFD", text).replace(" ", ""))
    assert sorted(apart.replace("\u034f", "").replace(" ", "")) == kept


def test_thirty_marks_stay_together_and_more_are_parted():
    for marks, joiners in ((30, 0), (31, 1), (60, 1), (61, 2)):
        text = "x" + "\u0323" * marks
        assert normalize(text, "general") == normalize(text, "code")
        assert normalize(text, "general").count("\u034f") == joiners
        assert normalize(text, "general").replace("\u034f", "") == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    "run", [" ", "\t", "\u0301\u0323", "\u0f73", "\u0344", "\x00", "\r", "a", "e\u0301", "\u2028"]
)
def test_a_run_of_anything_takes_linear_time(run):
    text = run * (400_000 // len(run)) + "x"
    with patience(60):  # quadratic time would be half an hour
        assert normalize(text, "general").endswith("x")
        assert normalize(text, "code").endswith("x")
        assert fold(text).endswith("x")


def test_fold_ignores_case_and_white_space_only():
    assert fold(" The\n\n CAT\tsat ") == fold("the cat sat") == "the cat sat"
    assert fold("the cat sat") != fold("the cat, sat")
