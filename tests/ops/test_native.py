"""Building a kernel on first use: once, by whoever comes first, with words for what is missing."""

from __future__ import annotations

import ctypes
import multiprocessing
from pathlib import Path

import pytest

from nano_think.ops import native
from nano_think.ops.native import BuildError, build, find_compiler

SOURCE = Path(native.__file__).with_name("selective_scan.cpp")

try:
    find_compiler()
except BuildError as error:
    pytest.skip(f"nothing can be compiled: {error}", allow_module_level=True)


def test_builds_once_a_folder(tmp_path: Path) -> None:
    path = build(SOURCE, tmp_path)
    before = path.stat().st_mtime_ns
    assert build(SOURCE, tmp_path) == path
    assert path.stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_build_into_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build, args=(SOURCE, tmp_path)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert ctypes.CDLL(str(build(SOURCE, tmp_path))).scan_chunk() > 0
    assert len(list(tmp_path.iterdir())) == 1


def test_other_source_gets_another_name(tmp_path: Path) -> None:
    first = build(SOURCE, tmp_path)
    for path in native.sources(SOURCE):
        (tmp_path / path.name).write_text(path.read_text())
    copy = tmp_path / "selective_scan.cpp"
    copy.write_text(SOURCE.read_text() + "// changed\n")
    assert build(copy, tmp_path) != first


def test_a_changed_header_gets_another_name(tmp_path: Path) -> None:
    (tmp_path / "deep.h").write_text("inline int number() { return 1; }\n")
    (tmp_path / "near.h").write_text('#include "deep.h"\n#include <cmath>\n')
    source = tmp_path / "source.cpp"
    source.write_text('#include "near.h"\nextern "C" int answer() { return number(); }\n')
    assert {path.name for path in native.sources(source)} == {"source.cpp", "near.h", "deep.h"}
    first = build(source, tmp_path / "cache")
    (tmp_path / "deep.h").write_text("inline int number() { return 2; }\n")
    second = build(source, tmp_path / "cache")
    assert [ctypes.CDLL(str(path)).answer() for path in (first, second)] == [1, 2]


def test_a_build_failure_names_the_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("this is no C++;\n")
    with pytest.raises(BuildError, match="failed"):
        build(broken, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_missing_compiler_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match="install g\\+\\+ or set CXX"):
        build(SOURCE, tmp_path)


def test_a_compiler_without_openmp_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = tmp_path / "cxx"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *-fopenmp*) echo no OpenMP >&2; exit 1;; esac\nexec {find_compiler()} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    assert build(SOURCE, tmp_path / "cache").exists()


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.cache_folder() == tmp_path / "nano_think"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(BuildError, match="set XDG_CACHE_HOME"):
        native.load(SOURCE)


def test_a_compiler_may_complain_in_any_encoding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrapper = tmp_path / "cxx"
    wrapper.write_bytes(b"#!/bin/sh\nprintf 'g\xe9n\xe9ral' >&2\nexit 1\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    with pytest.raises(BuildError, match=r"g.n.ral"):
        build(SOURCE, tmp_path / "cache")
