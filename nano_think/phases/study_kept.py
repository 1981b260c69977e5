"""A record that is already there: its seeds are kept, wherever they were measured, the others are run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nano_think.errors import UserError
from nano_think.evals.study_record import StudyRecord
from nano_think.phases.study_measure import losses_maker
from nano_think.phases.study_plan import Plan
from nano_think.phases.study_tuning import Trial


class Kept:
    """What the folder of a study holds before it is run.

    record: None where there is none yet.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.record = StudyRecord.load(out) if (out / "study.json").is_file() else None

    def trials(self, settings: dict[str, Any]) -> list[Trial]:
        """The tuning of the record, which is everybody's; empty where it has none.

        settings: of the study that is asked for, as its record would hold them.
        Raises UserError if the record is of a study with other settings.
        """
        if self.record is None:
            return []
        there = self.record.facts.get("settings", {})
        names = sorted((there.keys() | settings.keys()) - {"seeds"})
        if other := [name for name in names if there.get(name) != settings.get(name)]:
            said = ", ".join(f"{name}={there.get(name)} and not {settings.get(name)}" for name in other)
            raise UserError(f"{self.out} holds the record of another study ({said}): {self._way_out}")
        return [Trial(**trial) for trial in self.record.facts["tuning"]]

    def seeds(self, plans: Sequence[Plan]) -> list[int]:
        """The seeds among `plans` that need not be run: the record has them, and they were not made here.

        Raises UserError if the record trained something else for a seed than its plan says.
        """
        return [plan.seed for plan in plans if self._holds(plan)]

    def _holds(self, plan: Plan) -> bool:
        if self.record is None or plan.seed not in self.record.seeds:
            return False
        if losses_maker(plan, "test").recipe.exists(plan.run.artifacts):
            return False
        fits = self.record.seeds[plan.seed]["fits"]
        made = {key: maker.recipe.hash for key, maker in plan.trained.items() if "fit" in maker.spec}
        if other := [key for key, hashed in made.items() if fits.get(key, {}).get("hash") != hashed]:
            said = ", ".join(other)
            raise UserError(
                f"{self.out} holds a seed {plan.seed} whose {said} came of other settings or other text than "
                f"this command's: {self._way_out}"
            )
        return True

    @property
    def _way_out(self) -> str:
        return "give another folder with study.out=, or the settings that it was made with"
