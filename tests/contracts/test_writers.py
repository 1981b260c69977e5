"""Files appear whole: who writes one otherwise than through nano_think/files.py is listed, with why it may."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = {
    "np.save", "np.savez", "np.savez_compressed", "np.memmap", "torch.save", "torch.export.save",
    "torch.from_file", "save_file", "save_model", "json.dump", "pickle.dump", "yaml.dump", "OmegaConf.save",
    "os.open", "os.rename", "os.replace", "os.link", "os.symlink", "os.truncate", "shutil.copy", "shutil.copy2",
    "shutil.copyfile", "shutil.copytree", "shutil.move", "shutil.unpack_archive", "SummaryWriter",
    "sqlite3.connect",
    "tempfile.TemporaryFile", "tempfile.NamedTemporaryFile", "tempfile.TemporaryDirectory", "tempfile.mkstemp",
    "tempfile.mkdtemp", "zipfile.ZipFile", "tarfile.open", "gzip.open", "faiss.write_index",
}  # fmt: skip
METHODS = (
    ".write_text", ".write_bytes", ".touch", ".tofile", ".savefig", ".rename", ".symlink_to", ".hardlink_to",
    ".save_checkpoint", ".to_csv", ".to_json", ".to_parquet", ".add_custom_scalars",
)  # fmt: skip

FOLDER, MEMORY = "into a folder that atomic_dir lets appear whole", "into memory, for atomic_write"
LOG, NAMELESS = "a log, mended when its fit goes on", "a file or folder without a name that stays"
LISTED = {
    "callbacks/newest.py NewestState._save: trainer.save_checkpoint": "through StagedCheckpointIO or the strategy",
    "callbacks/newest.py StagedCheckpointIO.save_checkpoint: torch.save": MEMORY,
    "callbacks/text.py log_text: open": LOG,
    "data/prepare.py _write_records: open": FOLDER,
    "data/prepare.py prepare_corpus: (directory / 'leakage.md').write_text": FOLDER,
    "data/prepare.py prepare_corpus: tempfile.TemporaryFile": NAMELESS,
    "data/shards.py _write_stream: np.save": FOLDER,
    "data/shards.py _write_stream: open": FOLDER,
    "data/workers.py _Worker.call: pickle.dump": "into a pipe",
    "data/workers.py serve: pickle.dump": "into a pipe",
    "engine/compiled.py export_step: torch.export.save": MEMORY,
    "engine/render.py TokenPrinter._put: os.open": "the null device",
    "evals/losses.py DocumentLosses.save: np.savez_compressed": MEMORY,
    "evals/plots.py _save: figure.savefig": MEMORY,
    "evals/study_record.py StudyLosses.to_bytes: np.savez_compressed": MEMORY,
    "generations.py new_generation: (folder / 'manifest.json').write_text": FOLDER,
    "ops/native.py build: tempfile.TemporaryDirectory": NAMELESS,
    "phases/journal.py Journal._set_aside: (self.folder / name).rename": "a whole folder of a job that is done",
    "phases/logs.py continue_logs: shutil.copytree": "logs; copied again unless all of them were",
    "phases/memory.py forget_peak: Path('/proc/self/clear_refs').write_text": "to the kernel",
    "phases/ranks.py launch: tempfile.TemporaryFile": NAMELESS,
    "phases/run.py Run.publish: shutil.copytree": FOLDER,
    "phases/study_fits.py _make: open": LOG,
    "tasks/expert_cache.py ExpertCache._allocate: torch.from_file": NAMELESS,
    "vector_index.py FlatIndex.save: np.save": FOLDER,
    "vector_index.py IVFIndex.save: np.save": FOLDER,
    "vector_index.py TorchIndex.save: np.save": FOLDER,
    "vector_store.py VectorStore.save: np.save": FOLDER,
    "vector_store.py VectorStore.save: np.savez": FOLDER,
}  # fmt: skip


def writes_in(source: str) -> Iterator[str]:
    """`<function>: <call>` of every call that can write a file."""

    def visit(node: ast.AST, function: str) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}".lstrip(".")
        if isinstance(node, ast.Call) and can_write(node):
            yield f"{function}: {ast.unparse(node.func)}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(ast.parse(source), "")


def can_write(call: ast.Call) -> bool:
    """Whether a call is one of the writers above and does not state that it reads, or opens for writing."""
    name = ast.unparse(call.func)
    given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    modes = [node.value for node in given if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    modes = [mode for mode in modes if mode and set(mode) <= set("rwaxbt+")]
    reads = any(not set(mode) & set("wax+") for mode in modes)
    if name == "open":
        return not reads and len(given) > 1
    if name.endswith(".open") and name not in FUNCTIONS:
        return bool(modes) and not reads
    if name == "zipfile.ZipFile":
        return not reads and len(given) > 1
    return (name in FUNCTIONS or name.endswith(METHODS)) and not reads


def found() -> set[str]:
    """Of the whole package but files.py, and of train.py."""
    package = ROOT / "nano_think"
    files = {
        str(path.relative_to(package)): path for path in package.rglob("*.py") if path.name != "files.py"
    }
    files["train.py"] = ROOT / "train.py"
    return {f"{name} {place}" for name, path in files.items() for place in writes_in(path.read_text())}


def test_every_other_writer_is_known() -> None:
    assert found() - LISTED.keys() == set(), (
        "write through nano_think/files.py, or list it with why it need not"
    )
    assert LISTED.keys() - found() == set(), "gone: take it off the list"


@pytest.mark.parametrize(
    ("line", "writes"),
    [
        ("open(path)", False),
        ("open(path, 'rb')", False),
        ("open(path, encoding='utf-8')", False),
        ("open(path, 'w', encoding='utf-8')", True),
        ("open(path, mode)", True),
        ("path.open('a')", True),
        ("path.open(mode='r+b')", True),
        ("path.open()", False),
        ("archive.open('name')", False),
        ("zipfile.ZipFile(path)", False),
        ("zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED)", True),
        ("np.memmap(path, dtype=kind, mode='r')", False),
        ("np.memmap(path, dtype=kind)", True),
        ("(folder / 'x').write_bytes(data)", True),
        ("torch.save(state, path)", True),
        ("os.replace(a, b)", True),
        ("name.replace('a', 'b')", False),
    ],
)
def test_writers_are_told_from_readers(line: str, writes: bool) -> None:
    assert bool(list(writes_in(line))) == writes
