"""Errors that a user can act on. Each says what is wrong, where, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar


class PosttrainError(Exception):
    """Base of every error that is shown as a message, without a traceback."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a request: `where` is a place a person can open (`a.yaml:12: stages.dpo.with.beta`)."""

    where: str
    what: str
    place: tuple[str | int, ...] = field(default=(), compare=False, repr=False)
    """Of a mistake in a recipe, the keys and indices that lead there."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class RequestError(PosttrainError):
    """The request is wrong and nothing was started. Holds every problem found, not only the first."""

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        self.problems = (Problem("request", problems),) if isinstance(problems, str) else tuple(problems)
        super().__init__(
            problems if isinstance(problems, str) else "\n".join(str(problem) for problem in self.problems)
        )


class StageError(PosttrainError):
    """A stage cannot go on: its data, model, reward function or numbers are wrong."""

    may_pass: ClassVar[bool] = False
    """Whether a later try with the same data and settings may go well."""


class DataError(StageError):
    """A row, column or file of a dataset is wrong."""


class OutOfMemory(StageError):
    """The memory does not suffice, and a process alone cannot go on; micro-batches of so many tokens may fit."""

    may_pass = True

    def __init__(self, message: str, micro_batch_tokens: int) -> None:
        self.micro_batch_tokens = micro_batch_tokens
        super().__init__(message)


class StoreError(PosttrainError):
    """The artifact store did not do what was asked: names the operation, the object and the next step."""


class UnreachableError(StoreError):
    """The store did not answer for as long as it was asked; later it may."""


class DamagedError(StoreError):
    """Something in the store is not what its digest says."""


class MissingError(StoreError):
    """The store answered, and what was asked for is not there."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised for, one behind the other."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__
