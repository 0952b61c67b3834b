"""Calling reward functions and checking what they return."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from artifacts.errors import PosttrainError, StageError
from stages.raised import raised
from stages.rollouts.reward_base import OvertimeError
from stages.rollouts.reward_limits import awaited, limited

if TYPE_CHECKING:
    from stages.data.tokenize import TokenizedPrompt
    from stages.data.types import Row
    from stages.rollouts.requests import Completion

Values = list[float | None]


@dataclass(frozen=True)
class Place:
    """A completion: its prompt's row, and its number among the completions of that prompt."""

    row_id: str
    number: int

    def __str__(self) -> str:
        return f"row {self.row_id}, completion {self.number}"


@dataclass(frozen=True)
class Call:
    """The arguments of a reward function, one entry a completion each."""

    places: list[Place]
    arguments: dict[str, list[Any]]

    @classmethod
    def of(
        cls,
        prompts: Sequence[TokenizedPrompt],
        completions: Sequence[Sequence[Completion]],
        texts: Sequence[Sequence[str]],
    ) -> Call:
        """Every column of the rows, and TRL's prompts, completions and completion_ids; of completions of several turns
        also environment_reward."""
        rows = [prompt.row for prompt, group in zip(prompts, texts, strict=True) for _ in group]
        columns = sorted({column for prompt in prompts for column in prompt.row} - {"prompt"})
        flat_texts = [text for group in texts for text in group]
        arguments = {column: [row.get(column) for row in rows] for column in columns}
        arguments["prompts"] = [row["prompt"] for row in rows]
        flat = [completion for group in completions for completion in group]
        arguments["completions"] = [_spoken(*each) for each in zip(rows, flat, flat_texts, strict=True)]
        arguments["completion_ids"] = [completion.token_ids for completion in flat]
        if any(completion.episode is not None for completion in flat):
            arguments["environment_reward"] = [
                None if completion.episode is None else completion.episode.environment_reward for completion in flat
            ]
        places = [
            Place(prompt.row_id, number)
            for prompt, group in zip(prompts, texts, strict=True)
            for number in range(len(group))
        ]
        return cls(places, arguments)

    def only(self, indices: Sequence[int]) -> Call:
        """The call for some of the completions."""
        arguments = {name: [values[index] for index in indices] for name, values in self.arguments.items()}
        return Call([self.places[index] for index in indices], arguments)


def _spoken(row: Row, completion: Completion, text: str) -> Any:
    """As the row writes its prompt: text, or messages."""
    if completion.episode is not None:
        return completion.episode.messages
    return text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]


@dataclass(frozen=True)
class RewardFunction:
    """A function, and how it is called."""

    name: str
    function: Callable[..., Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the user's choice."""
    columns: frozenset[str] | None = None
    """All that it looks at, of the arguments that it takes; None: all of them."""
    timeout_seconds: float | None = None
    on_timeout: Literal["error", "none"] = "error"

    def keywords(self, call: Call) -> dict[str, list[Any]]:
        """What the function takes of the arguments. Raises StageError when it needs one that is not there."""
        parameters = inspect.signature(self.function).parameters.values()
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        names = {parameter.name for parameter in parameters}
        missing = [
            parameter.name
            for parameter in parameters
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            and parameter.name not in {*call.arguments, *self.parameters}
        ]
        if missing:
            raise StageError(
                f"reward function {self.name!r} asks for {', '.join(missing)}; it can have: "
                f"{', '.join(sorted(call.arguments))} (the dataset's columns among them)"
            )
        unwanted = [] if takes_all else sorted(set(self.parameters) - names)
        if unwanted:
            raise StageError(f"reward function {self.name!r} takes no {', '.join(unwanted)}; correct its parameters")
        return {
            name: values
            for name, values in call.arguments.items()
            if (takes_all or name in names)
            and name not in self.parameters
            and (self.columns is None or name in self.columns)
        }

    def start(self, call: Call) -> Any:
        """What the function returns: its values, or something to wait for. Raises OvertimeError, and its own errors."""
        keywords = self.keywords(call)
        return limited(lambda: self.function(**keywords, **self.parameters), self.timeout_seconds)


def call_all(calls: Sequence[tuple[RewardFunction, Call]]) -> list[list[Any] | PosttrainError]:
    """What every function returns for its call, one entry a completion, or an error that names row and completion.

    The async ones run together. An entry may be an exception: why this completion could not be scored.
    """

    def settled(function: RewardFunction, call: Call, outcome: Any) -> list[Any] | PosttrainError:
        try:
            return _settled(function, call, outcome)
        except PosttrainError as error:
            return error

    return [settled(*given, outcome) for given, outcome in zip(calls, _outcomes(calls), strict=True)]


def _outcomes(calls: Sequence[tuple[RewardFunction, Call]]) -> list[Any]:
    """Of each call what was returned, or the exception that was raised."""
    outcomes: list[Any] = []
    for function, call in calls:
        try:
            outcomes.append(function.start(call) if call.places else [])
        except Exception as error:
            outcomes.append(error)
    waiting = [index for index, outcome in enumerate(outcomes) if inspect.isawaitable(outcome)]

    async def together() -> list[Any]:
        tasks = [awaited(outcomes[index], calls[index][0].timeout_seconds) for index in waiting]
        return await asyncio.gather(*tasks, return_exceptions=True)

    if waiting:
        for index, outcome in zip(waiting, asyncio.run(together()), strict=True):
            outcomes[index] = outcome
    return outcomes


def _settled(function: RewardFunction, call: Call, outcome: Any) -> list[Any]:
    if not isinstance(outcome, Exception):
        return _listed(function.name, outcome, call.places)
    if isinstance(outcome, OvertimeError) and function.on_timeout == "none":
        if len(call.places) == 1:
            return [outcome]
        singles = [(function, call.only([index])) for index in range(len(call.places))]
        pairs = zip(singles, _outcomes(singles), strict=True)
        return [value for (_, one), alone in pairs for value in _settled(function, one, alone)]
    raise _blame(function, call, outcome)


def _blame(function: RewardFunction, call: Call, error: Exception) -> PosttrainError:
    """The error with the completion it is about, found by calling again with one completion at a time."""
    if isinstance(error, PosttrainError):
        return error
    where = f"for {len(call.places)} completions together, though not for any alone; the first is {call.places[0]}"
    for index, place in enumerate(call.places):
        one = call.only([index])
        (again,) = _outcomes([(function, one)])
        if isinstance(again, Exception):
            error, where = again, f"for {place}: {one.arguments['completions'][0]!r:.200}"
            break
    said = str(error) if isinstance(error, OvertimeError) else f"raised {raised(error, function.function)},"
    blamed = StageError(f"reward function {function.name!r} {said} {where}")
    blamed.__cause__ = error  # the log shows its frames
    return blamed


def _listed(name: str, values: Any, places: Sequence[Place]) -> list[Any]:
    """One entry a completion. Raises StageError where the function gave something else."""
    values = values.tolist() if hasattr(values, "tolist") else values
    expected = f"it must return a list of {len(places)}, one number (or None) a completion"
    if not isinstance(values, list | tuple):
        raise StageError(f"reward function {name!r} returned {values!r:.100}; {expected}")
    if len(values) != len(places):
        raise StageError(
            f"reward function {name!r} returned {len(values)} values for {len(places)} completions (rows "
            f"{places[0].row_id} to {places[-1].row_id}); {expected}"
        )
    return list(values)


def checked(function: RewardFunction, values: Sequence[Any], call: Call) -> Values:
    """The rewards as floats. Raises StageError for what is neither a number nor None."""
    return [
        _number(function, value, place, completion)
        for value, place, completion in zip(values, call.places, call.arguments["completions"], strict=True)
    ]


def _number(function: RewardFunction, value: Any, place: Place, completion: Any) -> float | None:
    if value is None or (isinstance(value, OvertimeError) and function.on_timeout == "none"):
        return None
    if isinstance(value, Exception):
        raise StageError(f"reward function {function.name!r} {value}, for {place}: {completion!r:.200}") from value
    number = finite(value)
    if number is None:
        raise StageError(
            f"reward function {function.name!r} returned {value!r:.100} for {place}; give a finite number, or None "
            "(not scored)"
        )
    return number


def finite(value: Any) -> float | None:
    """The value as a float; None where it is no finite number."""
    try:
        number = math.nan if isinstance(value, str | bytes | bytearray) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
