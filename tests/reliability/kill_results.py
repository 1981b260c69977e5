"""What came of chains of kills, kept a file a chain, so that a campaign goes on where it was stopped."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

PLACES = ("checkpoint", "shards", "store", "report", "validation", "last step", "anywhere")


@dataclass
class Kill:
    """One kill: in which chain and place, whether that run had saved a state before, and what was lost."""

    chain: str
    place: str
    path: str
    cold: bool
    after_checkpoint: bool
    recomputed: int = 0


@dataclass
class Outcome:
    """A chain that came to its end.

    commit: of the code. trouble: what differs from the undisturbed run, empty where nothing does. seconds: of the
    wall; cpu: of all its processes.
    """

    chain: str
    seed: int
    commit: str
    kills: list[Kill]
    trouble: str
    seconds: int
    cpu: int

    @staticmethod
    def path(out: Path, chain: str, seed: int) -> Path:
        """Where it is kept."""
        return out / f"{chain}-{seed}.json"

    @classmethod
    def read(cls, path: Path) -> Outcome:
        """Of its file."""
        content = json.loads(path.read_text())
        return cls(**{**content, "kills": [Kill(**kill) for kill in content["kills"]]})

    def write(self, out: Path) -> None:
        """Into its file, which is there whole or not at all."""
        path = self.path(out, self.chain, self.seed)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n")
        part.rename(path)

    def line(self) -> str:
        """What came of it."""
        end = self.trouble or "equal to the undisturbed run"
        spent = f"{self.cpu} CPU s, {self.seconds} s"
        return f"{self.chain}, seed {self.seed}: {len(self.kills)} kills, {end} ({spent})"


def outcomes(out: Path, commit: str) -> dict[tuple[str, int], Outcome]:
    """Of chains that ended well, by name and seed. Ends the process where other code made one of `out`."""
    found = [Outcome.read(path) for path in sorted(out.glob("*.json"))]
    others = {outcome.commit for outcome in found} - {commit}
    if others:
        sys.exit(
            f"{out} holds results of {', '.join(sorted(others))}, the code is {commit}: name another --out"
        )
    return {(outcome.chain, outcome.seed): outcome for outcome in found if not outcome.trouble}


def table(kills: list[Kill], by: str) -> str:
    """One row a place or a chain, in Markdown."""
    first = "killed in" if by == "place" else by
    lines = [
        f"| {first} | kills | after the first checkpoint | steps done again, at most |",
        "|---|---:|---:|---:|",
    ]
    names = list(dict.fromkeys(getattr(kill, by) for kill in kills))
    for name in [*names, None]:
        chosen = [kill for kill in kills if name in (None, getattr(kill, by))]
        after = sum(kill.after_checkpoint for kill in chosen)
        worst = max((kill.recomputed for kill in chosen), default=0)
        lines.append(f"| {name or 'all'} | {len(chosen)} | {after} | {worst} |")
    return "\n".join(lines)


def enough(kills: list[Kill], wanted: int) -> bool:
    """Whether there were as many kills as asked for, most after a first checkpoint, each place with its share."""
    counts = Counter(kill.place for kill in kills)
    after = sum(kill.after_checkpoint for kill in kills)
    return len(kills) >= wanted and after >= 0.75 * wanted and all(counts[place] >= 10 for place in PLACES)
