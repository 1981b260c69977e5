"""Code, libraries and machine that a result comes from."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from nano_think import __version__


def versions() -> dict[str, Any]:
    """Code, libraries and machine, for manifests."""
    packages = {name: metadata.version(name) for name in ("torch", "lightning", "hydra-core", "tiktoken")}
    return {
        "nano_think": __version__,
        "commit": _commit(),
        "python": sys.version.split()[0],
        "packages": packages,
        "machine": f"{platform.machine()}, {processor()}",
    }


def _commit() -> str | None:
    """The commit of the code, None outside a checkout and without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() or None


def processor() -> str:
    """Number and name of the processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
