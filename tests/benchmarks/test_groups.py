"""Every group runs at the sizes of a test, gates included; formulas against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import io
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console

import benchmarks.__main__ as command
from benchmarks.harness.case import GateError, Options
from benchmarks.harness.discover import group_files, load_group
from benchmarks.harness.measure import measure, pass_gates
from benchmarks.harness.memory import peaks_of
from benchmarks.harness.process import prepare
from benchmarks.harness.report import show
from benchmarks.peers import language_models, state_space_models
from nano_think.artifacts.build import build
from nano_think.artifacts.checkpoint import save_fused

GROUPS = sorted(group_files())


@pytest.fixture(autouse=True)
def same_process_settings() -> object:
    """A benchmark sets threads and precision of the whole process; other tests must not see it."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(before[0])
    torch.set_float32_matmul_precision(before[1])


@pytest.mark.parametrize("name", GROUPS)
def test_a_quick_run_passes_its_gates_and_fills_its_tables(name: str) -> None:
    prepare(threads=1)
    measured = measure(load_group(name, Options(quick=True)), 1, quick=True, say=lambda line: None)
    console = Console(file=io.StringIO(), width=140)
    show(measured, console)
    assert all(case.name in console.file.getvalue() for case in measured.group.cases)


@pytest.mark.parametrize("name", GROUPS)
def test_names_are_the_same_at_every_size(name: str) -> None:
    """Peak memory is taken at larger sizes, of the case with the same name."""
    usual, large = load_group(name, Options()), load_group(name, Options(large=True))
    assert [case.name for case in usual.cases] == [case.name for case in large.cases]


def test_training_flops_are_those_of_the_formula_by_hand() -> None:
    size = language_models.Size()
    parameters = 6 * (4 * 384 * 384 + 3 * 384 * 1536) + 32_000 * 384
    assert parameters == 26_443_776
    assert size.flops == 8 * 512 * (6 * parameters + 6 * 6 * 384 * 512)


def test_matmul_parameters_are_those_of_the_models() -> None:
    """All matrices of the peer, tied head once; ours has the adaptor of its entry besides."""
    size = language_models.Size(2, 16, 2, 32, 50, 2, 8)
    counted = (size.flops / size.tokens - 6 * 2 * 16 * 8) / 6
    llama = language_models.llama(size)
    assert sum(p.numel() for p in llama.parameters() if p.ndim > 1) == counted
    own = sum(p.numel() for p in language_models.ours(size).parameters() if p.ndim > 1)
    assert own == counted + 16 * 16


def test_state_space_flops_are_those_of_the_formula_by_hand() -> None:
    size = state_space_models.Size(length=1)
    projections = 384 * 1536 + 768 * (24 + 32) + 24 * 768 + 768 * 384
    assert size.flops == 3 * 6 * (2 * projections + 768 * (2 * 4 + 6 * 16))


def test_state_space_matrices_are_those_of_the_model() -> None:
    size = state_space_models.Size(num_layers=2, d_model=16, d_state=4, length=1)
    model, _ = state_space_models.mamba(size)
    names = ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight")
    weights = sum(p.numel() for name, p in model.named_parameters() if name.endswith(names))
    assert size.flops == 3 * (2 * weights + 2 * size.d_inner * (2 * 4 + 6 * 4))


def test_a_wrong_peer_is_caught_by_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(size: language_models.Size) -> language_models.LanguageModel:
        model = llama(size)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "v_proj" in name).mul_(1.1)
        return model

    llama = language_models.BUILDERS["HF Llama"]
    monkeypatch.setitem(language_models.BUILDERS, "HF Llama", broken)
    with pytest.raises(GateError, match="HF Llama fp32 is wrong, so nothing was timed"):
        pass_gates(load_group("train", Options(quick=True)), say=lambda line: None)


def test_a_peer_that_is_not_installed_is_a_named_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("benchmarks.train", "benchmarks.state_space", "benchmarks.scan"):
        monkeypatch.setattr(f"{module}.installed", lambda name: False)
    for name in ("train", "state_space", "scan"):
        group = load_group(name, Options(quick=True))
        assert all(missing.why.startswith("pip install") for missing in group.missing)
        assert all("nano_think" in case.name for case in group.cases)
    assert "litgpt bf16" in {missing.name for missing in load_group("train", Options()).missing}


def test_compiled_cases_are_there_when_asked_for() -> None:
    names = [case.name for case in load_group("train", Options(quick=True, compiled=True)).cases]
    assert "nano_think bf16 compiled" in names
    decoding = [case.name for case in load_group("decode", Options(quick=True, compiled=True)).cases]
    assert "compiled fp32" in decoding
    assert len(set(names)) == len(names)


def test_peak_memory_of_a_case_comes_from_its_own_process() -> None:
    (line,) = peaks_of("attention", ["nano_think fp32"], threads=1, quick=True, kept=False).values()
    assert 50 < line["before_mb"] <= line["peak_mb"] < 2000
    with pytest.raises(RuntimeError, match="memory of nobody could not be measured"):
        peaks_of("attention", ["nobody"], threads=1, quick=True, kept=False)


def test_the_command_lists_runs_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    assert set(GROUPS) <= set(capsys.readouterr().out.split())
    assert command.main(["attention", "--quick", "--only", "*fp32", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"attention.json", "attention.md", "attention.png"}
    assert "nano_think bf16" not in (tmp_path / "attention.json").read_text()
    assert "| nano_think fp32 |" in (tmp_path / "attention.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and its groups would run")
@pytest.mark.parametrize("name", ["gpu_decode", "gpu_scan", "gpu_train"])
def test_a_group_that_cannot_run_here_says_why_and_writes_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([name, "--out", str(tmp_path)]) == 0
    assert "torch finds no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_does_not_exist() -> None:
    with pytest.raises(SystemExit, match="there is no benchmark group 'nothing'"):
        command.main(["nothing", "--quick"])
    with pytest.raises(SystemExit, match="no case fits"):
        command.main(["attention", "--quick", "--only", "zebra"])


def test_the_command_fails_with_a_gate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong() -> None:
        raise GateError("off by one")

    group = load_group("attention", Options(quick=True))
    broken = dataclasses.replace(group, cases=[dataclasses.replace(c, check=wrong) for c in group.cases])
    monkeypatch.setattr(command, "load_group", lambda name, options: broken)
    assert command.main(["attention", "--quick"]) == 1
    assert "off by one" in capsys.readouterr().out


def test_kept_memory_is_asked_for_or_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.process.keep_memory", lambda: False)
    with pytest.warns(UserWarning, match="no mallopt"):
        prepare(1, kept=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(1)


def test_latency_of_a_checkpoint_is_named_by_its_hash(tmp_path: Path, byte_tokenizer) -> None:
    part = "nano_think.experts"
    sizes = {"d_model": 32, "num_layers": 2, "dropout": 0.0}
    experts = {
        "transformer": {"_target_": f"{part}.transformer.TransformerExpert", "num_heads": 2, "ffn_dim": 64},
        "state_space": {"_target_": f"{part}.state_space.StateSpaceExpert", "d_inner": 48, "d_state": 4},
    }
    spec = {"_target_": "nano_think.model.NanoThink", "vocab_size": 259, "d_model": 32}
    spec["experts"] = {name: expert | sizes for name, expert in experts.items()}
    save_fused(tmp_path, spec, build(spec), byte_tokenizer, 64)
    (tmp_path / "provenance.json").write_text('{"kind": "mla_7c", "hash": "0123abcd", "needs": {}}')
    options = Options(quick=True, checkpoint=tmp_path)
    measured = measure(load_group("latency", options), 1, quick=True, say=lambda line: None)
    assert "checkpoint fused 0123abcd on " in measured.group.title
    assert "part: state_space" in {case.name for case in measured.group.cases}
    figures = measured.derived()
    seconds = measured.seconds("part: router")[0]
    assert figures["part: router: ms"] == pytest.approx(1e3 * seconds / 4)
    with pytest.raises(SystemExit, match="too few to time"):
        load_group("latency", Options(checkpoint=tmp_path))
