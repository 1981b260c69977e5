"""What a machine has measured of itself, remembered from run to run."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nano_think.files import write_json
from nano_think.ops.native import BuildError, cache_folder


def remembered(key: str, measure: Callable[[], Any], memory: Path | None = None) -> Any:
    """The plain value that `measure` gave for `key` the first time, so that two runs agree to the bit.

    memory: folder of such values, that of the user's cache by default. Where it cannot be written, as for a user
    without a home, each run measures anew.
    """
    try:
        path = (memory or cache_folder() / "measured") / f"{key}.json"
    except BuildError:
        return measure()
    with suppress(OSError):
        return json.loads(path.read_text())
    value = measure()
    with suppress(OSError):
        write_json(path, value)
    return value
