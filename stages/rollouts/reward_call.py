"""Calling reward functions and checking what they return."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from artifacts.errors import PosttrainError, StageError

if TYPE_CHECKING:
    from stages.data.tokenize import TokenizedPrompt
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
        """Every column of the rows, and TRL's prompts, completions and completion_ids."""
        rows = [prompt.row for prompt, group in zip(prompts, texts, strict=True) for _ in group]
        columns = sorted({column for prompt in prompts for column in prompt.row} - {"prompt"})
        flat_texts = [text for group in texts for text in group]
        arguments = {column: [row.get(column) for row in rows] for column in columns}
        arguments["prompts"] = [row["prompt"] for row in rows]
        arguments["completions"] = [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, flat_texts, strict=True)
        ]
        arguments["completion_ids"] = [completion.token_ids for group in completions for completion in group]
        places = [
            Place(prompt.row_id, number)
            for prompt, group in zip(prompts, texts, strict=True)
            for number in range(len(group))
        ]
        return cls(places, arguments)

    def only(self, index: int) -> Call:
        """The call for one completion."""
        arguments = {name: values[index : index + 1] for name, values in self.arguments.items()}
        return Call(self.places[index : index + 1], arguments)

    def keywords(self, name: str, function: Callable[..., Any]) -> dict[str, list[Any]]:
        """What the function takes of the arguments. Raises StageError when it needs one that is not there."""
        parameters = inspect.signature(function).parameters.values()
        missing = [
            parameter.name
            for parameter in parameters
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            and parameter.name not in self.arguments
        ]
        if missing:
            raise StageError(
                f"reward function {name!r} asks for {', '.join(missing)}; it can have: "
                f"{', '.join(sorted(self.arguments))} (the dataset's columns among them)"
            )
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return self.arguments
        return {
            parameter.name: self.arguments[parameter.name]
            for parameter in parameters
            if parameter.name in self.arguments
        }


def call_all(functions: Mapping[str, Callable[..., Any]], call: Call) -> dict[str, Any]:
    """What every function returns; the async ones run together."""
    if not call.places:
        return {name: [] for name in functions}
    keywords = {name: call.keywords(name, function) for name, function in functions.items()}
    waiting = {name: function for name, function in functions.items() if inspect.iscoroutinefunction(function)}
    results = {}
    for name, function in functions.items():
        if name not in waiting:
            try:
                results[name] = function(**keywords[name])
            except Exception as error:
                raise _blame(name, function, call, error) from error

    async def together() -> list[Any]:
        return await asyncio.gather(
            *(function(**keywords[name]) for name, function in waiting.items()), return_exceptions=True
        )

    if waiting:
        for (name, function), result in zip(waiting.items(), asyncio.run(together()), strict=True):
            if isinstance(result, Exception):
                raise _blame(name, function, call, result) from result
            results[name] = result
    return {name: results[name] for name in functions}


def _blame(name: str, function: Callable[..., Any], call: Call, error: Exception) -> PosttrainError:
    """The error with the completion it is about, found by calling again with one completion at a time."""
    if isinstance(error, PosttrainError):
        return error
    where = f"for {len(call.places)} completions together, though not for any alone; the first is {call.places[0]}"
    for index, place in enumerate(call.places):
        one = call.only(index)
        try:
            result = function(**one.keywords(name, function))
            if inspect.isawaitable(result):
                asyncio.run(_wait(result))
        except Exception as again:
            error, where = again, f"for {place}: {one.arguments['completions'][0]!r:.200}"
            break
    return StageError(f"reward function {name!r} raised {type(error).__name__}: {error}, {where}")


async def _wait(result: Any) -> Any:
    return await result


def checked(name: str, values: Any, places: Sequence[Place]) -> Values:
    """The rewards as floats. Raises StageError unless there is one number (or None) for every completion."""
    values = values.tolist() if hasattr(values, "tolist") else values
    expected = f"it must return a list of {len(places)}, one number (or None) a completion"
    if not isinstance(values, list | tuple):
        raise StageError(f"reward function {name!r} returned {values!r:.100}; {expected}")
    if len(values) != len(places):
        raise StageError(
            f"reward function {name!r} returned {len(values)} values for {len(places)} completions (rows "
            f"{places[0].row_id} to {places[-1].row_id}); {expected}"
        )
    return [_number(name, value, place) for value, place in zip(values, places, strict=True)]


def _number(name: str, value: Any, place: Place) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise StageError(
            f"reward function {name!r} returned {value!r:.100} for {place}; give a finite number, or None (not scored)"
        )
    return number
