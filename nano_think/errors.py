"""The one exception whose message is meant for the person at the keyboard."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend: shown as one line without a traceback, so the message says what to do."""


def brief(said: object, longest: int = 200) -> str:
    """An error or a name as part of one sentence: its first line, without what a terminal would obey."""
    line = next(iter(str(said).splitlines()), "") or type(said).__name__
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return shown if len(shown) <= longest else f"{shown[:longest]}..."
