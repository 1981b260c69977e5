from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_think.data.normalize import fold, normalize


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


def test_fold_ignores_case_and_white_space_only():
    assert fold(" The\n\n CAT\tsat ") == fold("the cat sat") == "the cat sat"
    assert fold("the cat sat") != fold("the cat, sat")
