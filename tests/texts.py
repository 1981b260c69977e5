"""A small corpus that is the same wherever it is written."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = (
    "the",
    "old",
    "river",
    "bends",
    "past",
    "seven",
    "quiet",
    "mills",
    "where",
    "nobody",
    "grinds",
    "corn",
)


def write_texts(folder: Path) -> Path:
    """FOLDER/<domain>/part.jsonl of two domains, about 90 KB: a short fit passes over it more than once."""
    rng = random.Random(0)
    for domain, words in {"prose": WORDS, "lists": [f"item {n};" for n in range(40)]}.items():
        (folder / domain).mkdir(parents=True)
        with open(folder / domain / "part.jsonl", "w", encoding="utf-8") as file:
            for number in range(150):
                text = " ".join(rng.choice(words) for _ in range(rng.randint(20, 90)))
                file.write(json.dumps({"text": f"{number}: {text}."}) + "\n")
    return folder
