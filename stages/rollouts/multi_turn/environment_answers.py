"""Turns that an environment answers, one instance a completion."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from functools import partial
from typing import Any

from artifacts.errors import StageError
from stages.data.chat import Encoder
from stages.data.encode import arguments_of, tools_of
from stages.data.types import Message
from stages.raised import raised
from stages.rollouts.multi_turn.environment import Make, WrongAnswerError, maker_of, observed, stepped
from stages.rollouts.multi_turn.episode import Opening
from stages.rollouts.multi_turn.rollout import Rollout
from stages.rollouts.multi_turn.settings import Environment, EnvironmentSpec, environment_of
from stages.rollouts.multi_turn.together import Together
from stages.rollouts.multi_turn.tools import reason_of

_CLOSE_SECONDS = 10.0


class EnvironmentAnswers:
    """The environments of a generation."""

    def __init__(self, spec: EnvironmentSpec, make: Make, encoder: Encoder) -> None:
        self.spec, self._make, self._encoder = spec, make, encoder

    @classmethod
    def of(cls, tokenizer: Any, environment: Environment) -> EnvironmentAnswers:
        """As a recipe names it."""
        spec = environment_of(environment)
        return cls(spec, maker_of(spec), Encoder(tokenizer))

    def open(self, groups: Sequence[Sequence[Rollout]], together: Together) -> None:
        """Make an environment for every completion, and let the model see what it shows at first.

        Raises StageError where the completions of a prompt would begin differently, or all environments broke.
        """
        rollouts = [rollout for group in groups for rollout in group]
        results = together([partial(self._begin, rollout) for rollout in rollouts], self.spec.timeout_seconds)
        seen: dict[int, str | None] = {}
        for number, (rollout, result) in enumerate(zip(rollouts, results, strict=True)):
            with self._contained(rollout, "reset"):
                seen[number] = observed(_raised(result))
        self._require_some(rollouts)
        number = 0
        for group in groups:
            own = {seen[place] for place in range(number, number + len(group)) if place in seen}
            number += len(group)
            if len(own) > 1:
                raise StageError(
                    f"environment {self.spec.name}: reset shows the completions of row {group[0].prompt.row_id} "
                    f"{len(own)} different beginnings ({', '.join(repr(text)[:60] for text in own)}), but they are "
                    "compared with each other; let it follow from the row alone"
                )
            if own and (observation := own.pop()):
                self._show(group, observation)

    def _begin(self, rollout: Rollout) -> Any:
        rollout.environment = self._make()
        return rollout.environment.reset(deepcopy(rollout.prompt.row))

    def _show(self, group: Sequence[Rollout], observation: str) -> None:
        """The prompt with the observation at the end of its last message, if that is the user's, else after it."""
        row = group[0].prompt.row
        messages: list[Message] = list(row["prompt"])
        if messages and messages[-1]["role"] == "user":
            messages[-1] = {**messages[-1], "content": messages[-1]["content"] + observation}
        else:
            messages.append({"role": "user", "content": observation})
        (prompt_ids,) = self._encoder.conversations(
            [messages], [group[0].prompt.row_id], tools_of([row]), arguments_of([row]), generation_prompt=True
        )
        for rollout in group:
            rollout.opening, rollout.prompt_ids = Opening(messages, prompt_ids), prompt_ids

    def answer(self, spoken: Sequence[tuple[Rollout, str]], together: Together) -> list[list[Message] | None]:
        """The observation after each turn; None where the episode is over."""
        tasks = [partial(_environment(rollout).step, action) for rollout, action in spoken]
        answers: list[list[Message] | None] = [None] * len(spoken)
        for place, ((rollout, _), result) in enumerate(
            zip(spoken, together(tasks, self.spec.timeout_seconds), strict=True)
        ):
            with self._contained(rollout, "step"):
                observation, reward, done = stepped(_raised(result))
                rollout.rewards.append(reward)
                if done:
                    rollout.ending = "done"
                else:
                    answers[place] = [{"role": "user", "content": observation}]
        self._require_some([rollout for rollout, _ in spoken])
        return answers

    def close(self, rollouts: Sequence[Rollout], together: Together) -> None:
        """Let go of the environments."""
        closing = [getattr(rollout.environment, "close", None) for rollout in rollouts]
        with suppress(StageError):  # whatever it says, the episodes are over
            together([close for close in closing if callable(close)], _CLOSE_SECONDS)
        for rollout in rollouts:
            rollout.environment = None

    def _contained(self, rollout: Rollout, method: str) -> Contained:
        return Contained(self.spec, self._make, rollout, method)

    def _require_some(self, rollouts: Sequence[Rollout]) -> None:
        """Raises StageError where every one of several environments broke: then it is none of the episodes' fault."""
        if len(rollouts) > 1 and all(rollout.error is not None for rollout in rollouts):
            raise StageError(
                f"environment {self.spec.name} broke in all of {len(rollouts)} episodes; {rollouts[0].error}"
            )


class Contained:
    """Makes an error of an environment the end of its episode, or of the stage, as the recipe says."""

    def __init__(self, spec: EnvironmentSpec, make: Make, rollout: Rollout, method: str) -> None:
        self._spec, self._make, self._rollout, self._method = spec, make, rollout, method

    def __enter__(self) -> None: ...

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        wrong = isinstance(error, WrongAnswerError)
        if self._spec.on_error == "error":
            code = self._make if self._rollout.environment is None else self._rollout.environment
            said = str(error) if wrong else f"{self._method}: {raised(error, code)}"
            raise StageError(
                f"environment {self._spec.name}, {self._rollout}: {said}; correct it, or leave such episodes out with "
                "on_error: unscored"
            ) from error
        said = str(error) if wrong else f"{self._method}: {reason_of(error)}"
        self._rollout.error, self._rollout.ending = f"{self._rollout}: {said}", "broken"
        return True


def _raised(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return result


def _environment(rollout: Rollout) -> Any:
    assert rollout.environment is not None, "it was opened"
    return rollout.environment
