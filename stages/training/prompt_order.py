"""The order in which prompts are sampled: a permutation for every pass over them, gone through turn by turn.

A curriculum lets prompts pass at their turn, by how often their completions passed when they were last sampled.
Everything follows from the seed and the rewards so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from stages.seeds import derive
from stages.training.planner import RowOrder

_TWO_TO_63 = 2.0**63


@dataclass(frozen=True)
class Curriculum:
    """How likely a prompt is taken at its turn."""

    chance: Callable[[float], float]
    """Of a pass rate, above 0: no prompt is given up."""
    pass_reward: float

    @classmethod
    def weighted(cls, floor: float, pass_reward: float) -> Curriculum:
        """4 p (1 - p): the variance of a verdict, 1 where half of the completions pass."""
        return cls(partial(_variance, floor), pass_reward)

    @classmethod
    def filtered(cls, floor: float, pass_reward: float, *, low: float, high: float) -> Curriculum:
        """Always within [low, high], rarely outside."""
        return cls(partial(_within, floor, low, high), pass_reward)

    def pass_rate(self, rewards: Sequence[float | None]) -> float | None:
        """Share of the scored completions that passed; None where none was scored."""
        scored = [reward for reward in rewards if reward is not None]
        return sum(reward >= self.pass_reward for reward in scored) / len(scored) if scored else None


def _variance(floor: float, rate: float) -> float:
    return max(floor, 4 * rate * (1 - rate))


def _within(floor: float, low: float, high: float, rate: float) -> float:
    return 1.0 if low <= rate <= high else floor


class PromptOrder:
    """An endless stream of prompts by index. Without a curriculum, every prompt once a pass."""

    def __init__(self, num_prompts: int, seed: int, curriculum: Curriculum | None = None) -> None:
        self.seed, self.curriculum = seed, curriculum
        self._turns = RowOrder(num_prompts, batch_size=1, seed=seed, epochs=1, max_steps=1)
        self.position = 0
        self.pass_rates: dict[int, float] = {}
        """Of every prompt when it was last sampled."""

    def take(self, count: int) -> list[int]:
        """The next prompts."""
        taken: list[int] = []
        while len(taken) < count:
            (row,) = self._turns.rows(self.position)
            if self._is_taken(row):
                taken.append(row)
            self.position += 1
        return taken

    def _is_taken(self, row: int) -> bool:
        if self.curriculum is None or row not in self.pass_rates:
            return True
        draw = derive(self.seed, "curriculum", self.position) / _TWO_TO_63
        return draw < self.curriculum.chance(self.pass_rates[row])

    def note(self, row: int, rewards: Sequence[float | None]) -> None:
        """What the prompt's completions, of those sampled last, were worth."""
        if self.curriculum is not None and (rate := self.curriculum.pass_rate(rewards)) is not None:
            self.pass_rates[row] = rate

    def state(self) -> dict[str, Any]:
        """JSON values from which the stream goes on."""
        return {"position": self.position, "pass_rates": list(self.pass_rates.items())}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.position = state["position"]
        self.pass_rates = dict(state["pass_rates"])
