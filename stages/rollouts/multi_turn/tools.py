"""Python functions as tools: schemas from signatures and docstrings, calls checked and made, results as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jsonschema
from jsonschema.exceptions import best_match

from artifacts.errors import StageError
from stages.external import load_named
from stages.names import nearest
from stages.rollouts.multi_turn.call_format import ToolCall
from stages.rollouts.multi_turn.together import Task


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    function: Callable[..., Any]
    schema: dict[str, Any]

    @classmethod
    def of(cls, reference: str) -> Tool:
        """The tool that `file.py:name` names. Raises StageError where it cannot be loaded or described."""
        from transformers.utils.chat_template_utils import (
            DocstringParsingException,
            TypeHintParsingException,
            get_json_schema,
        )

        function = load_named("tool", reference)
        try:
            schema = get_json_schema(function)
        except (DocstringParsingException, TypeHintParsingException) as error:
            raise StageError(
                f"tool {reference}: {error}; the model is told what a tool does by its docstring (Google style, every "
                "argument under Args:) and its type hints"
            ) from error
        return cls(schema["function"]["name"], function, schema)


class ToolBox:
    """The tools of a stage."""

    def __init__(self, references: Sequence[str]) -> None:
        """Raises StageError where two have one name."""
        tools = [Tool.of(reference) for reference in references]
        self._tools = {tool.name: tool for tool in tools}
        if len(self._tools) < len(tools):
            names = ", ".join(tool.name for tool in tools)
            raise StageError(f"two tools have one name: {names}; the model calls them by it, so rename one")

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """What the chat template is given."""
        return [tool.schema for tool in self._tools.values()]

    def unknown(self, schemas: Sequence[dict[str, Any]]) -> list[str]:
        """The names among the schemas of a row that are no tools of these."""
        return [name for name in map(name_of, schemas) if name not in self._tools]

    def problem(self, call: ToolCall, allowed: frozenset[str] | None = None) -> str | None:
        """Why a call cannot be made, as the model is told; None: it can. `allowed`: names that the row has."""
        names = sorted(self._tools if allowed is None else allowed)
        if call.problem is not None:
            return call.problem
        if call.name not in names:
            return f"no tool {call.name!r}{nearest(call.name, names)}; there are {', '.join(names)}"
        parameters = self._tools[call.name].schema["function"]["parameters"]
        wrong = best_match(jsonschema.Draft202012Validator(_closed(parameters)).iter_errors(call.arguments))
        if wrong is None:
            return None
        place = ".".join(map(str, wrong.absolute_path))
        return f"argument {place}: {wrong.message}" if place else f"arguments: {wrong.message}"

    def task(self, call: ToolCall) -> Task:
        """What makes the call."""
        return partial(self._tools[call.name].function, **call.arguments)


def name_of(schema: dict[str, Any]) -> str:
    """The name of the tool that a schema describes, {name, ...} or {type: function, function: {name, ...}}."""
    return str(schema.get("function", schema)["name"])


def _closed(parameters: dict[str, Any]) -> dict[str, Any]:
    """The schema with unknown arguments forbidden."""
    return {**parameters, "additionalProperties": False}


def failure(reason: str) -> str:
    """A result that says why there is none."""
    return as_text({"error": reason})


def as_text(value: Any) -> str:
    """A result as the model sees it: text as it stands, other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def reason_of(error: Exception) -> str:
    """What the model is told of an exception."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
