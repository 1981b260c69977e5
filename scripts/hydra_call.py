"""What the alias scripts share: show the call of train.py that they stand for, and become it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def become(overrides: list[str]) -> NoReturn:
    """Print `python train.py ...` and replace this process by it."""
    print(f"= python train.py {shlex.join(overrides)}", file=sys.stderr, flush=True)
    os.execv(sys.executable, [sys.executable, str(TRAIN), *overrides])
