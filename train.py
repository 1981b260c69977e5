"""The one entry point: `python train.py phase=mla expert=all size=small`, see README.md and `--help`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig

from nano_think.config import checked_overrides, register_schema
from nano_think.errors import UserError
from nano_think.phases import sweep
from nano_think.phases.resume import continued
from nano_think.phases.run import run_phase

ROOT = Path(__file__).resolve().parent


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def _job(cfg: DictConfig) -> float | None:
    try:
        sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
        return sweep.run_job(cfg) if sweeping else run_phase(cfg)
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
    follows = int(os.environ.get("RANK", "0")) > 0
    try:
        arguments = checked_overrides(sys.argv[1:], ROOT)
        if not follows:
            arguments = continued(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")
    register_schema()
    if follows:  # Hydra keeps no folder for a process that writes none
        arguments += ["hydra.run.dir=${run.root}", "hydra.output_subdir=null"]
    sys.argv = [sys.argv[0], "--config-dir", str(ROOT), *arguments]
    try:
        _job()
    finally:
        failed = sweep.close()
    if failed:
        sys.exit(f"error: {failed}")


if __name__ == "__main__":
    main()
