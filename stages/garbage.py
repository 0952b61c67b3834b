"""How often a stage's process looks for garbage: seldom while it starts. A million objects are made by the imports of
torch and transformers and stay; to go through them again and again took a fifth of the start."""

from __future__ import annotations

import gc

_SELDOM = 100_000
_USUAL = gc.get_threshold()[0]


def look_seldom() -> None:
    """From the start of a process until `look_as_usual`: after so many new objects. Never would be too late for stages
    that import nothing large and read many rows."""
    gc.set_threshold(_SELDOM)


def look_as_usual() -> None:
    """Once all is imported, which stays and is not looked at any more. Does nothing in a process that has not begun
    with `look_seldom`."""
    if gc.get_threshold()[0] == _SELDOM:
        gc.freeze()
        gc.set_threshold(_USUAL)
