"""What the sampler's loop asks of the rows that a model is run on.

B rows in the making, P of a pass with padding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One completion to be made."""

    request: int
    """Rows of one request have one prompt."""
    place: int
    """Among the request's completions."""
    prompt_ids: Sequence[int]
    seed: int
    limit: int
    """Most tokens."""


class Rows(Protocol):
    """Rows 0 to B - 1, each a prompt and the tokens that it was fed since. Rows enter at the end."""

    def room_for(self, waiting: Sequence[Row]) -> int:
        """How many of the first rows of a queue may enter now; at least one where there are no rows yet."""

    def enter(self, rows: Sequence[Row]) -> None:
        """Compute what is not known yet of their prompts, but for each prompt's last token."""

    def step(self, tokens_B: Tensor) -> Tensor:
        """[P, V], P >= max(B, 2): the logits that follow these tokens. A new row is fed its prompt's last token."""

    def leave(self, leaving: Leaving, awaited: int | None) -> None:
        """Let rows go; the last rows take the places that become free. `awaited`: the request of the first row that
        waits, whose prompt is kept where it is known."""


@dataclass(frozen=True)
class Leaving:
    """Rows that go, and how those that stay close ranks."""

    left: int
    """Rows that stay."""
    holes: list[int]
    """Places among those that become free."""
    movers: list[int]
    """The row that takes each one."""

    @classmethod
    def of(cls, count: int, gone: Sequence[int]) -> Leaving:
        """`gone` of `count` rows."""
        left, missing = count - len(gone), set(gone)
        holes = [place for place in gone if place < left]
        return cls(left, holes, [row for row in range(left, count) if row not in missing])

    def apply(self, values: list[Any]) -> None:
        """To a list with an entry a row."""
        for hole, mover in zip(self.holes, self.movers, strict=True):
            values[hole] = values[mover]
        del values[self.left :]
