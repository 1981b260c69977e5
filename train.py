"""The one entry point: `python train.py phase=mla expert=all size=small`, see README.md and `--help`."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from nano_think.config import checked_overrides, register_schema
from nano_think.errors import UserError
from nano_think.phases.run import run_phase

ROOT = Path(__file__).resolve().parent


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def _job(cfg: DictConfig) -> float | None:
    try:
        return run_phase(cfg)
    except UserError as error:
        sys.exit(f"error: {error}")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            sys.exit(f"error: {error.__cause__}")
        raise
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from the newest saved step")


def main() -> None:
    """Check what was typed, then let Hydra compose and run it."""
    try:
        arguments = checked_overrides(sys.argv[1:], ROOT)
    except UserError as error:
        sys.exit(f"error: {error}")
    register_schema()
    sys.argv = [sys.argv[0], "--config-dir", str(ROOT), *arguments]
    _job()


if __name__ == "__main__":
    main()
