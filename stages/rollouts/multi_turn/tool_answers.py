"""Turns that call tools, answered by the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from artifacts.errors import StageError
from stages.data.tools import TOOLS
from stages.data.types import Message, Row
from stages.rollouts.multi_turn.call_format import Read, Said, ToolCall, call_reader
from stages.rollouts.multi_turn.rollout import Rollout, tool_message
from stages.rollouts.multi_turn.together import Together
from stages.rollouts.multi_turn.tools import ToolBox, as_text, failure, name_of, reason_of


class ToolAnswers:
    """The tools of a stage, and how its model calls them."""

    def __init__(self, tools: ToolBox, read: Read, most_turns: int | None, timeout_seconds: float | None) -> None:
        self.tools, self.read = tools, read
        self._most_turns, self._timeout_seconds = most_turns, timeout_seconds

    @classmethod
    def of(cls, tokenizer: Any, config: Any) -> ToolAnswers:
        """As a stage's configuration (a `MultiTurnConfig`) says."""
        tools = ToolBox(config.tools)
        read = call_reader(tokenizer, tools.schemas)
        return cls(tools, read, config.max_tool_calling_iterations, config.tool_timeout_seconds)

    def answer(self, spoken: Sequence[tuple[Rollout, Said]], together: Together) -> list[list[Message] | None]:
        """The results of each turn's calls, in their order; None where no more turns with calls are answered.

        A call that cannot be made, raises or takes too long has a result that says so; it counts as a failure.
        """
        last = [rollout.tool_turns == self._most_turns for rollout, _ in spoken]
        made = [
            (place, rollout, call)
            for place, (rollout, said) in enumerate(spoken)
            for call in said.calls
            if not last[place]
        ]
        problems = [self.tools.problem(call, self._allowed(rollout.prompt.row)) for _, rollout, call in made]
        possible = [entry for entry, problem in zip(made, problems, strict=True) if problem is None]
        results = iter(together([self.tools.task(call) for _, _, call in possible], self._timeout_seconds))
        answers: list[list[Message]] = [[] for _ in spoken]
        for (place, rollout, call), problem in zip(made, problems, strict=True):
            content, failed = _content(next(results)) if problem is None else (failure(problem), True)
            rollout.tool_calls += 1
            rollout.tool_failures += failed
            answers[place].append(tool_message(call.name, content, call.id or _id_of(call, len(answers[place]))))
        for (rollout, _), ended in zip(spoken, last, strict=True):
            rollout.tool_turns += not ended
            if ended:
                rollout.ending = "turn limit"
        return [None if ended else found for found, ended in zip(answers, last, strict=True)]

    def _allowed(self, row: Row) -> frozenset[str]:
        """The names of the tools that a row has."""
        return frozenset(map(name_of, row[TOOLS]))

    def checked(self, row: Row) -> Row:
        """The row with its tools: those in its column, else all. Raises StageError for one that there is not."""
        if not row.get(TOOLS):
            return {**row, TOOLS: self.tools.schemas}
        unknown = self.tools.unknown(row[TOOLS])
        if unknown:
            raise StageError(
                f"row {row['row_id']}: its column tools names {', '.join(unknown)}, which is none of the stage's tools "
                f"({', '.join(map(name_of, self.tools.schemas))}); add it to tools, or leave it out of the row"
            )
        return row


def _content(result: Any) -> tuple[str, bool]:
    """(a result as text, whether it is a failure)"""
    if isinstance(result, Exception):
        return failure(reason_of(result)), True
    return as_text(result), False


def _id_of(call: ToolCall, number: int) -> str:
    """Nine characters, as Mistral's templates ask for."""
    return f"call{number:05d}"
