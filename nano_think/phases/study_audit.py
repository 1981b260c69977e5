"""The leak audit of a study's mixture: the losses of a model that reads later tokens mean nothing."""

from __future__ import annotations

import json
from typing import Any

from nano_think.artifacts.checkpoint import load_checkpoint
from nano_think.phases.audit import RESULT, audit_maker, require_or_mark
from nano_think.phases.study_plan import Plan


def audited(plan: Plan) -> dict[str, Any]:
    """All checks of the mixture after its last stage, memory included: what 7b and 7c are is a part of it.

    An audit is of a network's settings and of this code, so one is enough for all seeds.

    Returns:
        passed, mark (one line), and findings: check, title and verdict of each.

    Raises UserError with audit=require unless it passed.
    """
    run, maker = plan.run, plan.trained[f"fused_{plan.stages[-1]}"]
    checkpoint = load_checkpoint(maker.recipe.path(run.artifacts), maker.command)
    folder = run.obtain(audit_maker(run, checkpoint), named=True)
    findings = json.loads((folder / RESULT).read_text(encoding="utf-8"))["findings"]
    kept = [{key: finding[key] for key in ("check", "title", "verdict")} for finding in findings]
    return {**require_or_mark(run, checkpoint), "findings": kept}
