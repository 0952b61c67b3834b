"""What a person would notice in a run's curves: what happened, at which step, and what to do.

Pure functions of the rows of `metrics.jsonl`, so that a running stage, a resumed one and the report say the same.
"""

from stages.monitors.history import FEW, History, Monitor
from stages.monitors.rows import UNTRAINED
from stages.monitors.watch import MONITORS, ROW_MONITORS, Notice, Watch, notices_of, notices_of_rows

__all__ = [
    "FEW",
    "MONITORS",
    "ROW_MONITORS",
    "UNTRAINED",
    "History",
    "Monitor",
    "Notice",
    "Watch",
    "notices_of",
    "notices_of_rows",
]
