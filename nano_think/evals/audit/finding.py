"""What a check of the audit found, and all findings together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nano_think.evals.report import Table, plain

Verdict = Literal["pass", "fail", "vacuous", "not applicable"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    verdict: `pass`; `fail`; `vacuous`, where the path to be tested carried no signal at all, so that a leak in
        it could not have shown (counts as a failure); or `not applicable`, with the reason in `note`.
    violation: largest difference that should have been zero, in the units of `note`; None where nothing was
        measured. position: index of the token at which it was seen. component: path of the module to blame.
    """

    check: str
    title: str
    verdict: Verdict
    violation: float | None = None
    position: int | None = None
    component: str | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        """Neither a failure nor a test of nothing."""
        return self.verdict in ("pass", "not applicable")


@dataclass(frozen=True)
class Audit:
    """All findings about one model.

    subject: what was audited. replaced: parameters that were constant and hold noise in the audited copy.
    """

    subject: str
    findings: tuple[Finding, ...]
    replaced: tuple[str, ...] = ()
    setting: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """No check failed and none was vacuous."""
        return all(finding.passed for finding in self.findings)

    def __getitem__(self, check: str) -> Finding:
        """The finding of a check, for instance "A1"."""
        return next(finding for finding in self.findings if finding.check == check)

    def failures(self) -> list[Finding]:
        """Findings that are failures or vacuous."""
        return [finding for finding in self.findings if not finding.passed]

    def table(self) -> Table:
        """One row a check."""
        headers = ["check", "what must hold", "verdict", "violation", "position", "to blame", "note"]
        rows = [
            [f.check, f.title, f.verdict, f.violation, f.position, f.component, f.note] for f in self.findings
        ]
        return Table(
            headers, rows, align=list("lllrrll"), formats=["", "", "", ".2g", "", "", ""], title=self.subject
        )

    def data(self) -> dict[str, Any]:
        """The findings as JSON data."""
        return {"passed": self.passed, **plain(self)}

    def __str__(self) -> str:
        return self.table().markdown()
