"""One canonical form of a text, so that equal texts are equal byte for byte."""

from __future__ import annotations

import re
import unicodedata

_LINE_END = re.compile("\r\n|\r|\x85|\u2028|\u2029")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_TRAILING_BLANKS = re.compile("[ \t\u00a0]+$", re.MULTILINE)


def normalize(text: str, domain: str) -> str:
    """Return `text` in NFC with LF line ends, no trailing blanks and no control characters but LF and tab.

    In the domain "code" only NFC is applied: there blanks, form feeds and line ends belong to the program.
    Applying the function twice changes nothing more.
    """
    if domain == "code":
        return unicodedata.normalize("NFC", text)
    text = _CONTROL.sub("", _LINE_END.sub("\n", text))
    # After the control characters: one of them may have stood between a letter and its accent.
    text = unicodedata.normalize("NFC", text)
    return _TRAILING_BLANKS.sub("", text)


def fold(text: str) -> str:
    """Return the form under which two texts count as exact copies: lower case, white space joined."""
    return " ".join(text.lower().split())
