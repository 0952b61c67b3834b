"""Syntax trees while other threads make some: CPython before 3.11.8 and 3.12.2 may refuse what is well.

Its `ast` kept how deep it was in one place for all threads (CPython issue 106905). Prefect's threads work while a
scheduled run imports stages, whose fields pydantic reads the meaning of with `ast`; once in many nights both met.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

MISMATCH = "AST constructor recursion depth mismatch"
TRIES = 5

Made = TypeVar("Made")


def again_where_threads_met(make: Callable[[], Made]) -> Made:
    """What `make` gives, which is asked again where it raised this SystemError, and of no other."""
    for _ in range(TRIES - 1):
        try:
            return make()
        except SystemError as error:
            if MISMATCH not in str(error):
                raise
    return make()
