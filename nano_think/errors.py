"""The one exception whose message is meant for the person at the keyboard."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend: shown as one line without a traceback, so the message says what to do."""
