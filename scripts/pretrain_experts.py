"""Pre-train one expert: `python scripts/pretrain_experts.py --expert transformer size=tiny`.

The same as `python train.py phase=expert expert=transformer size=tiny`; everything after --expert is handed on.
"""

from __future__ import annotations

import argparse

from hydra_call import become


def main() -> None:
    """Translate --expert, hand on the rest."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--expert", required=True, help="transformer, diffuser, state_space or all")
    known, overrides = parser.parse_known_args()
    become(["phase=expert", f"expert={known.expert}", *overrides])


if __name__ == "__main__":
    main()
