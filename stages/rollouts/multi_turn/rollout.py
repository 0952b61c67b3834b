"""One completion in the making: its tokens, which of them the model wrote, and what was said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.data.tokenize import TokenizedPrompt
from stages.data.types import Message
from stages.rollouts.multi_turn.environment import Environment
from stages.rollouts.multi_turn.episode import Ending, Episode, Opening
from stages.rollouts.requests import Completion
from stages.seeds import derive


class Rollout:
    """A completion that goes on until `ending` is set."""

    def __init__(self, prompt: TokenizedPrompt, number: int, seed: int, most_tokens: int) -> None:
        self.prompt, self.number = prompt, number
        self.prompt_ids: Sequence[int] = prompt.prompt_ids
        self.opening: Opening | None = None
        self.environment: Environment | None = None
        self.ending: Ending | None = None
        self.messages: list[Message] = []
        self.tool_calls = self.tool_failures = self.tool_turns = self.turns = 0
        self.rewards: list[float | None] = []
        self.error: str | None = None
        self.finished = False
        self._seed, self._most_tokens = seed, most_tokens
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._model_logprobs: list[float] = []
        self._versions: list[int] = []
        self._own: list[bool] = []

    def __str__(self) -> str:
        return f"row {self.prompt.row_id}, completion {self.number}, turn {self.turns}"

    @property
    def context_ids(self) -> tuple[int, ...]:
        """All tokens so far."""
        return (*self.prompt_ids, *self._token_ids)

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return self._most_tokens - len(self._token_ids)

    @property
    def seed(self) -> int:
        """Of the next turn; that of the first is the completion's, so that one turn is sampled as without others."""
        return self._seed if self.turns == 0 else derive(self._seed, "turn", self.turns)

    def speak(self, turn: Completion) -> None:
        """The model has written a turn."""
        self.turns += 1
        self.finished = turn.finished
        self._token_ids += turn.token_ids
        self._logprobs += turn.logprobs
        self._model_logprobs += turn.model_logprobs
        self._versions += turn.weight_versions
        self._own += [True] * len(turn.token_ids)

    def hear(self, token_ids: Sequence[int]) -> None:
        """The model is answered."""
        self._token_ids += token_ids
        nothing = [0.0] * len(token_ids)
        self._logprobs += nothing
        if self._model_logprobs:
            self._model_logprobs += nothing
        if self._versions:
            self._versions += [self._versions[-1]] * len(token_ids)
        self._own += [False] * len(token_ids)

    def completion(self) -> Completion:
        """When it has ended."""
        assert self.ending is not None
        return Completion(
            self._token_ids,
            self._logprobs,
            self.finished,
            self._model_logprobs,
            weight_versions=self._versions,
            loss_mask=self._own,
            episode=self._episode(self.ending),
        )

    def _episode(self, ending: Ending) -> Episode:
        return Episode(
            self.messages,
            self.turns,
            ending,
            tool_calls=self.tool_calls,
            tool_failures=self.tool_failures,
            environment_rewards=tuple(self.rewards),
            error=self.error,
            opening=self.opening,
        )


def by_context(rollouts: Sequence[Rollout]) -> dict[tuple[int, ...], list[Rollout]]:
    """Those that have come to the same tokens together: these are computed once."""
    found: dict[tuple[int, ...], list[Rollout]] = {}
    for rollout in rollouts:
        found.setdefault(rollout.context_ids, []).append(rollout)
    return found


def tool_message(name: str, content: str, call_id: str | None) -> Message:
    """The result of a call."""
    message: dict[str, Any] = {"role": "tool", "name": name, "content": content}
    return message if call_id is None else {**message, "tool_call_id": call_id}
