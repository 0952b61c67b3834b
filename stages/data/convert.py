"""Rows of whatever form to rows of one dataset type. The first row decides the form; every other must have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from artifacts.errors import DataError
from stages.data.conversation import (
    RowError,
    check_order,
    common_prompt,
    common_text,
    from_messages,
    from_transcript,
    is_transcript,
)
from stages.data.types import PAIRED, ROW_ID, TEXT_COLUMNS, Message, Row, required_columns, text_columns

RECOGNIZED = frozenset(
    [
        "text",
        "messages",
        "conversations",
        "prompt",
        "completion",
        "chosen",
        "rejected",
        "reference",
        "label",
        "completions",
        "labels",
        "instruction",
        "input",
        "output",
    ]
)
"""Source columns that a typed row may be made of."""

_TEXTS = ("text", "messages", "prompt", "completion", "chosen", "rejected")
_COMPLETIONS = ("completion", "chosen", "rejected", "reference")
_USED = {
    "language_modeling": ("text", "messages", "prompt", "completion"),
    "prompt": ("prompt", "messages"),
    "prompt_completion": ("prompt", "completion", "messages"),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired_preference": ("prompt", "completion", "messages"),
    "triple_preference": ("prompt", "chosen", "rejected", "reference"),
    "stepwise_supervision": ("prompt",),
}
"""The columns that a row of each type may be made of; others stay as they are."""

EMPTY_TEXT = "filtered: empty text"
EQUAL_PAIR = "filtered: chosen equals rejected"
NO_SHARED_PROMPT = "filtered: chosen and rejected share no prompt"


class Dropped(Exception):
    """The row is valid and of no use."""

    def __init__(self, state: str, detail: str = "") -> None:
        super().__init__(state)
        self.state, self.detail = state, detail


Note = Callable[[str, str], None]
"""(what was changed, detail)."""


class Converter:
    """Converts rows of one source; holds the form that its first row had."""

    def __init__(self, wanted: str, system: str | None) -> None:
        """`wanted`: a dataset type or `auto`. `system`: put before conversations that have no system message."""
        self._wanted = wanted
        self._system = system
        self.type = ""
        self.conversational = False
        self._transcripts: set[str] = set()

    def convert(self, row: Row, where: str, note: Note) -> Row:
        """The typed row: the type's columns, then the others. Raises RowError or Dropped."""
        if ROW_ID in row:
            do = "map it to another name: columns: {source_id: row_id}"
            raise RowError(where, ROW_ID, "the column name is ours", do=do)
        row = _from_alpaca(_from_conversations(dict(row)))
        kind = self.type or (detect_type(row, where) if self._wanted == "auto" else self._wanted)
        first = not self.type
        if first:
            texts = {name: row[name] for name in _USED[kind] if isinstance(row.get(name), str)}
            self._transcripts = {name for name, text in texts.items() if is_transcript(text)}
        for name in _USED[kind]:
            if row.get(name) is not None:
                row[name] = self._standardized(row[name], where, name, note)
        row = _SHAPES[kind](_without_repeated_prompt(row, _USED[kind]), where)
        conversational = _form(row, kind, where)
        if not first and conversational != self.conversational:
            reason = f"mixed types: the rows before it hold {'messages' if self.conversational else 'text'}"
            found = "messages" if conversational else "text"
            raise RowError(where, text_columns(kind, conversational)[0], reason, found, "make all rows alike")
        row = self._checked(row, kind, conversational, where)
        self.type, self.conversational = kind, conversational
        return row

    def _standardized(self, value: Any, where: str, name: str, note: Note) -> Any:
        if isinstance(value, str):
            return from_transcript(value, where, name) if name in self._transcripts else value
        if isinstance(value, list):
            messages, left_out = from_messages(value, where, name)
            if left_out:
                note(f"message fields left out: {', '.join(left_out)}", name)
            return messages
        raise RowError(where, name, "must be text or a list of messages", f"a {type(value).__name__}")

    def _checked(self, row: Row, kind: str, conversational: bool, where: str) -> Row:
        columns = required_columns(kind, conversational)
        typed = {column: row[column] for column in columns}
        if conversational:
            first = columns[0]
            if self._system is not None and typed[first][:1] and typed[first][0]["role"] != "system":
                typed[first] = [{"role": "system", "content": self._system}, *typed[first]]
            _check_conversation(typed, kind, where)
        elif self._system is not None:
            raise RowError(where, columns[0], "a system message needs conversational rows", "text")
        _drop_useless(typed, kind, text_columns(kind, conversational))
        return {**typed, **{name: value for name, value in row.items() if name not in typed}}


def detect_type(row: Row, where: str) -> str:
    """The dataset type by its columns. Raises DataError when they fit none."""
    present = {name for name, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= present:
        return "preference"
    if {"prompt", "completions", "labels"} <= present:
        return "stepwise_supervision"
    if {"prompt", "completion"} <= present:
        return "unpaired_preference" if "label" in present else "prompt_completion"
    if present & {"text", "messages"}:
        return "language_modeling"
    if "prompt" in present and not present & {"chosen", "rejected"}:
        return "prompt"
    raise DataError(
        f"{where}: cannot tell the dataset type from the columns {', '.join(row) or '(none)'}; set `type`, and name "
        f"the columns with `columns: {{prompt: theirs}}` or `templates`"
    )


def _from_conversations(row: Row) -> Row:
    if "messages" not in row and isinstance(row.get("conversations"), list):
        row["messages"] = row.pop("conversations")
    return row


def _from_alpaca(row: Row) -> Row:
    """instruction, input (may be empty) and output as a question and its answer."""
    if not {"instruction", "output"} <= set(row) or set(row) & set(_TEXTS):
        return row
    instruction, given, output = row.pop("instruction"), row.pop("input", None), row.pop("output")
    question = f"{instruction}\n\n{given}" if isinstance(given, str) and given else instruction
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": output}],
        **row,
    }


def _without_repeated_prompt(row: Row, used: tuple[str, ...]) -> Row:
    """A prompt that its completions repeat is cut from them; prompts and completions get one form."""
    prompt = row.get("prompt")
    names = [name for name in _COMPLETIONS if name in used and row.get(name) is not None]
    if prompt is None or not names:
        return row
    if isinstance(prompt, str) and all(isinstance(row[name], list) for name in names):
        prompt = row["prompt"] = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        if prompt and prompt[-1] == {"role": "assistant", "content": ""}:  # `Assistant:` at a transcript's end
            prompt = row["prompt"] = prompt[:-1]
        for name in names:
            if isinstance(row[name], str):
                row[name] = [{"role": "assistant", "content": row[name].strip()}]
        if prompt and all(row[name][: len(prompt)] == prompt for name in names):
            for name in names:
                row[name] = row[name][len(prompt) :]
    return row


def _shape_language(row: Row, where: str) -> Row:
    if row.get("messages") is None and row.get("text") is None:
        _require(row, ("prompt", "completion"), where, "language_modeling")
        joined = row.pop("prompt") + row.pop("completion")
        row["messages" if isinstance(joined, list) else "text"] = joined
    elif isinstance(row.get("text"), list):
        row["messages"] = row.pop("text")
    return row


def _shape_prompt(row: Row, where: str) -> Row:
    if row.get("prompt") is None and isinstance(row.get("messages"), list):
        row["prompt"] = row.pop("messages")
    _require(row, ("prompt",), where, "prompt")
    if isinstance(row["prompt"], list) and row["prompt"][-1:] == [{"role": "assistant", "content": ""}]:
        row["prompt"] = row["prompt"][:-1]
    return row


def _shape_completion(row: Row, where: str) -> Row:
    messages = row.get("messages")
    if row.get("prompt") is None and isinstance(messages, list) and messages:
        del row["messages"]
        row["prompt"], row["completion"] = messages[:-1], messages[-1:]
    _require(row, ("prompt", "completion"), where, "prompt_completion")
    return row


def _shape_unpaired(row: Row, where: str) -> Row:
    row = _shape_completion(row, where)
    _require(row, ("label",), where, "unpaired_preference")
    return {**row, "label": _label(row["label"], where, "label")}


def _label(value: Any, where: str, place: str) -> bool:
    labels = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if str(value).lower() not in labels:
        raise RowError(where, place, "must be true or false", repr(value))
    return labels[str(value).lower()]


def _shape_steps(row: Row, where: str) -> Row:
    """A prompt of text, and as many labels as steps."""
    _require(row, ("prompt", "completions", "labels"), where, "stepwise_supervision")
    steps, labels = row["completions"], row["labels"]
    for column, value in (("completions", steps), ("labels", labels)):
        if not isinstance(value, list):
            raise RowError(where, column, "must be a list with an entry a step", f"a {type(value).__name__}")
    if not isinstance(row["prompt"], str):
        raise RowError(where, "prompt", "the prompt of stepwise rows is text", f"a {type(row['prompt']).__name__}")
    if len(steps) != len(labels):
        raise RowError(where, "labels", "every step has one label", f"{len(labels)} labels for {len(steps)} steps")
    for number, step in enumerate(steps):
        if not isinstance(step, str):
            raise RowError(where, f"completions[{number}]", "a step is text", f"a {type(step).__name__}")
        if not step.strip():
            raise Dropped(EMPTY_TEXT, f"completions[{number}]")
    if not steps:
        raise Dropped(EMPTY_TEXT, "completions")
    return {**row, "labels": [_label(value, where, f"labels[{number}]") for number, value in enumerate(labels)]}


def _shape_preference(row: Row, where: str) -> Row:
    """With an implicit prompt, what chosen and rejected share from their start is the prompt."""
    _require(row, ("chosen", "rejected"), where, "preference")
    if row.get("prompt") is not None:
        return row
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError(where, "rejected", "mixed types", "text beside messages")
    if chosen == rejected:
        raise Dropped(EQUAL_PAIR)
    shared = common_text(chosen, rejected) if isinstance(chosen, str) else common_prompt(chosen, rejected)
    if shared == 0:
        raise Dropped(NO_SHARED_PROMPT)
    return {**row, "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _shape_triple(row: Row, where: str) -> Row:
    _require(row, TEXT_COLUMNS["triple_preference"], where, "triple_preference")
    return row


_SHAPES: dict[str, Callable[[Row, str], Row]] = {
    "language_modeling": _shape_language,
    "prompt": _shape_prompt,
    "prompt_completion": _shape_completion,
    "preference": _shape_preference,
    "unpaired_preference": _shape_unpaired,
    "triple_preference": _shape_triple,
    "stepwise_supervision": _shape_steps,
}


def _require(row: Row, columns: tuple[str, ...], where: str, kind: str) -> None:
    for column in columns:
        if row.get(column) is None:
            reason = f"a {kind} row has no {column!r}"
            found = f"columns {', '.join(name for name, value in row.items() if value is not None) or 'none'}"
            raise RowError(where, column, reason, found, "map it with `columns`, or choose another `type`")


def _form(row: Row, kind: str, where: str) -> bool:
    """Whether the row is conversational. Raises RowError where one column is and another is not."""
    chat = kind == "language_modeling" and row.get("messages") is not None
    columns = text_columns(kind, chat)
    forms = {isinstance(row[column], list) for column in columns}
    if len(forms) != 1 or (chat and forms != {True}):
        held = ", ".join(f"{name} is {'messages' if isinstance(row[name], list) else 'text'}" for name in columns)
        raise RowError(where, columns[-1], "mixed types: text and messages in one row", held)
    return forms.pop()


def _check_conversation(typed: dict[str, Any], kind: str, where: str) -> None:
    for column, messages in typed.items():
        if column == "label":
            continue
        if column in ("messages", "prompt"):
            ends = "assistant" if column == "messages" else "user"
            check_order(messages, where, column, begins="user", ends=ends)
        elif messages:
            check_order(messages, where, column, begins="assistant", ends="assistant")
        else:
            reason = "the conversation does not end with the assistant"
            raise RowError(where, column, reason, "nothing after the prompt")


def _drop_useless(typed: dict[str, Any], kind: str, texts: tuple[str, ...]) -> None:
    for column in texts:
        if not _last_text(typed[column]).strip():
            raise Dropped(EMPTY_TEXT, column)
    if kind in PAIRED and typed["chosen"] == typed["rejected"]:
        raise Dropped(EQUAL_PAIR)


def _last_text(value: str | list[Message]) -> str:
    return value if isinstance(value, str) else value[-1]["content"]
