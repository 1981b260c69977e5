"""One canonical form of a text, so that equal texts are equal byte for byte."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_LINE_END = re.compile("\r\n|\r|\x85|\u2028|\u2029")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# From the first blank of a run only, and without a second try of a shorter run: a megabyte of blanks is read once.
_TRAILING_BLANKS = re.compile("(?<![ \t\u00a0])[ \t\u00a0]++$", re.MULTILINE)
# Characters that canonical decomposition turns into more than one mark.
_SEVERAL_MARKS = re.compile("[\u0344\u0f73\u0f75\u0f81]")
_MAX_MARKS = 30
_GRAPHEME_JOINER = "\u034f"


def normalize(text: str, domain: str) -> str:
    """Return `text` in NFC with LF line ends, no trailing blanks and no control characters but LF and tab.

    In the domain "code" only NFC is applied: there blanks, form feeds and line ends belong to the program.
    Of more than 30 combining marks in a row every 30 are followed by U+034F, which cannot be seen: the Stream-Safe
    Text Format of Unicode (UAX #15, section 13). Applying the function twice changes nothing more.
    """
    if domain == "code":
        return _composed(text)
    text = _CONTROL.sub("", _LINE_END.sub("\n", text))
    # After the control characters: one of them may have stood between a letter and its accent.
    return _TRAILING_BLANKS.sub("", _composed(text))


def _composed(text: str) -> str:
    """NFC in linear time: it sorts the marks that follow each other, and sorts long runs of them very slowly."""
    if text.isascii():
        return text
    text = _SEVERAL_MARKS.sub(lambda match: unicodedata.normalize("NFD", match[0]), text)
    text = _many_marks().sub(r"\g<0>" + _GRAPHEME_JOINER, text)
    return unicodedata.normalize("NFC", text)


@lru_cache
def _many_marks() -> re.Pattern[str]:
    """As many combining marks as may stand together, with another one behind them."""
    marks = "".join(chr(code) for code in range(0x300, 0x110000) if unicodedata.combining(chr(code)))
    return re.compile(f"[{marks}]{{{_MAX_MARKS}}}(?=[{marks}])")


def fold(text: str) -> str:
    """Return the form under which two texts count as exact copies: lower case, white space joined."""
    return " ".join(text.lower().split())
