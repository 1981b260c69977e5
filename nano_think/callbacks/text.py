"""Where text is logged: the run folder's own file, and TensorBoard's text panel where that is the logger."""

from __future__ import annotations

from pathlib import Path

import lightning as L


def log_text(trainer: L.Trainer, tag: str, text: str) -> None:
    """Append `text` to <logs>/texts.md under its tag and step; fenced, so that it is shown as it is."""
    block = f"### {tag}, step {trainer.global_step}\n\n```\n{text}\n```\n\n"
    for logger in trainer.loggers:
        if logger.save_dir and Path(logger.save_dir).is_dir():
            with open(Path(logger.save_dir) / "texts.md", "a", encoding="utf-8") as file:
                file.write(block)
        add_text = getattr(logger.experiment, "add_text", None)
        if add_text is not None:
            add_text(tag, f"```\n{text}\n```", trainer.global_step)
