"""Time and memory of a command with its child processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.command import measure_command

ROOT = Path(__file__).resolve().parents[2]
HOLD = "import time; held = bytearray(150_000_000); held[::4096] = b'x' * len(held[::4096])"
CHILD = f"{HOLD}; time.sleep(1)"
PARENT = f"{HOLD}; import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"


def test_memory_of_parent_and_child_is_added_and_the_largest_named() -> None:
    measured = measure_command(["-c", PARENT])
    assert 1 < measured["wall_s"] < 60
    if sys.platform == "linux":
        assert 150 < measured["largest_mb"] < 200
        assert 300 < measured["together_mb"] < 400


def test_cpu_time_is_that_of_the_command() -> None:
    burn = "import time\nwhile time.process_time() < 1: pass"
    assert 0.9 < measure_command(["-c", burn])["cpu_s"] < 5


def test_a_command_that_fails_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="ended with status 3"):
        measure_command(["-c", "raise SystemExit(3)"])


def test_the_result_is_a_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.harness.command", "nothing", "--out", str(tmp_path)]
    subprocess.run([*command, "--", "-c", "pass"], cwd=ROOT, check=True, timeout=120)
    result = json.loads((tmp_path / "nothing.json").read_text())
    assert result["command"] == ["python", "-c", "pass"]
    assert {"wall_s", "cpu_s", "largest_mb", "machine"} <= result.keys()
