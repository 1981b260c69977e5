"""`phase=pipeline`: everything from text to report in one command."""

from __future__ import annotations

from typing import Any

from nano_think.phases import evaluate, mla
from nano_think.phases.run import Run


def run(run: Run) -> dict[str, Any]:
    """Phases 1 to 7 by need, then phase 8."""
    made = mla.run(run)
    if run.ranks.follows:
        return made
    return {**made, **evaluate.run(run, ckpt=made["checkpoint"])}
