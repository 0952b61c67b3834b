"""Everything that may be wrong with a row of each dataset type: the error names the row and the field.

Each case is a file of two rows, a good one and the same with a fault. Files that are no JSON, columns that change their
type and fields that are mapped are in `tests/stages/test_normalize_bad_input.py`, tool calls in `test_tools.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from artifacts.errors import DataError
from tests.stages.normalized import Normalized, assistant, system, user, write_jsonl

Row = dict[str, Any]
Messages = list[dict[str, Any]]
TALK = [user("a"), assistant("b"), user("c"), assistant("d")]

GOOD: dict[str, Row] = {
    "language_modeling": {"text": "ab"},
    "language_modeling, chat": {"messages": TALK},
    "prompt": {"prompt": "ab"},
    "prompt, chat": {"prompt": TALK[:3]},
    "prompt_completion": {"prompt": "ab", "completion": "cd"},
    "prompt_completion, chat": {"prompt": TALK[:3], "completion": TALK[3:]},
    "preference": {"prompt": "ab", "chosen": "cd", "rejected": "e"},
    "preference, chat": {"prompt": TALK[:3], "chosen": TALK[3:], "rejected": [assistant("e")]},
    "unpaired_preference": {"prompt": "ab", "completion": "cd", "label": True},
    "unpaired_preference, chat": {"prompt": TALK[:3], "completion": TALK[3:], "label": False},
    "triple_preference": {"prompt": "ab", "chosen": "cd", "rejected": "e", "reference": "f"},
    "triple_preference, chat": {
        "prompt": TALK[:3],
        "chosen": TALK[3:],
        "rejected": [assistant("e")],
        "reference": [assistant("f")],
    },
    "privileged_context": {"prompt": "ab", "privileged_context": "cd"},
    "privileged_context, chat": {"prompt": TALK[:3], "privileged_context": "cd"},
    "stepwise_supervision": {"prompt": "ab", "completions": ["c", "d"], "labels": [True, False]},
    "pretokenized": {"input_ids": [3, 4], "labels": [-100, 4]},
    "pretokenized_preference": {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5]},
}
COMPLETIONS = ("completion", "chosen", "rejected", "reference")
TEXTS = ("text", "prompt", *COMPLETIONS)
Fault = tuple[str, Row, str, str]
"""(name of the good row, the row with a fault, field, what is said of it)."""


def changed(name: str, **columns: Any) -> Row:
    return {**GOOD[name], **columns}


def kind_of(name: str) -> str:
    return name.partition(",")[0]


def missing_fields() -> Iterator[Fault]:
    """Every column of every type, left out and null."""
    for name, row in GOOD.items():
        for column in row:
            if column == "labels" and kind_of(name) == "pretokenized":
                reason = "no 'labels', and the rows before it have one"
            else:
                reason = f"a {kind_of(name)} row has no '{column}'"
            yield name, {key: value for key, value in row.items() if key != column}, column, reason
            yield name, changed(name, **{column: None}), column, reason


def wrong_values() -> Iterator[Fault]:
    for name, row in GOOD.items():
        if kind_of(name) not in ("stepwise_supervision", "pretokenized", "pretokenized_preference"):
            for column in set(row) - {"label"}:
                yield (
                    name,
                    changed(name, **{column: 3}),
                    column,
                    "must be text or a list of messages; found a whole number",
                )
                yield (
                    name,
                    changed(name, **{column: {"a": 1}}),
                    column,
                    "must be text or a list of messages; found an object",
                )
                yield name, changed(name, **{column: [3]}), f"{column}[0]", "a message is an object with role and"
    for name in ("unpaired_preference", "unpaired_preference, chat"):
        for value in ("good", 2, 0.5, [True], ""):
            yield name, changed(name, label=value), "label", f"must be true or false; found {value!r}"
    for name in ("preference", "preference, chat", "triple_preference"):
        for value in ("big", [1], True):
            yield name, changed(name, margin=value), "margin", f"must be a number; found {value!r}"


def mixed_types() -> Iterator[Fault]:
    """Text where a row has messages, and the other way; and a whole row of the other form."""
    for name, row in GOOD.items():
        chat = f"{name}, chat"
        if chat not in GOOD:
            continue
        columns = [column for column in row if column in TEXTS]
        yield name, GOOD[chat], *_other_form({"text": "messages"}.get(columns[0], columns[0]), "text", "messages")
        yield chat, row, *_other_form(columns[0], "messages", "text")
        for column in columns[1:]:
            if len(columns) > 2:  # beside a prompt of text, completions of messages alone are a known form
                reason = f"mixed types: text and messages in one row; found {columns[0]} is text"
                yield name, changed(name, **{column: GOOD[chat][column]}), column, reason
            reason = f"mixed types: text and messages in one row; found {columns[0]} is messages"
            yield chat, changed(chat, **{column: row[column]}), column, reason


def _other_form(column: str, before: str, now: str) -> tuple[str, str]:
    return column, f"mixed types: the rows before it hold {before}; found {now}; make all rows alike"


def empty_completions() -> Iterator[Fault]:
    reason = "the completion is empty"
    for name, row in GOOD.items():
        for column in set(row) & {*COMPLETIONS, "messages"}:
            for nothing in ("", " \n"):
                if isinstance(row[column], str):
                    yield name, changed(name, **{column: nothing}), column, reason
                else:
                    last = len(row[column]) - 1
                    empty = [*row[column][:last], assistant(nothing)]
                    yield name, changed(name, **{column: empty}), f"{column}[{last}]", reason


def steps() -> Iterator[Fault]:
    name = "stepwise_supervision"
    yield name, changed(name, labels=[True]), "labels", "every step has one label; found 1 labels for 2 steps"
    yield name, changed(name, completions=["c"]), "labels", "every step has one label; found 2 labels for 1 steps"
    yield name, changed(name, labels=[True, "maybe"]), "labels[1]", "must be true or false; found 'maybe'"
    yield name, changed(name, labels=[None, True]), "labels[0]", "must be true or false; found None"
    yield name, changed(name, labels=True), "labels", "must be a list with an entry a step; found true or false"
    yield name, changed(name, completions="cd"), "completions", "must be a list with an entry a step; found text"
    yield name, changed(name, completions=["c", 3]), "completions[1]", "a step is text; found a whole number"
    yield name, changed(name, completions=[assistant("c"), "d"]), "completions[0]", "a step is text; found an object"
    yield name, changed(name, completions=["c", " "]), "completions[1]", "the completion is empty"
    yield name, changed(name, completions=[], labels=[]), "completions", "a row without steps"
    yield name, changed(name, prompt=TALK[:1]), "prompt", "the prompt of stepwise rows is text; found a list"
    yield name, changed(name, prompt=3), "prompt", "must be text"


def contexts() -> Iterator[Fault]:
    """Of a privileged context of messages, which may come in any order."""
    name, column = "privileged_context, chat", "privileged_context"
    yield name, changed(name, **{column: []}), column, "a conversation without messages"
    calling = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    reason = "a privileged context is text, without tool calls"
    yield name, changed(name, **{column: [user("a"), calling]}), f"{column}[1].tool_calls", reason
    yield name, changed(name, **{column: [user("a"), {"role": "user"}]}), f"{column}[1]", "a message has no 'content'"
    reason = "mixed types: text and messages in one row; found prompt is text, privileged_context is messages"
    yield "privileged_context", changed("privileged_context", **{column: [user("a")]}), column, reason


def tokens() -> Iterator[Fault]:
    name = "pretokenized"
    yield name, changed(name, labels=[4]), "labels", "must be as long as input_ids; found 1 for 2 tokens"
    yield (
        name,
        changed(name, labels=[4, 5]),
        "labels[0]",
        "a label is -100 (not trained) or the token itself, not the one",
    )
    yield name, changed(name, input_ids=[3, -1]), "input_ids[1]", "a token id is a whole number"
    yield name, changed(name, input_ids=[3, "4"]), "input_ids[1]", "a token id is a whole number"
    yield name, changed(name, input_ids="34"), "input_ids", "must be a list of token ids"


NO_TEXT = "a message's content must be text; found "
MESSAGE_FAULTS: dict[str, tuple[Callable[[Messages], Any], str, str]] = {
    "a message of text": (lambda talk: ["x", *talk[1:]], "[0]", "a message is an object with role and content"),
    "no role": (lambda talk: [{"content": "x"}, *talk[1:]], "[0]", "a message has no 'role'"),
    "no content": (lambda talk: [{"role": talk[0]["role"]}, *talk[1:]], "[0]", "a message has no 'content'"),
    "unknown role": (lambda talk: [{**talk[0], "role": "narrator"}, *talk[1:]], "[0]", "unknown role; found 'narr"),
    "role null": (lambda talk: [{**talk[0], "role": None}, *talk[1:]], "[0]", "unknown role; found None"),
    "a number": (lambda talk: [{**talk[0], "content": 3}, *talk[1:]], "[0]", NO_TEXT + "a whole number"),
    "content null": (lambda talk: [{**talk[0], "content": None}, *talk[1:]], "[0]", NO_TEXT + "null"),
    "two in a row": (lambda talk: [talk[0], *talk], "", "wrong role order: user and assistant take turns"),
    "system later": (lambda talk: [*talk, system("x")], "", "wrong role order: user and assistant take turns"),
    "a result without a call": (
        lambda talk: [talk[0], {"role": "tool", "content": "x"}, *talk[1:]],
        "[1]",
        "a tool's result without a tool call before it",
    ),
}  # fmt: skip
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
ORDERS: dict[str, list[tuple[Messages, str, str]]] = {
    "messages": [
        ([], "", "a conversation without messages"),
        (TALK[1:], "", "wrong role order: it must begin with the user"),
        (TALK[:3], "", "the conversation does not end with the assistant"),
        ([system("x")], "", "wrong role order: it must begin with the user"),
        ([system("x"), system("y"), *TALK], "", "wrong role order: it must begin with the user"),
        ([user("a"), CALL, user("c"), assistant("d")], "[1]", "a tool call without its result"),
        ([user("a"), CALL], "[1]", "a tool call without its result"),
    ],
    "prompt": [
        ([], "", "a conversation without messages"),
        (TALK[1:3], "", "wrong role order: it must begin with the user"),
        (TALK[:2], "", "the conversation does not end with the user"),
        ([user("a"), CALL, user("c")], "[1]", "a tool call without its result"),
    ],
    "completion": [
        ([], "", "the conversation does not end with the assistant; found nothing after the prompt"),
        ([user("x"), assistant("d")], "", "wrong role order: it must begin with the assistant"),
        ([system("x"), assistant("d")], "", "wrong role order: it must begin with the assistant"),
        ([assistant("d"), user("x")], "", "the conversation does not end with the assistant"),
        ([CALL, assistant("d")], "[0]", "a tool call without its result"),
    ],
}


def conversations() -> Iterator[Fault]:
    for name, row in GOOD.items():
        for column, talk in row.items():
            if not name.endswith("chat") or not isinstance(talk, list):
                continue
            for fault, place, reason in MESSAGE_FAULTS.values():
                yield name, changed(name, **{column: fault(talk)}), column + place, reason
            for messages, place, reason in ORDERS["completion" if column in COMPLETIONS else column]:
                yield name, changed(name, **{column: messages}), column + place, reason


GENERATED = [missing_fields, wrong_values, mixed_types, empty_completions, steps, contexts, tokens, conversations]


def normalized(folder: Path, rows: list[Row], **config: Any) -> Normalized:
    return Normalized(folder, write_jsonl(folder / "in" / "rows.jsonl", rows), **config)


@pytest.mark.parametrize("faults", GENERATED, ids=lambda faults: faults.__name__)
def test_row_and_field_are_named(tmp_path: Path, faults: Callable[[], Iterator[Fault]]) -> None:
    problems = []
    for number, (name, row, field, reason) in enumerate(faults()):
        expected = f"rows.jsonl row 2: field {field!r}: {reason}"
        try:
            normalized(tmp_path / str(number), [GOOD[name], row], type=kind_of(name))
            said = "nothing"
        except DataError as error:
            said = str(error)
        if expected not in said:
            problems.append(f"{name}: {row}\n  expected: {expected}\n  said: {said}")
    assert not problems, "\n".join(problems)


def test_a_fault_in_parquet_is_named_alike(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["a", "b"], "completion": ["c", None]}), tmp_path / "rows.parquet"
    )
    with pytest.raises(DataError, match=r"rows\.parquet row 2: field 'completion': a prompt_completion row has no"):
        Normalized(tmp_path, tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("row", "state", "detail"),
    [
        ({"prompt": "ab", "chosen": "cd", "rejected": "cd"}, "filtered: chosen equals rejected", "rejected"),
        ({"prompt": " ", "chosen": "cd", "rejected": "e"}, "filtered: empty text", "prompt"),
    ],
)
def test_rows_that_are_of_no_use_are_counted_by_row_and_field(
    tmp_path: Path, row: Row, state: str, detail: str
) -> None:
    ledger = normalized(tmp_path, [GOOD["preference"], row]).ledger()
    assert ledger["states"] == {"used": 1, state: 1}
    assert ledger["examples"][state] == [{"row": "row 2", "detail": detail}]
    with pytest.raises(DataError, match=rf"no row of the source is left \(1 {state}; the first: row 1, {detail}\)"):
        normalized(tmp_path / "alone", [row])


def test_faults_can_be_dropped_and_counted(tmp_path: Path) -> None:
    name = "preference"
    rows = [GOOD[name], changed(name, chosen=""), changed(name, rejected=" "), changed(name, chosen=None)]
    ledger = normalized(tmp_path, rows, on_bad_row="drop").ledger()
    assert ledger["states"] == {
        "used": 1,
        "bad row: field 'chosen': the completion is empty": 1,
        "bad row: field 'rejected': the completion is empty": 1,
        "bad row: field 'chosen': a preference row has no 'chosen'": 1,
    }
