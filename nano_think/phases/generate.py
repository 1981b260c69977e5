"""`phase=generate`: continue a prompt with the model that the settings name, or with the one of `ckpt=`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from nano_think.artifacts.checkpoint import Checkpoint, load_checkpoint
from nano_think.artifacts.memory import mark_of
from nano_think.engine.render import AS_TERMINAL
from nano_think.engine.sampling import SamplingConfig
from nano_think.engine.session import Session, continue_text, read_prompt, save_continuations, session_folder
from nano_think.errors import UserError
from nano_think.nn.quantized import Kind
from nano_think.phases.expert import expert_maker
from nano_think.phases.mla import last_stage, mla_maker
from nano_think.phases.run import Run


def model_of(run: Run, ckpt: str | None = None) -> Checkpoint:
    """The checkpoint of `ckpt` or of `ckpt=`, else the model of `expert=` and `stage=`, built if it is missing."""
    single = len(run.cfg.expert.names) == 1
    command = run.command(phase="expert" if single else "mla", expert=run.cfg.expert.name)
    ckpt = ckpt or run.cfg.ckpt
    if ckpt is not None:
        return load_checkpoint(Path(ckpt), command)
    if single:
        name = run.cfg.expert.names[0]
        maker = expert_maker(run.sub("expert", name), name)
    else:
        maker = mla_maker(run.sub("mla"), last_stage(run))
    return load_checkpoint(run.obtain(maker), command)


def run(run: Run) -> dict[str, Any]:
    """Stream the continuation to the terminal, write tokens and weights as JSON.

    Both carry the mark of a model that reads later tokens, unless such a model cannot generate at all.
    """
    settings = run.plain(run.cfg.generate)
    try:
        config = SamplingConfig(
            temperature=settings["temperature"],
            top_k=settings["top_k"],
            top_p=settings["top_p"],
            seed=run.cfg.seed,
        )
        if settings["max_new_tokens"] < 1:
            raise ValueError(f"max_new_tokens={settings['max_new_tokens']} must be at least 1")
        if settings["color"] not in AS_TERMINAL:
            raise ValueError(f"color={settings['color']} is not known: {', '.join(AS_TERMINAL)}")
    except (ValueError, TypeError) as error:
        raise UserError(f"generate: {error}") from error
    prompt = read_prompt(run.cfg.prompt, run.cfg.prompt_file, sys.stdin)
    name = run.cfg.memory.session
    if name is None and run.cfg.memory.reset:
        raise UserError("memory.reset=true starts a session anew: name it by memory.session=")
    folder = None if name is None else session_folder(run.root / "sessions", name)
    quantize: Kind | None = None if run.cfg.quantize == "none" else run.cfg.quantize
    checkpoint = model_of(run)
    session = None if folder is None else Session(checkpoint, name, folder, reset=run.cfg.memory.reset)
    marked = mark_of(checkpoint)
    if marked:
        run.say(f"[bold]{marked}[/bold]")
    try:
        how = {"quantize": quantize, "color": settings["color"]}
        made = continue_text(
            checkpoint, prompt, settings["max_new_tokens"], config, session, sys.stdout, **how
        )
    except ValueError as error:
        if not marked:
            raise
        raise UserError(f"{checkpoint.path} cannot generate: {error}") from error
    if made.context_full:
        run.say(f"[dim]stopped at the end of the context of {checkpoint.spec['seq_len']} tokens[/dim]")
    if session is not None:
        run.say(f"[dim]session {session.name}: {session.own_records} records of its own[/dim]")
    path = run.dir / "generation.json"
    save_continuations(path, [made], marked)
    notes = {"mark": marked} if marked else {}
    notes |= {"quantize": quantize} if quantize else {}
    return {"checkpoint": str(checkpoint.path), "json": str(path), "text": made.text, **notes}
