from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nano_think.nn.mixers.s6 import S6
from nano_think.ops.selective_scan import BACKEND_VARIABLE, choose_backend
from nano_think.phases.choices import Choices
from nano_think.phases.scan_backend import choose_scan, chosen_scan

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)


def model() -> nn.ModuleList:
    return nn.ModuleList([S6(8, d_state=2), S6(8, d_state=2, backend="ref"), nn.Linear(2, 2)])


def test_the_first_start_chooses_and_a_resumed_one_keeps(tmp_path: Path) -> None:
    choose_scan(model(), Choices(tmp_path), CPU, "32-true")
    best = choose_backend("auto", CPU, torch.float32)
    assert Choices(tmp_path).made == {"scan": best}

    Choices(tmp_path, reuse=False).choose("scan", lambda: "torch")  # as a machine without a compiler had it
    resumed = Choices(tmp_path)
    choose_scan(model(), resumed, CPU, "32-true")
    stack, said = model(), []
    with chosen_scan(stack, resumed.made["scan"], CPU, "32-true", said.append):
        assert [mixer.backend for mixer in stack[:2]] == ["torch", "ref"]
    assert [mixer.backend for mixer in stack[:2]] == ["auto", "ref"]
    assert not said


def test_fp64_is_left_to_tensor_operations(tmp_path: Path) -> None:
    choices = Choices(tmp_path)
    choose_scan(model(), choices, CPU, "64-true")
    assert choices.made == {"scan": "torch"}


def test_a_model_without_scans_chooses_nothing(tmp_path: Path) -> None:
    choices = Choices(tmp_path)
    choose_scan(nn.Linear(2, 2), choices, CPU, "32-true")
    assert not choices.made
    with chosen_scan(nn.Linear(2, 2), choices.made.get("scan"), CPU, "32-true", pytest.fail):
        pass


def test_a_backend_that_is_gone_is_said_and_auto_decides() -> None:
    stack, said = model(), []
    with chosen_scan(stack, "triton", CPU, "32-true", said.append):
        assert stack[0].backend == "auto"
    assert len(said) == 1
    assert "began with another selective scan" in said[0]
