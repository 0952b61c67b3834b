"""Whether a stage that failed would fail again for the same reason."""

from __future__ import annotations

from artifacts.errors import StageError

OF_VALUES = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, SyntaxError, FileNotFoundError)
"""What wrong rows, settings and functions raise. Time limits, connections and disks raise others, which may pass."""


def fails_again(error: BaseException) -> bool:
    """Of a StageError: whether it, and all that it was raised from, is of what the stage was given, and not of a
    server, a clock or a machine. False of all else: nobody knows."""
    if not isinstance(error, StageError):
        return False
    found: BaseException | None = error
    while found is not None:
        if found.may_pass if isinstance(found, StageError) else not isinstance(found, OF_VALUES):
            return False
        found = found.__cause__
    return True
