"""Tools and environments as users write them, good and bad."""

from __future__ import annotations

import threading
from typing import Any

FOREVER = threading.Event()
"""Never set."""
CLOSED: list[str] = []
"""Words of the environments that were closed."""


def add(a: int, b: int) -> int:
    """The sum.

    Args:
        a: One number.
        b: The other.
    """
    return a + b


async def shout(text: str) -> str:
    """The text in capitals.

    Args:
        text: What to shout.
    """
    return text.upper()


def divide(a: int, b: int) -> dict[str, float]:
    """The quotient.

    Args:
        a: What is divided.
        b: By what.
    """
    return {"quotient": a / b}


def wait() -> str:
    """Never comes back."""
    FOREVER.wait()
    return ""


def undocumented(a: int) -> int:
    return a


class Echo:
    """Says a row's word at first, then what it was told, rewarded by its length; over at `end`."""

    def __init__(self, end: str = "stop") -> None:
        self.end = end

    def reset(self, row: dict[str, Any]) -> str:
        self.word = row["word"]
        return f" {self.word}"

    def step(self, action: str) -> tuple[str, float, bool]:
        return action, len(action) / 2, action == self.end

    def close(self) -> None:
        CLOSED.append(self.word)


class Silent(Echo):
    """Shows nothing at first, and works in the event loop."""

    async def reset(self, row: dict[str, Any]) -> None:  # type: ignore[override]
        self.word = "silent"

    async def step(self, action: str) -> tuple[str, None, bool]:  # type: ignore[override]
        return action, None, action == "stop"


class Broken(Echo):
    """Raises where it is told so, hangs, or says something else."""

    def step(self, action: str) -> Any:
        if action == "hang":
            FOREVER.wait()
        if action == "nonsense":
            return "nonsense"
        if action == "raise":
            raise KeyError("lost")
        return super().step(action)


class Different(Echo):
    """Begins in another way each time."""

    began = 0

    def reset(self, row: dict[str, Any]) -> str:
        self.word = ""
        Different.began += 1
        return str(Different.began)
