"""What is said of an exception that the user's code raised: its type, its message, and the line it came from."""

from __future__ import annotations

import traceback
from pathlib import PurePath

from stages.user_code.loading import is_users

_OURS = "stages"


def raised(error: BaseException, code: object) -> str:
    """`ZeroDivisionError: division by zero (rewards.py:2)`. The line is that of the innermost frame within the module
    of `code` (a function, a class or an instance of the user's, or the module's name); without one there is no place.
    """
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text + _place(error, code if isinstance(code, str) else _module_of(code))


def _module_of(code: object) -> str:
    return str(getattr(getattr(code, "func", code), "__module__", ""))  # `func`: of a partial


def _place(error: BaseException, module: str) -> str:
    """Empty for our own modules: a line of ours tells the user nothing."""
    if module.partition(".")[0] == _OURS and not is_users(module):
        return ""
    lines = [
        f" ({PurePath(frame.f_code.co_filename).name}:{number})"
        for frame, number in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == module
    ]
    return lines[-1] if lines else ""
