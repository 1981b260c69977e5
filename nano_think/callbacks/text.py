"""Where text is logged: the run folder's own file, and TensorBoard's text panel where that is the logger."""

from __future__ import annotations

import re
from pathlib import Path

import lightning as L

from nano_think.files import atomic_write

FILE = "texts.md"
_HEADING = re.compile(rb"^### .*, step (\d+)\n\n```\n", re.MULTILINE)
_END = b"\n```\n\n"


def log_text(trainer: L.Trainer, tag: str, text: str) -> None:
    """Append `text` to <logs>/texts.md under its tag and step; fenced, so that it is shown as it is.

    In TensorBoard it stands where Lightning puts the scalars of the same validation.
    """
    block = f"### {tag}, step {trainer.global_step}\n\n```\n{text}\n```\n\n"
    for logger in trainer.loggers:
        if logger.save_dir and Path(logger.save_dir).is_dir():
            with open(Path(logger.save_dir) / FILE, "a", encoding="utf-8") as file:
                file.write(block)
        add_text = getattr(logger.experiment, "add_text", None)
        if add_text is not None:
            add_text(tag, f"```\n{text}\n```", trainer.fit_loop.epoch_loop._batches_that_stepped)


def forget_texts(folder: Path, after: int) -> None:
    """Cut what <folder>/texts.md says of steps after `after`, and what a kill left unfinished at its end."""
    path = folder / FILE
    if not path.is_file():
        return
    texts = path.read_bytes()
    later = (heading.start() for heading in _HEADING.finditer(texts) if int(heading[1]) > after)
    kept = texts[: next(later, len(texts))]
    kept = kept[: kept.rfind(_END) + len(_END)] if _END in kept else b""
    if kept != texts:
        atomic_write(path, kept)
