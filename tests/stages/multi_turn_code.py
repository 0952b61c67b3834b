"""A task of several turns for random models of a few letters: a tool, an environment, and rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pick(number: int) -> str:
    """A letter.

    Args:
        number: Which one.
    """
    return "abcdefgh"[number]


class Letters:
    """Rewarded by how many letters of a turn the row's prompt has; broken by a turn that begins with h."""

    def reset(self, row: dict[str, Any]) -> str:
        self.wanted = set(row["prompt"][-1]["content"])
        return "h"

    def step(self, action: str) -> tuple[str, float, bool]:
        if action.startswith("h"):
            raise ValueError("h")
        return "c" if self.wanted & set(action) else "d", float(len(self.wanted & set(action))), action == ""


def variety(completions: Sequence[Sequence[dict[str, Any]]], **_: Any) -> list[float]:
    """How many different characters the turns have, and the results."""
    return [float(len({letter for turn in turns for letter in turn["content"]})) for turns in completions]
