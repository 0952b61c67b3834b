"""Calling reward functions and checking what they return."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from artifacts.errors import PosttrainError, StageError
from stages.raised import raised
from stages.rollouts.reward_arguments import Call, Place
from stages.rollouts.reward_base import OvertimeError
from stages.rollouts.reward_limits import awaited, limited

Values = list[float | None]


@dataclass(frozen=True)
class Failure:
    """Why a function that may fail (`on_error: none`) has no value for a completion."""

    place: Place
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


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
    on_error: Literal["error", "none"] = "error"
    max_tries: int = 1
    kind: str = "reward function"
    """What messages call it."""
    value: str = "number"
    """What it gives of a completion, in messages."""

    @property
    def title(self) -> str:
        """Its kind and name."""
        return f"{self.kind} {self.name!r}"

    @property
    def takes_all(self) -> bool:
        """Whether it takes every column, by `**columns`."""
        parameters = inspect.signature(self.function).parameters.values()
        return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def keywords(self, call: Call) -> dict[str, list[Any]]:
        """What the function takes of the arguments. Raises StageError when it needs one that is not there."""
        parameters = inspect.signature(self.function).parameters.values()
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
                f"{self.title} asks for {', '.join(missing)}; it can have: "
                f"{', '.join(sorted(call.arguments))} (the dataset's columns among them)"
            )
        unwanted = [] if self.takes_all else sorted(set(self.parameters) - names)
        if unwanted:
            raise StageError(f"{self.title} takes no {', '.join(unwanted)}; correct its parameters")
        return {
            name: values
            for name, values in call.arguments.items()
            if (self.takes_all or name in names)
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
    """Of each call what was returned, or the exception that was raised by the last of its tries."""
    outcomes = _tried(calls)
    for tries in range(1, max((function.max_tries for function, _ in calls), default=1)):
        again = [
            index
            for index, (function, _) in enumerate(calls)
            if _failed(outcomes[index]) and tries < function.max_tries
        ]
        if not again:
            break
        for index, outcome in zip(again, _tried([calls[index] for index in again]), strict=True):
            outcomes[index] = outcome
    return outcomes


def _failed(outcome: Any) -> bool:
    """Whether the function raised; that it was slow, or asks for a column that is not there, is another matter."""
    return isinstance(outcome, Exception) and not isinstance(outcome, OvertimeError | PosttrainError)


def _tried(calls: Sequence[tuple[RewardFunction, Call]]) -> list[Any]:
    """Of each call, made once, what was returned, or the exception that was raised."""
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
        values = _listed(function, outcome, call.places)
        if function.on_error == "none":
            pairs = zip(values, call.places, strict=True)
            return [Failure(place, str(value)) if isinstance(value, Exception) else value for value, place in pairs]
        return values
    slow = isinstance(outcome, OvertimeError) and function.on_timeout == "none"
    if slow or (_failed(outcome) and function.on_error == "none"):
        if len(call.places) == 1:
            return [outcome if slow else Failure(call.places[0], _reason(function, call, outcome))]
        singles = [(function, call.only([index])) for index in range(len(call.places))]
        each = zip(singles, _outcomes(singles), strict=True)
        return [value for (_, one), alone in each for value in _settled(function, one, alone)]
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
    said = str(error) if isinstance(error, OvertimeError) else f"raised {_reason(function, call, error)},"
    if function.max_tries > 1 and _failed(error):
        said += f" in the last of {function.max_tries} tries,"
    blamed = StageError(f"{function.title} {said} {where}")
    blamed.__cause__ = error  # the log shows its frames
    return blamed


def _reason(function: RewardFunction, call: Call, error: Exception) -> str:
    """What was raised; of a column that was looked up in vain, also which there are."""
    text = raised(error, function.function)
    sought = error.args[0] if isinstance(error, KeyError) and error.args else None
    if isinstance(sought, str) and function.takes_all and sought not in (given := function.keywords(call)):
        return f"{text}, which is none of {', '.join(given)}"
    return text


def _listed(function: RewardFunction, values: Any, places: Sequence[Place]) -> list[Any]:
    """One entry a completion. Raises StageError where the function gave something else."""
    values = values.tolist() if hasattr(values, "tolist") else values
    expected = f"it must return a list of {len(places)}, one {function.value} (or None) a completion"
    if not isinstance(values, list | tuple):
        raise StageError(f"{function.title} returned {values!r:.100}; {expected}")
    if len(values) != len(places):
        raise StageError(
            f"{function.title} returned {len(values)} values for {len(places)} completions (rows "
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
    if value is None or isinstance(value, Failure):
        return None
    if isinstance(value, OvertimeError) and function.on_timeout == "none":
        return None
    if isinstance(value, Exception):
        raise StageError(f"{function.title} {value}, for {place}: {completion!r:.200}") from value
    number = finite(value)
    if number is None:
        raise StageError(
            f"{function.title} returned {value!r:.100} for {place}; give a finite number, or None (not scored)"
        )
    return number


def finite(value: Any) -> float | None:
    """The value as a float; None where it is no finite number."""
    try:
        number = math.nan if isinstance(value, str | bytes | bytearray) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
