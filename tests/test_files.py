from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nano_think import files


def refuse(*_: object) -> None:
    raise OSError("disk gone")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_text_and_bytes_into_new_folders(tmp_path) -> None:
    target = tmp_path / "a" / "b.txt"
    files.atomic_write(target, "é\n")
    assert target.read_bytes() == "é\n".encode()
    files.atomic_write(str(target), b"\x00\xff")
    assert target.read_bytes() == b"\x00\xff"
    assert names(target.parent) == ["b.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_at_any_step_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch, step) -> None:
    target = tmp_path / "x"
    files.atomic_write(target, "old")
    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(OSError, match="disk gone"):
        files.atomic_write(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["x"]


def run_and_die(folder: Path, step: str, code: str) -> None:
    """Run `code` in a process that is killed without any clean-up when it calls os.<step>."""
    script = f"import os\nfrom nano_think import files\nos.{step} = lambda *a: os._exit(9)\n{code}"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env={**os.environ, "PYTHONPATH": ROOT}
    )
    assert result.returncode == 9


ROOT = str(Path(__file__).resolve().parent.parent)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_killed_process_leaves_the_old_file(tmp_path, step) -> None:
    files.atomic_write(tmp_path / "x", "old")
    run_and_die(tmp_path, step, "files.atomic_write('x', 'new' * 1000)")
    assert (tmp_path / "x").read_text() == "old"


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_killed_process_leaves_no_folder(tmp_path, step) -> None:
    code = "with files.atomic_dir('d') as new: (new / 'x').write_text('half')"
    run_and_die(tmp_path, step, code)
    assert not (tmp_path / "d").exists()
    with files.atomic_dir(tmp_path / "d") as new:
        (new / "x").write_text("whole")
    assert (tmp_path / "d" / "x").read_text() == "whole"


def test_folder_appears_complete_or_not_at_all(tmp_path) -> None:
    target = tmp_path / "deep" / "d"
    with files.atomic_dir(target) as new:
        (new / "sub").mkdir()
        (new / "sub" / "x").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "x").read_text() == "1"
    assert names(target.parent) == ["d"]


def test_folder_whose_block_fails_never_appears(tmp_path) -> None:
    def build() -> None:
        with files.atomic_dir(tmp_path / "e") as new:
            (new / "x").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build()
    assert names(tmp_path) == []


def test_folder_that_cannot_be_renamed_raises_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="disk gone"), files.atomic_dir(tmp_path / "d") as new:
        (new / "x").write_text("1")
    assert names(tmp_path) == []


def test_first_of_two_builders_of_a_folder_wins(tmp_path) -> None:
    with files.atomic_dir(tmp_path / "d") as slow:
        (slow / "x").write_text("slow")
        with files.atomic_dir(tmp_path / "d") as fast:
            (fast / "x").write_text("fast")
    assert (tmp_path / "d" / "x").read_text() == "fast"
    assert names(tmp_path) == ["d"]


def test_builder_whose_work_was_removed_is_told(tmp_path) -> None:
    with pytest.raises(OSError), files.atomic_dir(tmp_path / "d") as new:
        shutil.rmtree(new)


def test_json_is_readable_text(tmp_path) -> None:
    value = {"b": [1, 2.5], "a": "é"}
    files.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == value
    assert text.index('"b"') < text.index('"a"')
    assert "é" in text
    assert text.endswith("}\n")


def test_hashes_see_borders_and_content_but_not_key_order(tmp_path) -> None:
    assert files.hash_bytes(b"ab", b"c") != files.hash_bytes(b"a", b"bc")
    assert files.hash_bytes(b"") != files.hash_bytes()
    assert files.hash_json({"a": 1, "b": 2}) == files.hash_json({"b": 2, "a": 1})
    assert files.hash_json({"a": 1}) != files.hash_json({"a": 2})
    big = tmp_path / "big"
    big.write_bytes(bytes(3 << 20))
    changed = tmp_path / "changed"
    changed.write_bytes(bytes((3 << 20) - 1) + b"\x01")
    assert files.hash_file(big) != files.hash_file(changed)
    assert files.hash_file(big) == files.hash_file(str(big))
    assert len(files.hash_file(big)) == len(files.hash_bytes(b"x")) == 32


def test_one_has_a_lock_at_a_time_and_the_file_is_gone_afterwards(tmp_path) -> None:
    """Handles of one process exclude each other as those of several do; no waiter takes a removed file's lock."""
    path, inside, most, waited = tmp_path / "locks" / "x.lock", [], [], []

    def work(number: int) -> None:
        for _ in range(25):
            with files.locked(path, lambda: waited.append(number)):
                inside.append(number)
                most.append(len(inside))
                time.sleep(0.0002)
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 100
    assert waited
    assert names(path.parent) == []


def test_a_lock_can_be_given_up_at_once_and_ends_with_its_process(tmp_path) -> None:
    path = tmp_path / "x.lock"
    code = "import sys, os, signal; from nano_think.files import locked\n"
    code += "with locked(sys.argv[1]):\n    os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert path.exists()
    gone = pytest.raises(OSError, match="disk gone")
    with files.locked(path, refuse), gone, files.locked(path, refuse):
        pytest.fail("two have the lock")


LOCKED = """
import sys, time
from nano_think import files
with files.atomic_dir('d') as new:
    (new / 'x').write_text('half')
    staged = files.StagedFile('f', 'half')
    print('writing', flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path):
    """A process in the midst of writing a folder and a file; it ends with its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOCKED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ROOT},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.communicate()


def test_what_a_killed_process_left_is_removed_and_nothing_of_a_living_one(tmp_path, writer) -> None:
    half = names(tmp_path)
    assert len(half) == 2
    assert all(name.endswith(".tmp") for name in half)
    (tmp_path / "mine.tmp").write_text("a user's")
    assert files.remove_abandoned(tmp_path) == 0
    assert names(tmp_path) == sorted([*half, "mine.tmp"])
    writer.kill()
    writer.wait()
    assert files.remove_abandoned(tmp_path) == 2
    assert names(tmp_path) == ["mine.tmp"]


def test_a_forked_worker_does_not_keep_the_lock_of_its_parent(tmp_path) -> None:
    """Workers of a loader outlive a killed trainer by seconds."""
    script = """
import os, time
from nano_think import files
with files.atomic_dir('d') as new, files.sole_owner('.') as alone:
    assert alone
    if os.fork() == 0:
        print('forked', flush=True)
        time.sleep(600)
    os.wait()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ROOT},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"forked\n"
    try:
        with files.sole_owner(tmp_path) as alone:
            assert not alone
        process.kill()
        process.wait()
        with files.sole_owner(tmp_path) as alone:
            assert alone
        assert files.remove_abandoned(tmp_path) == 1
    finally:
        os.killpg(process.pid, 9)


def test_file_then_name_then_folder_reach_the_disk_in_this_order(tmp_path, monkeypatch) -> None:
    order = []
    fsync, replace = os.fsync, os.replace

    def noted_sync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        order.append("folder" if path.is_dir() else "content")
        fsync(handle)

    def noted_replace(source: Path, target: Path) -> None:
        order.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    files.atomic_write(tmp_path / "x", "new")
    assert order == ["content", "name", "folder"]
    order.clear()
    files.atomic_write(tmp_path / "a" / "b" / "x", "new")
    assert order == ["folder", "folder", "content", "name", "folder"]


def test_a_full_disk_at_any_write_keeps_the_old_file_and_names_it(tmp_path, monkeypatch) -> None:
    """ENOSPC may come from making a name, writing, syncing or renaming."""
    full = OSError(errno.ENOSPC, "No space left on device")
    for place in ((files.Path, "touch"), (files.Path, "write_bytes"), (os, "fsync"), (os, "replace")):
        files.atomic_write(tmp_path / "x", "old")

        def refuse(*_: object) -> None:
            raise full

        with monkeypatch.context() as patch:
            patch.setattr(*place, refuse)
            with pytest.raises(OSError) as caught:
                files.atomic_write(tmp_path / "x", "new")
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(tmp_path / "x")
        assert (tmp_path / "x").read_text() == "old"
        assert names(tmp_path) == ["x"]
    files.atomic_write(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "new"


def test_a_state_that_is_staged_appears_only_when_published(tmp_path) -> None:
    first = files.StagedFile(tmp_path / "x", b"first")
    assert not (tmp_path / "x").exists()
    first.publish()
    second = files.StagedFile(tmp_path / "x", memoryview(b"second"))
    assert (tmp_path / "x").read_bytes() == b"first"
    second.discard()
    assert (tmp_path / "x").read_bytes() == b"first"
    assert names(tmp_path) == ["x"]


def test_a_folder_that_is_replaced_is_the_old_one_or_the_new_one(tmp_path) -> None:
    for text in ("old", "new"):
        with files.atomic_dir(tmp_path / "d", replace=True) as new:
            (new / f"{text}.txt").write_text(text)
    assert names(tmp_path) == ["d"]
    assert names(tmp_path / "d") == ["new.txt"]


@pytest.mark.parametrize("count", range(1, 8))
def test_a_kill_at_any_step_of_replacing_leaves_no_half_of_a_folder(tmp_path, count) -> None:
    """Whole, or for a moment not there; what the kill left is gone after the next start."""
    code = f"""
import shutil
left = {count}
def counted(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if not left:
            os._exit(9)
        return function(*arguments, **options)
    return call
os.rename, os.fsync, os.unlink = counted(os.rename), counted(FSYNC), counted(os.unlink)
with files.atomic_dir('d', replace=True) as new:
    (new / 'a').write_text('new'); (new / 'b').write_text('new')
os._exit(9)
"""
    with files.atomic_dir(tmp_path / "d") as new:
        for name in "ab":
            (new / name).write_text("old")
    run_and_die(tmp_path, "chroot", code.replace("FSYNC", "lambda handle: None"))
    files.remove_abandoned(tmp_path)
    assert names(tmp_path) in ([], ["d"])
    if (tmp_path / "d").exists():
        assert names(tmp_path / "d") == ["a", "b"]
        assert len({(tmp_path / "d" / name).read_text() for name in "ab"}) == 1


def test_a_removed_folder_is_never_half_there(tmp_path, monkeypatch) -> None:
    with files.atomic_dir(tmp_path / "d") as new:
        (new / "x").write_text("1")
    seen = []
    rmtree = shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **options: (seen.append(path), rmtree(path, **options))
    )
    files.remove_dir(tmp_path / "d")
    files.remove_dir(tmp_path / "never there")
    assert seen[0] != tmp_path / "d"
    assert names(tmp_path) == []
