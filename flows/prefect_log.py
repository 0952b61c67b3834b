"""What Prefect's log says of a failure: the reason, and not where Prefect was when it heard of it."""

from __future__ import annotations

import logging

from artifacts.errors import PosttrainError

_LOGS = ("prefect.flow_runs", "prefect.task_runs")
_SAID_BEFORE = "Engine execution exited with unexpected exception"


def keep_failures_short() -> None:
    """Errors of ours name row, field and what to do; Prefect would put three tracebacks of its own around each."""
    for name in _LOGS:
        logging.getLogger(name).addFilter(_short)  # the same one again is none


def _short(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, PosttrainError):
        return True
    record.exc_info = None
    return record.msg != _SAID_BEFORE
