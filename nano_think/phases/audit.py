"""`phase=audit`: does the model keep the future to itself? A table, JSON, and an exit code that says so.

An audit is filed under the spec it was made of and under the code that made it, so that every evaluation of a
model of that spec finds it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import nano_think
from nano_think.artifacts.build import complete
from nano_think.artifacts.checkpoint import Checkpoint, load_checkpoint
from nano_think.errors import UserError
from nano_think.evals.audit.finding import Audit, Finding
from nano_think.evals.audit.live import filled_memory
from nano_think.evals.audit.plan import Plan
from nano_think.evals.audit.run import CHECKS, UNTRAINED, audit
from nano_think.evals.audit.twin import twin_of
from nano_think.evals.report import render_table
from nano_think.files import atomic_write, hash_bytes, write_json
from nano_think.model import ExpertLM, NanoThink
from nano_think.phases.parameters import configured_network, network_spec
from nano_think.phases.run import Maker, Run

RESULT = "audit.json"
BAD = ("fail", "vacuous")
# What a coarse copy of an audited model is asked again: its layers are others, its cache and memory are not.
COARSE = ("A1", "A5")


def run(run: Run) -> dict[str, Any]:
    """Audit the checkpoint of `ckpt=`, else an untrained network of the configuration.

    Raises UserError where a check failed or tested nothing; table and JSON are written before.
    """
    checkpoint = None if run.cfg.ckpt is None else load_checkpoint(run.cfg.ckpt)
    data = json.loads((run.obtain(audit_maker(run, checkpoint), named=True) / RESULT).read_text())
    found = Audit(data["subject"], tuple(Finding(**f) for f in data["findings"]))
    render_table(found.table(), run.console)
    atomic_write(run.dir / "audit.md", f"# Audit\n\n{found}\n")
    write_json(run.dir / RESULT, data)
    failed = [f for f in data["findings"] if f["verdict"] in BAD]
    if failed:
        named = "; ".join(f"{f['check']} {f['verdict']} ({f['component'] or f['note']})" for f in failed)
        raise UserError(f"the audit did not pass: {named}. All findings: {run.dir / 'audit.md'}")
    run.say(f"[bold green]the audit passed[/bold green]: {run.dir / 'audit.md'}")
    return {"passed": True, "report": str(run.dir / "audit.md")}


def require_or_mark(run: Run, checkpoint: Checkpoint) -> dict[str, Any]:
    """The audit beside which the losses of a checkpoint stand: `passed` and a `mark` to print with them.

    With audit=mark the checks that train are left out where no complete audit is on file: they take a minute.
    Raises UserError with audit=require unless the audit passed.
    """
    maker = audit_maker(run, checkpoint)
    if run.cfg.audit == "mark" and not maker.recipe.exists(run.artifacts):
        maker = audit_maker(run, checkpoint, UNTRAINED)
    if run.cfg.prerequisites == "require" and not maker.recipe.exists(run.artifacts):
        found: dict[str, Any] = {"passed": None, "mark": f"not audited: run `{maker.command}`"}
    else:
        data = json.loads((run.obtain(maker) / RESULT).read_text())
        wrong = [f"{f['check']} {f['verdict']}" for f in data["findings"] if f["verdict"] in BAD]
        mark = f"the leak audit did not pass ({', '.join(wrong)}): these losses mean nothing"
        checks = ", ".join(f["check"] for f in data["findings"])
        found = {"passed": data["passed"], "mark": f"leak audit passed: {checks}" if data["passed"] else mark}
    if run.cfg.audit == "require" and not found["passed"]:
        raise UserError(f"audit=require, but {checkpoint.path}: {found['mark']}")
    return found


def marked_quantized(run: Run, found: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """What `require_or_mark` found of a checkpoint, and whether its coarse twin lets a later token through too.

    `checkpoint` is the quantised one. Raises UserError with audit=require unless both passed.
    """
    plan = _plan(checkpoint.model, run.cfg.size.chunk)
    findings = audit(checkpoint.model, name=checkpoint.name, plan=plan, checks=COARSE).findings
    wrong = [f"{f.check} {f.verdict}" for f in findings if f.verdict in BAD]
    if not wrong:
        return {**found, "mark": f"{found['mark']}; of the quantised model: {', '.join(COARSE)}"}
    mark = (
        f"the leak audit of the quantised model did not pass ({', '.join(wrong)}): these losses mean nothing"
    )
    if run.cfg.audit == "require":
        raise UserError(f"audit=require, but {checkpoint.path}: {mark}")
    return {"passed": False, "mark": mark}


def audit_maker(run: Run, checkpoint: Checkpoint | None, checks: Sequence[str] = CHECKS) -> Maker:
    """How the audit of a spec is made."""
    spec = network_spec(run) if checkpoint is None else checkpoint.spec[_inside(checkpoint)]
    retrieval = run.plain(run.cfg.model.retrieval) if "experts" in spec else None
    choice = f"ckpt={checkpoint.path}" if checkpoint else f"expert={run.cfg.expert.name}"

    def build(path: Path) -> dict[str, Any]:
        model = checkpoint.model if checkpoint else untrained(run)
        name = checkpoint.name if checkpoint else run.cfg.expert.name
        found = _audit(run, model, spec, retrieval, name, checks)
        write_json(path / RESULT, found.data())
        return {"passed": found.passed}

    settings = {"network": complete(spec), "retrieval": retrieval, "checks": list(checks)}
    settings |= {"chunk": run.cfg.size.chunk, "code": code_hash()}
    return Maker("audit", settings, build, command=f"python train.py phase=audit {choice}")


def untrained(run: Run) -> ExpertLM | NanoThink:
    """The configured network with its initial weights."""
    with torch.random.fork_rng():
        torch.manual_seed(run.cfg.seed)
        return configured_network(run, "cpu")


def code_hash() -> str:
    """Hash of all Python and C++ sources of this package: another code needs another audit."""
    root = Path(nano_think.__file__).parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".cpp"))
    return hash_bytes(*(path.relative_to(root).as_posix().encode() + path.read_bytes() for path in files))


def _audit(
    run: Run,
    model: Any,
    spec: dict[str, Any],
    retrieval: dict[str, Any] | None,
    name: str,
    checks: Sequence[str],
) -> Audit:
    """All checks, each told as it is made."""
    chunk = retrieval["chunk"] if retrieval else run.cfg.size.chunk
    plan = _plan(model, chunk)
    memory = None
    if retrieval and retrieval["k"] and getattr(model.mla.attention, "slots", None) is not None:
        options = {key: value for key, value in retrieval.items() if key != "chunk"}
        memory = filled_memory(model.embedding.weight, chunk, **options)

    def tell(finding: Finding) -> None:
        run.say(f"  {finding.check:4}{finding.verdict:15}{finding.component or ''}")

    twin = twin_of(spec)
    return audit(model, name=name, plan=plan, retriever=memory, twin=twin, checks=checks, on_finding=tell)


def _plan(model: Any, chunk: int) -> Plan:
    return Plan(model.vocab_size, length=3 * chunk + 5, border=chunk)


def _inside(checkpoint: Checkpoint) -> str:
    return "model" if checkpoint.kind == "nano_think" else "expert"
