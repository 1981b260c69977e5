"""What a machine remembers of itself."""

from __future__ import annotations

import pytest

from nano_think.ops.native import BuildError
from nano_think.phases import measured
from nano_think.phases.measured import remembered


def test_a_value_is_measured_once(tmp_path):
    values = iter([1.5, 2.5])
    assert [remembered("a", lambda: next(values), tmp_path) for _ in range(3)] == [1.5] * 3
    assert remembered("b", lambda: next(values), tmp_path) == 2.5


def test_where_nothing_can_be_kept_each_run_measures(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way of a folder")
    assert [remembered("a", lambda: 1.5, tmp_path / "file" / "below") for _ in range(2)] == [1.5] * 2

    def homeless():
        raise BuildError("there is no home folder")

    monkeypatch.setattr(measured, "cache_folder", homeless)
    assert remembered("a", lambda: [1, "x"]) == [1, "x"]


def test_a_failed_measurement_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        remembered("a", lambda: 1 / 0, tmp_path)
    assert list(tmp_path.iterdir()) == []
