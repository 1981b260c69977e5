"""Folders of JSON lines: `ROOT/<domain>/*.jsonl[.gz|.zst]`, one `{"text": ...}` a line, read as a stream."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nano_think.data.documents import Document
from nano_think.errors import UserError
from nano_think.files import hash_file, hash_json

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
LAYOUT = "ROOT/<domain>/*.jsonl[.gz|.zst], one JSON object with a text field a line"
_CHUNK = 1 << 20
_LINES_LOGGED = 20
_ZSTD_PIECE = 1 << 10
# Files of the corpus are named after domains, and file systems end at 255 bytes.
_DOMAIN_BYTES = 200
# How gzip and zstd files begin.
_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd")

logger = logging.getLogger(__name__)


class JsonlSource:
    """Documents from a folder of JSONL files; the name of the sub-folder is the domain.

    Besides the text a record may carry "source" and "id". Memory does not grow with the files: they are read
    in blocks of 1 MiB, and of a line above `max_line_bytes` only the length is kept. What JSON leaves open is read
    as Python does: of a key that comes twice the last counts, and NaN beside the text is no error.

    Args:
        root: folder with one sub-folder for each domain.
        on_error: what to do with a line that is broken, or with a name that is no file: "skip" (logged and
            counted) or "fatal".
        max_line_bytes: longest line in bytes that is read; a longer one counts as broken.
        text_key: name of the field with the text.

    Raises:
        UserError: if the folder is missing, unreadable or has not the layout above, or the name of a domain
            cannot be printed; while reading, if a line is broken and `on_error` is "fatal", or if there is no
            document at all.
    """

    def __init__(
        self,
        root: str | Path,
        on_error: str = "skip",
        max_line_bytes: int = 64 << 20,
        text_key: str = "text",
    ) -> None:
        if on_error not in ("skip", "fatal"):
            raise UserError(f"on_error={on_error!r} is unknown: use skip or fatal.")
        if max_line_bytes < 1:
            raise UserError(f"max_line_bytes={max_line_bytes} leaves no line to read: give at least 1.")
        self.root = Path(root)
        self.on_error = on_error
        self.max_line_bytes = max_line_bytes
        self.text_key = text_key
        self._files, self._odd = _find_files(self.root)
        self._skipped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Document]:
        self._skipped = Counter()
        found = False
        for path in self._odd:
            self._complain(self._name(path), 0, "a folder, a broken link or a device, and no file")
        for path in self._files:
            for document in self._read(path):
                found = True
                yield document
        if self._skipped:
            logger.warning("%s: %d broken lines skipped", self.root, self._skipped.total())
        if not found:
            raise UserError(f"No document in {self.root}: expected {LAYOUT}.")

    @property
    def text_bytes(self) -> int:
        """About that of all text: packed files hold some four times their size."""
        return sum(path.stat().st_size * (1 if path.suffix == ".jsonl" else 4) for path in self._files)

    def fingerprint(self) -> str:
        """Hex key over the names and contents of the files and the options that change what is read."""
        try:
            files = [[self._name(path), hash_file(path)] for path in self._files]
        except OSError as error:
            raise UserError(f"Cannot read {error.filename}: {error.strerror}.") from error
        return hash_json(["jsonl", files, self.text_key, self.max_line_bytes])

    def describe(self) -> dict[str, Any]:
        """Facts for the manifest; licences are for the owner of the folder to know."""
        domains = sorted({path.parent.name for path in self._files})
        return {
            "name": "jsonl",
            "domains": domains,
            "licences": dict.fromkeys(domains, "see the folder the text came from"),
            "synthetic": dict.fromkeys(domains, False),
            "files": [self._name(path) for path in self._files],
        }

    def skipped(self) -> dict[str, Any]:
        """Number of broken lines of the latest iteration, in total and by file."""
        return {"malformed_lines": self._skipped.total(), "by_file": dict(sorted(self._skipped.items()))}

    def _name(self, path: Path) -> str:
        return _printable(path.relative_to(self.root).as_posix())

    def _read(self, path: Path) -> Iterator[Document]:
        domain, name = path.parent.name, self._name(path)
        number = 0
        try:
            with _open(path) as stream:
                for number, line in _lines(stream, self.max_line_bytes):
                    if number == 1 and isinstance(line, bytes) and line.startswith(_COMPRESSED):
                        self._complain(
                            name, 1, "compressed, file not read: its name should end in .gz or .zst"
                        )
                        return
                    document = self._parse(line, number, domain, name)
                    if document is not None:
                        yield document
        except (EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise UserError(f"Cannot read {self.root / name}: {error.strerror}.") from error
            self._complain(name, number + 1, f"damaged compressed data ({error}), rest of the file not read")

    def _parse(self, line: bytes | int, number: int, domain: str, name: str) -> Document | None:
        if isinstance(line, int):
            self._complain(name, number, f"{line} bytes long, above max_line_bytes={self.max_line_bytes}")
            return None
        if not line.strip():
            return None
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            text = record[self.text_key]
            # JSON can spell half of a surrogate pair, which is no character.
            text.encode()
        except UnicodeError:
            reason = "not valid UTF-8"
        except (ValueError, RecursionError):
            reason = "not valid JSON"
        except (KeyError, TypeError, IndexError):
            reason = f"no field {self.text_key!r}"
        except AttributeError:
            reason = f"field {self.text_key!r} is not a string"
        else:
            return Document(
                text=text,
                domain=domain,
                source=_label(record.get("source")) or f"jsonl:{name}",
                id=_label(record.get("id")) or f"{name}:{number}",
            )
        self._complain(name, number, reason)
        return None

    def _complain(self, name: str, number: int, reason: str) -> None:
        message = f"{self.root / name}:{number}: {reason}"
        if self.on_error == "fatal":
            raise UserError(f"{message}; mend the line or set data.on_error=skip.")
        self._skipped[name] += 1
        if self._skipped.total() <= _LINES_LOGGED:
            logger.warning("%s; skipped", message)


def _label(value: Any) -> str:
    """A source or an id as text that can be written, "" where there is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    return str(value).encode(errors="replace").decode()


def _printable(name: str) -> str:
    """A name of the file system in characters that can be written and stay on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _find_files(root: Path) -> tuple[list[Path], list[Path]]:
    """Files below the domains, and what is named like one and is none."""
    if not root.is_dir():
        raise UserError(f"Data folder {root} does not exist: expected {LAYOUT}.")
    try:
        folders = [f for f in sorted(root.iterdir()) if f.is_dir() and not f.name.startswith(".")]
        named = [path for f in folders for path in sorted(f.iterdir()) if path.name.endswith(SUFFIXES)]
        files = [path for path in named if path.is_file()]
    except OSError as error:
        raise UserError(f"Cannot read {error.filename}: {error.strerror}.") from error
    if not files:
        raise UserError(f"No data file in {root}: expected {LAYOUT}.")
    for domain in {path.parent.name for path in files}:
        if not domain.isprintable() or len(domain.encode()) > _DOMAIN_BYTES:
            raise UserError(
                f"The folder {_printable(domain)} in {root} cannot name a domain: use printable characters, "
                f"at most {_DOMAIN_BYTES} bytes."
            )
    return files, sorted(set(named).difference(files))


def _open(path: Path) -> BinaryIO:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.name.endswith(".zst"):
        return _ZstdReader(path)  # type: ignore[return-value]
    return open(path, "rb")


class _ZstdReader:
    """Reads the frames of a zstd file; unlike the library's own reader it notices when the last one is cut off.

    A piece of 1 KiB holds 256 blocks at most, and a block 128 KiB of text: however well a file is packed, reading
    it takes no more than 32 MiB.
    """

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f"Reading {path} needs zstandard: pip install zstandard.") from error
        self._file = open(path, "rb")  # noqa: SIM115 (closed by __exit__)
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._pending = b""

    def __enter__(self) -> _ZstdReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        """Return the next decompressed bytes, whatever their number, or b"" at the end."""
        while True:
            raw = self._pending or self._file.read(min(size, _ZSTD_PIECE))
            if not raw:
                if self._frame is not None:
                    raise EOFError("the last frame is cut off")
                return b""
            self._frame = self._frame or self._new_frame()
            try:
                block = self._frame.decompress(raw)
            except self._error as error:
                raise EOFError(str(error)) from error
            self._pending = b""
            if self._frame.eof:
                self._pending, self._frame = self._frame.unused_data, None
            if block:
                return block


def _lines(stream: BinaryIO, limit: int) -> Iterator[tuple[int, bytes | int]]:
    """Yield (line number, line without its end), or (line number, length) for a line above `limit` bytes."""
    number, length, parts = 1, 0, []
    while chunk := stream.read(_CHUNK):
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            length += end - start
            parts.append(chunk[start:end])
            yield number, b"".join(parts) if length <= limit else length
            number, length, parts, start = number + 1, 0, [], end + 1
        length += len(chunk) - start
        parts = [*parts, chunk[start:]] if length <= limit else []
    if length:
        yield number, b"".join(parts) if length <= limit else length
