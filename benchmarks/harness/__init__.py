"""What all benchmark groups share: cases, rounds, peaks, statistics, reports."""

from benchmarks.harness.case import Case, Group, Missing, Options, close
from benchmarks.harness.statistics import Measured

__all__ = ["Case", "Group", "Measured", "Missing", "Options", "close"]
