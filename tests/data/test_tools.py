"""Tools in conversations: every form they come in, what is refused, and that a dataset gives back what went in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import DataError
from stages.data import RowLedger, read_dataset, tokenize_pairs, tokenize_prompts, tokenize_sequences
from tests.data.characters import build_tokenizer, dataset, ids
from tests.data.test_dataset import write
from tests.stages.normalized import Normalized, assistant, system, user, write_jsonl

SCHEMAS = [
    {"type": "function", "function": {"name": "light", "parameters": {"type": "object", "properties": {"room": {}}}}},
    {"type": "function", "function": {"name": "add", "parameters": {"z": 1, "a": 2}}},
]


def call(*calls: tuple[str, dict[str, Any]], content: str = "") -> dict[str, Any]:
    """An assistant's message with tool calls."""
    made = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in calls]
    return {"role": "assistant", "content": content, "tool_calls": made}


def result(content: str, **fields: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, **fields}


ADD = call(("add", {"z": 1, "a": 2}))
TALK = [user("1+2?"), ADD, result("3", name="add"), assistant("It is 3.")]
PLAIN = [user("Hi."), assistant("Ho.")]


def normalized(folder: Path, *rows: dict[str, Any], **config: Any) -> Normalized:
    return Normalized(folder, write_jsonl(folder / "in" / "rows.jsonl", list(rows)), **config)


def test_a_dataset_gives_back_what_went_in(tmp_path: Path) -> None:
    """Rows with other arguments, and with none, side by side: no field of one appears in another, no key is moved."""
    rows = [
        {"messages": TALK, "tools": SCHEMAS},
        {"messages": [user("a"), call(("light", {"room": ["b"]})), result("ok"), assistant("c")], "tools": SCHEMAS[:1]},
        {"messages": PLAIN, "tools": None},
    ]
    made = normalized(tmp_path, *rows)
    assert made.rows() == rows
    assert json.dumps(made.rows()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]) == '{"z": 1, "a": 2}'
    assert json.dumps(made.rows()[0]["tools"]) == json.dumps(SCHEMAS)
    again = write(tmp_path / "again", list(made.dataset()), kind="language_modeling", conversational=True)
    assert list(read_dataset(again)) == list(made.dataset())


def test_a_dataset_without_tools_is_stored_as_ever(tmp_path: Path) -> None:
    import pyarrow.parquet

    folder = write(tmp_path / "a", [{"row_id": "r", "messages": PLAIN}], "language_modeling", conversational=True)
    kind = pyarrow.parquet.read_schema(folder / "data.parquet").field("messages").type
    assert str(kind) in (
        "list<element: struct<role: string, content: string>>",
        "list<item: struct<role: string, content: string>>",
    )


@pytest.mark.parametrize(
    "calls",
    [
        [{"name": "add", "arguments": {"z": 1, "a": 2}}],
        [{"type": "function", "function": {"name": "add", "arguments": '{"z": 1, "a": 2}'}}],
        '[{"function": {"name": "add", "arguments": {"z": 1, "a": 2}}}]',
    ],
)
def test_forms_of_calls_and_schemas(tmp_path: Path, calls: Any) -> None:
    """Arguments as JSON text (OpenAI's), calls without their envelope, all of it as JSON text; content null."""
    spoken = {"role": "assistant", "content": None, "tool_calls": calls}
    row = {"messages": [TALK[0], spoken, *TALK[2:]], "tools": json.dumps(SCHEMAS)}
    assert normalized(tmp_path, row).rows() == [{"messages": TALK, "tools": SCHEMAS}]


def test_parts_of_text_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "2?"}]
    assert normalized(tmp_path, {"messages": [user(parts), assistant("3")]}).rows() == [  # type: ignore[arg-type]
        {"messages": [user("1+2?"), assistant("3")]}
    ]


def test_prompts_may_end_with_results_and_completions_with_calls(tmp_path: Path) -> None:
    made = normalized(tmp_path, {"messages": TALK}, type="prompt_completion")
    assert made.rows() == [{"prompt": TALK[:3], "completion": TALK[3:]}]
    made = normalized(tmp_path / "call", {"messages": TALK[:2], "tools": SCHEMAS}, type="prompt_completion")
    assert made.rows() == [{"prompt": TALK[:1], "completion": [ADD], "tools": SCHEMAS}]
    pair = {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": [assistant("4")]}
    assert normalized(tmp_path / "pair", pair).rows() == [pair]


TWO = call(("add", {}), ("light", {}))
TWO_NAMED = {**TWO, "tool_calls": [{"id": name, **one} for name, one in zip("xy", TWO["tool_calls"], strict=True)]}
GOOD = [
    [system("s"), user("a"), TWO, result("1"), result("2"), assistant("b"), user("c"), assistant("d")],
    [user("a"), ADD, result("1"), ADD, result("2"), assistant("b")],
    [user("a"), TWO_NAMED, result("2", tool_call_id="y"), result("1", tool_call_id="x"), assistant("b")],
]


@pytest.mark.parametrize("messages", GOOD)
def test_results_stand_behind_their_calls(tmp_path: Path, messages: list[dict[str, Any]]) -> None:
    assert normalized(tmp_path, {"messages": messages}).rows() == [{"messages": messages}]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (
            [user("a"), ADD],
            r"'messages\[1\]': a tool call without its result; found user, assistant; leave the row out",
        ),
        ([user("a"), ADD, user("b"), assistant("c")], r"'messages\[1\]': a tool call without its result"),
        ([user("a"), ADD, assistant("c")], r"'messages\[1\]': a tool call without its result"),
        ([user("a"), TWO, result("1"), assistant("c")], r"'messages\[2\]': a tool call without its result"),
        ([user("a"), result("1"), assistant("c")], r"'messages\[1\]': a tool's result without a tool call before it"),
        (
            [user("a"), ADD, result("1"), result("2"), assistant("c")],
            r"'messages\[3\]': a tool's result without a tool",
        ),
        ([user("a"), ADD, result("1"), user("b"), assistant("c")], r"'messages': wrong role order"),
        ([user("a"), ADD, result("1")], r"'messages': the conversation does not end with the assistant"),
        (
            [user("a"), TWO_NAMED, result("1", tool_call_id="z"), result("2"), assistant("c")],
            r"'messages\[2\]': a tool's result for a call that was not made; found tool_call_id 'z'",
        ),
        ([{**user("a"), "tool_calls": [1]}, assistant("b")], r"'messages\[0\].tool_calls': only the assistant calls"),
        (
            [user("a"), {**ADD, "tool_calls": [{"name": ""}]}],
            r"'messages\[1\].tool_calls\[0\]': a tool call is an object",
        ),
        (
            [user("a"), {**ADD, "tool_calls": [{"name": "f", "arguments": "{"}]}],
            r"'messages\[1\].tool_calls\[0\].arguments': not JSON",
        ),
        (
            [user("a"), {**ADD, "tool_calls": [{"name": "f", "arguments": [1]}]}],
            r"arguments': arguments are an object, or JSON text of one; found a list",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, messages: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl row 1: field .*{problem}"):
        normalized(tmp_path, {"messages": messages})


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ({"name": "f"}, r"'tools': must be a list of tool schemas, or JSON text of one; found an object"),
        ("{", r"'tools': not JSON"),
        ([{"name": "f"}, {"function": {}}], r"'tools\[1\]': a tool schema is an object with a name"),
    ],
)
def test_mistakes_in_schemas_are_named(tmp_path: Path, tools: Any, problem: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl row 1: field .*{problem}"):
        normalized(tmp_path, {"messages": TALK, "tools": tools})


@pytest.mark.parametrize("column", ["image", "images", "video", "videos", "audio"])
def test_images_and_sound_are_refused_not_ignored(tmp_path: Path, column: str) -> None:
    row = {"messages": PLAIN, column: [{"path": "a.png"}]}
    with pytest.raises(DataError, match=f"rows.jsonl row 2: field '{column}': images, videos and sound are not"):
        normalized(tmp_path, {"messages": PLAIN, column: None}, row)
    made = normalized(tmp_path / "dropped", {"messages": TALK}, row, on_bad_row="drop")
    (state,) = [name for name in made.ledger()["states"] if name != "used"]
    assert state.startswith(f"bad row: field '{column}': images, videos and sound are not supported")
    assert normalized(tmp_path / "text", row, keep_columns=[]).rows() == [{"messages": PLAIN}]


# a system part with the tools' names in it, calls as JSON in brackets, results behind =
WITH_TOOLS = (
    "{% for tool in tools or [] %}={{ tool.function.name[0] }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<{{ call.function.name[0] }}"
    "{% for key, value in call.function.arguments.items() %}{{ key }}{{ value }}{% endfor %}"
    "{% endfor %}<eos>"
    "{% elif m.role == 'user' %}<{{ m.content }}{% else %}={{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
SPOKEN = [user("ab"), call(("fa", {"d": "b"})), result("c"), assistant("de")]
TWO_TOOLS = [{"type": "function", "function": {"name": name}} for name in ("fa", "ge")]


def test_the_model_sees_schemas_calls_and_results() -> None:
    """By hand: =f and =g for the tools, <ab the question, ><fdb$ the call, =c its result, >de$ the answer."""
    tokenizer = build_tokenizer(template=WITH_TOOLS)
    data = dataset("language_modeling", [{"messages": SPOKEN, "tools": TWO_TOOLS}, {"messages": SPOKEN}], True)
    seen = tokenize_sequences(data, tokenizer, max_length=None, ledger=RowLedger())
    assert [one.token_ids for one in seen] == [ids("=f=g<ab><fdb$=c>de$"), ids("<ab><fdb$=c>de$")]
    pairs = dataset(
        "preference",
        [{"prompt": SPOKEN[:3], "chosen": SPOKEN[3:], "rejected": [assistant("h")], "tools": TWO_TOOLS}],
        True,
    )
    (pair,) = tokenize_pairs(pairs, tokenizer, max_length=None, ledger=RowLedger())
    assert (pair.prompt_ids, pair.chosen_ids) == (ids("=f=g<ab><fdb$=c>"), ids("de$"))
    prompts = dataset("prompt", [{"prompt": SPOKEN[:3], "tools": TWO_TOOLS}], True)
    (prompt,) = tokenize_prompts(prompts, tokenizer, max_length=None, ledger=RowLedger())
    assert prompt.prompt_ids == ids("=f=g<ab><fdb$=c>")


@pytest.mark.parametrize(
    ("loop", "what"), [("tool in tools or []", "tools"), ("call in m.tool_calls or []", "tool calls")]
)
def test_a_template_that_hides_tools_is_refused(loop: str, what: str) -> None:
    template = WITH_TOOLS.replace(f"for {loop}", f"for {loop[:4]} in []")
    data = dataset("language_modeling", [{"messages": SPOKEN, "tools": TWO_TOOLS}], True)
    with pytest.raises(DataError, match=f"row r0: the chat template does not show {what}, so the model would not see"):
        tokenize_sequences(data, build_tokenizer(template=template), max_length=None, ledger=RowLedger())


def test_tables_give_no_row_the_arguments_of_another(tmp_path: Path) -> None:
    """A column of objects holds the fields of all rows, null where a row has none; JSON lines hold each its own."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    light = {"type": "function", "function": {"name": "light", "parameters": {"room": "text"}}}
    rows = [
        {"messages": TALK, "tools": SCHEMAS[1:]},
        {"messages": [user("a"), call(("light", {"room": ["b"]})), result("ok"), assistant("c")], "tools": [light]},
        {"messages": PLAIN, "tools": None},
    ]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    expected = normalized(tmp_path / "lines", *rows).rows()
    for name in ("rows.parquet", "saved"):
        assert Normalized(tmp_path / f"of {name}", tmp_path / name).rows() == expected
