"""Calls of tools: the format that a template has, and what of a model's text is a call."""

from __future__ import annotations

from typing import Any

import pytest

from artifacts.errors import StageError
from stages.rollouts.multi_turn.call_format import (
    Read,
    Said,
    ToolCall,
    call_reader,
    json_turn,
    listed,
    tagged,
    with_arguments,
)
from tests.data.chat_templates import (
    CHATML,
    GEMMA,
    LLAMA_3,
    MISTRAL_3,
    MISTRAL_SMALL,
    QWEN_2_5,
    QWEN_3,
    tokenizer_of,
    unmarked,
)

TEMPLATES: list[tuple[str, str, Read]] = [
    (QWEN_2_5, "<|im_end|>", tagged),
    (QWEN_3, "<|im_end|>", tagged),
    (LLAMA_3, "<|eot_id|>", json_turn),
    (MISTRAL_3, "</s>", listed),
    (MISTRAL_SMALL, "</s>", with_arguments),
]


@pytest.mark.parametrize(("template", "end", "expected"), TEMPLATES)
def test_the_template_says_the_format(template: str, end: str, expected: Read) -> None:
    assert call_reader(tokenizer_of(unmarked(template), eos_token=end)) is expected


@pytest.mark.parametrize("template", [CHATML, GEMMA])
def test_templates_without_calls_are_refused(template: str) -> None:
    with pytest.raises(StageError, match="the chat template takes no calls of tools"):
        call_reader(tokenizer_of(unmarked(template)))


def test_an_unknown_format_is_shown() -> None:
    template = unmarked(QWEN_2_5).replace("<tool_call>", "<call>").replace("</tool_call>", "</call>")
    with pytest.raises(StageError, match=r"writes a call of a tool as '<call>.*probe_tool.*none of the formats"):
        call_reader(tokenizer_of(template, eos_token="<|im_end|>"))


ADD = ToolCall("add", {"a": 1, "b": 2})
READ: list[tuple[Read, str, str, tuple[ToolCall, ...]]] = [
    (tagged, '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>', "", (ADD,)),
    (tagged, 'So:<tool_call>{"name":"add","arguments":"{\\"a\\":1,\\"b\\":2}"}</tool_call>', "So:", (ADD,)),
    (tagged, '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g"}', "", (ToolCall("f"), ToolCall("g"))),
    (tagged, "no call {}", "no call {}", ()),
    (json_turn, '{"name": "add", "parameters": {"a": 1, "b": 2}}', "", (ADD,)),
    (json_turn, '<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}', "", (ADD,)),
    (json_turn, '{"a": 1}', '{"a": 1}', ()),
    (json_turn, "{ is a brace", "{ is a brace", ()),
    (listed, '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}, "id": "abcdefghi"}]', "",
     (ToolCall("add", {"a": 1, "b": 2}, id="abcdefghi"),)),
    (listed, "words", "words", ()),
    (with_arguments, 'So[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}[TOOL_CALLS]f[ARGS]{}', "So", (ADD, ToolCall("f"))),
]  # fmt: skip


@pytest.mark.parametrize(("read", "text", "content", "calls"), READ)
def test_calls_are_read(read: Read, text: str, content: str, calls: tuple[ToolCall, ...]) -> None:
    assert read(text, ()) == Said(content, calls)


UNREADABLE: list[tuple[Read, str, str, str]] = [
    (tagged, '<tool_call>{"name": "add", </tool_call>', "unreadable", "not JSON: "),
    (tagged, "<tool_call>[1]</tool_call>", "unreadable", "a call is an object with name and arguments"),
    (tagged, '<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "add", "arguments must be an object"),
    (tagged, '<tool_call>{"name": "add", "arguments": "a"}</tool_call>', "add", "arguments are not JSON: "),
    (tagged, "<tool_call>" + "[" * 100_000, "unreadable", "not JSON: "),
    (json_turn, "<|python_tag|>add(1, 2)", "unreadable", "not JSON: "),
    (listed, "[TOOL_CALLS] add", "unreadable", "not JSON: "),
    (listed, "[TOOL_CALLS] []", "unreadable", "an empty list of calls"),
    (with_arguments, "[TOOL_CALLS]add{}", "add{}", r"no [ARGS] with arguments after the name"),
    (with_arguments, "[TOOL_CALLS]add[ARGS]{", "unreadable", "not JSON: "),
]


@pytest.mark.parametrize(("read", "text", "name", "problem"), UNREADABLE)
def test_calls_that_are_none_say_why(read: Read, text: str, name: str, problem: str) -> None:
    (call,) = read(text, ()).calls
    assert call.name == name and call.problem is not None and call.problem.startswith(problem)


def test_a_response_template_goes_first() -> None:
    """transformers' own description of how a model answers, where a tokenizer has one."""
    tokenizer: Any = tokenizer_of(unmarked(QWEN_2_5), eos_token="<|im_end|>")
    tokenizer.response_template = {"any": "thing"}
    seen = []

    def parse(text: str, *, prefix: list[int], tools: Any) -> dict[str, Any]:
        seen.append((text, prefix, tools))
        if text == "bad":
            raise ValueError("no such thing")
        return {"content": "w", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}

    tokenizer.parse_response = parse
    read = call_reader(tokenizer, [{"name": "f"}])
    assert read("said", (1, 2)) == Said("w", (ToolCall("f", {"x": 1}),))
    assert read("bad", ()).calls[0].problem == "no such thing"
    assert seen[0] == ("said", [1, 2], [{"name": "f"}])
