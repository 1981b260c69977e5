"""What a fit settles by measurement on the machine it runs on: once, so that a resumed fit goes on with it.

Choices are no part of a recipe: how a machine computes a thing fastest does not make it another artefact. They lie
beside the newest state of the fit, in the manifest of every run that worked on it and in the provenance of what
came out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nano_think.errors import UserError, brief
from nano_think.files import read_json, write_json

FILE = "choices.json"


class Choices:
    """Names and plain values, kept in `folder` from the moment each is made.

    reuse: start with what an earlier start of the same fit left there; without it, everything is chosen again.
    """

    def __init__(self, folder: Path, reuse: bool = True) -> None:
        self.path = folder / FILE
        known = reuse and self.path.is_file()
        self.made: dict[str, Any] = self._read() if known else {}

    def _read(self) -> dict[str, Any]:
        try:
            made = read_json(self.path)
            if not isinstance(made, dict):
                raise ValueError("no mapping")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path} is damaged ({brief(error)}): delete its folder, and the same command begins anew"
            ) from error
        return made

    def choose(self, name: str, decide: Callable[[], Any]) -> Any:
        """The value of `name`, decided now unless it was before."""
        if name not in self.made:
            self.made[name] = decide()
            write_json(self.path, self.made)
        return self.made[name]
