"""What is known of a rollout of several turns beside its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from stages.data.types import Message, Row

Ending = Literal["answered", "done", "turn limit", "length", "broken"]
"""The model answered without calling a tool; the environment was done; turns were used up; tokens were; the environment
broke."""


@dataclass(frozen=True)
class Opening:
    """The prompt with what the environment shows at first."""

    messages: list[Message]
    prompt_ids: list[int]


@dataclass(frozen=True)
class Episode:
    """The turns of a rollout and what came of them."""

    messages: list[Message]
    """What follows the prompt: turns of the model, and what tools and the environment answered, in order."""
    turns: int
    """Of the model."""
    ending: Ending
    tool_calls: int = 0
    tool_failures: int = 0
    """Of the calls, those of no known tool, with wrong arguments, that raised or took too long."""
    environment_rewards: tuple[float | None, ...] = ()
    """One a step of the environment; None: it gave none."""
    error: str | None = None
    """Why the environment broke."""
    opening: Opening | None = None
    """None: the prompt as the dataset has it."""

    @property
    def environment_reward(self) -> float | None:
        """The sum over the steps; None where there is none, or the environment broke."""
        given = [reward for reward in self.environment_rewards if reward is not None]
        return sum(given) if given and self.error is None else None

    @property
    def last_words(self) -> str:
        """The content of the model's last turn; empty where it has none."""
        turns = [message for message in self.messages if message["role"] == "assistant"]
        return str(turns[-1]["content"]) if turns else ""

    @classmethod
    def of(cls, row: Row) -> Self:
        """From a row with `record` and the messages as its completion."""
        return cls(
            row["completion"],
            row["turns"],
            row["ending"],
            tool_calls=row["tool_calls"],
            tool_failures=row["tool_failures"],
            environment_rewards=tuple(row["environment_rewards"]),
            error=row["environment_error"],
        )

    def record(self) -> dict[str, Any]:
        """What is kept of it beside its messages, by column."""
        return {
            "turns": self.turns,
            "ending": self.ending,
            "tool_calls": self.tool_calls,
            "tool_failures": self.tool_failures,
            "environment_reward": self.environment_reward,
            "environment_rewards": list(self.environment_rewards),
            "environment_error": self.error,
        }


RECORD_TYPES: dict[str, Any] = {
    "turns": "int",
    "ending": "string",
    "tool_calls": "int",
    "tool_failures": "int",
    "environment_reward": "float",
    "environment_rewards": ("list", "float"),
    "environment_error": "string",
}
"""The columns of `Episode.record` as types of `stages.data.schema`."""
