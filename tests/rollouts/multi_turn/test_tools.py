"""Tools: what the model is told of them, which calls are made, and what comes back."""

from __future__ import annotations

import pytest

from artifacts.errors import StageError
from stages.rollouts.multi_turn.call_format import ToolCall
from stages.rollouts.multi_turn.tools import ToolBox, as_text
from tests.rollouts.multi_turn.scripted import HERE

BOX = ToolBox([f"{HERE}:add", f"{HERE}:shout", f"{HERE}:divide"])


def test_schemas_come_from_signature_and_docstring() -> None:
    number = {"type": "integer"}
    assert BOX.schemas[0] == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "The sum.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {**number, "description": "One number."},
                    "b": {**number, "description": "The other."},
                },
                "required": ["a", "b"],
            },
            "return": {"type": "integer"},
        },
    }


PROBLEMS = [
    (ToolCall("add", {"a": 1, "b": 2}), None),
    (ToolCall("ad", {"a": 1}), "no tool 'ad'; did you mean 'add'?; there are add, divide, shout"),
    (ToolCall("add", {"a": 1}), "arguments: 'b' is a required property"),
    (ToolCall("add", {"a": 1, "b": "2"}), "argument b: '2' is not of type 'integer'"),
    (
        ToolCall("add", {"a": 1, "b": 2, "c": 3}),
        "arguments: Additional properties are not allowed ('c' was unexpected)",
    ),
    (ToolCall("add", problem="not JSON"), "not JSON"),
]


@pytest.mark.parametrize(("call", "problem"), PROBLEMS)
def test_calls_are_checked_against_the_schema(call: ToolCall, problem: str | None) -> None:
    assert BOX.problem(call) == problem


def test_a_row_may_have_fewer_tools() -> None:
    call = ToolCall("add", {"a": 1, "b": 2})
    assert BOX.problem(call, frozenset({"shout"})) == "no tool 'add'; there are shout"


def test_results_become_text() -> None:
    """Text as it stands, other values as JSON, and what JSON has no word for as Python writes it."""
    assert [as_text(value) for value in ("é", 3, {"é": None}, 1 + 2j)] == ["é", "3", '{"é": null}', '"(1+2j)"']


def test_a_tool_without_description_is_refused() -> None:
    with pytest.raises(StageError, match=r"tool .*:undocumented: Cannot generate .* no docstring!; the model is told"):
        ToolBox([f"{HERE}:undocumented"])


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(StageError, match="two tools have one name: add, add"):
        ToolBox([f"{HERE}:add", f"{HERE}:add"])
