"""The one shape that rows of a dataset type are brought to, whatever form they came in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from artifacts.errors import DataError
from stages.data.conversation import CUT, common_prompt, common_text
from stages.data.faults import (
    EMPTY_COMPLETION,
    EQUAL_PAIR,
    FILL,
    NO_SHARED_PROMPT,
    Dropped,
    RowError,
    require_columns,
    what_is,
)
from stages.data.pretokenized import shape_preference as shape_preference_ids
from stages.data.pretokenized import shape_sequence
from stages.data.types import TEXT_COLUMNS, Row

_TEXTS = ("text", "messages", "prompt", "completion", "chosen", "rejected")
COMPLETIONS = ("completion", "chosen", "rejected", "reference")
USED_COLUMNS = {
    "language_modeling": ("text", "messages", "prompt", "completion"),
    "prompt": ("prompt", "messages"),
    "prompt_completion": ("prompt", "completion", "messages"),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired_preference": ("prompt", "completion", "messages"),
    "triple_preference": ("prompt", "chosen", "rejected", "reference"),
    "privileged_context": ("prompt", "privileged_context"),
    "stepwise_supervision": ("prompt",),
    "pretokenized": (),
    "pretokenized_preference": (),
}
"""The columns of text or messages that a row of each type may be made of; others stay as they are."""
_FORMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "language_modeling": (("messages",), ("text",), ("prompt", "completion")),
    "prompt": (("prompt",), ("messages",)),
    "prompt_completion": (("prompt", "completion"), ("messages",)),
    "preference": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "unpaired_preference": (("prompt", "completion", "label"), ("messages", "label")),
    "pretokenized_preference": (("prompt_ids", "chosen_ids", "rejected_ids"), ("chosen_ids", "rejected_ids")),
}
"""Of types whose rows come with one or another set of columns: these sets, the first that is there being used."""


def form_of(row: Row, kind: str) -> tuple[str, ...]:
    """The columns that the row is made of; none for types with one form only, and where it is incomplete."""
    present = {name for name, value in row.items() if value is not None}
    return next((form for form in _FORMS.get(kind, ()) if present.issuperset(form)), ())


def require_form(row: Row, before: tuple[str, ...], where: str, kind: str) -> None:
    """Raises RowError where the row lacks a column that the rows before it are made of."""
    form = form_of(row, kind)
    text_for_messages = {form, before} == {("text",), ("messages",)}  # mixed types, which are named as such
    if form != before and not text_for_messages:
        require_columns(row, before, where, kind)


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
    if {"prompt", "privileged_context"} <= present:
        return "privileged_context"
    if "prompt" in present and not present & {"chosen", "rejected"}:
        return "prompt"
    if "input_ids" in present:
        return "pretokenized"
    if {"chosen_ids", "rejected_ids"} <= present:
        return "pretokenized_preference"
    raise DataError(
        f"{where}: cannot tell the dataset type from the columns {', '.join(row) or '(none)'}; {_meant(row)}"
    )


def _meant(row: Row) -> str:
    """What to write, where a column looks like a conversation."""
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and {"role", "from"} & value[0].keys():
            return f"{name!r} looks like a conversation: name it with `columns: {{messages: {name}}}`"
    return "set `type`, and name the columns with `columns: {prompt: theirs}` or `templates`"


def from_conversations(row: Row) -> Row:
    """ShareGPT's name for messages."""
    if "messages" not in row and isinstance(row.get("conversations"), list):
        row["messages"] = row.pop("conversations")
    return row


def from_alpaca(row: Row) -> Row:
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


def without_repeated_prompt(row: Row, used: tuple[str, ...], *, transcript: bool) -> Row:
    """A prompt that its completions repeat is cut from them; to a prompt of text, completions may be messages.

    `transcript`: the prompt was one, so that completions of text are the assistant's.
    """
    prompt = row.get("prompt")
    names = [name for name in COMPLETIONS if name in used and row.get(name) is not None]
    if prompt is None or not names:
        return row
    if isinstance(prompt, str) and all(isinstance(row[name], list) for name in names):
        prompt = row["prompt"] = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        if prompt and prompt[-1] == {"role": "assistant", "content": ""}:  # `Assistant:` at a transcript's end
            prompt = row["prompt"] = prompt[:-1]
        for name in names:
            if isinstance(row[name], str) and transcript:
                row[name] = [{"role": "assistant", "content": row[name].strip()}]
        if prompt and all(row[name][: len(prompt)] == prompt for name in names):
            for name in names:
                row[name] = row[name][len(prompt) :]
    return row


def _shape_language(row: Row, where: str) -> Row:
    if row.get("messages") is None and row.get("text") is None:
        joined_columns = ("prompt", "completion") if {"prompt", "completion"} & row.keys() else ("text",)
        require_columns(row, joined_columns, where, "language_modeling")
        joined = row.pop("prompt") + row.pop("completion")
        row["messages" if isinstance(joined, list) else "text"] = joined
    elif isinstance(row.get("text"), list):
        row["messages"] = row.pop("text")
    return row


def _shape_prompt(row: Row, where: str) -> Row:
    if row.get("prompt") is None and isinstance(row.get("messages"), list):
        row["prompt"] = row.pop("messages")
    require_columns(row, ("prompt",), where, "prompt")
    if isinstance(row["prompt"], list) and row["prompt"][-1:] == [{"role": "assistant", "content": ""}]:
        row["prompt"] = row["prompt"][:-1]
    return row


def _shape_completion(row: Row, where: str, kind: str = "prompt_completion") -> Row:
    messages = row.get("messages")
    if row.get("prompt") is None and isinstance(messages, list):
        if not messages:
            raise RowError(where, "messages", "a conversation without messages")
        if messages[-1]["role"] != "assistant":
            shown = ", ".join(message["role"] for message in messages)
            raise RowError(where, "messages", "the conversation does not end with the assistant", shown, CUT)
        del row["messages"]
        row["prompt"], row["completion"] = messages[:-1], messages[-1:]
    require_columns(row, ("prompt", "completion"), where, kind)
    return row


def _shape_unpaired(row: Row, where: str) -> Row:
    row = _shape_completion(row, where, "unpaired_preference")
    require_columns(row, ("label",), where, "unpaired_preference")
    return {**row, "label": _label(row["label"], where, "label")}


def _label(value: Any, where: str, place: str) -> bool:
    labels = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if str(value).lower() not in labels:
        raise RowError(where, place, "must be true or false", repr(value))
    return labels[str(value).lower()]


def _shape_steps(row: Row, where: str) -> Row:
    """A prompt of text, and as many labels as steps."""
    require_columns(row, ("prompt", "completions", "labels"), where, "stepwise_supervision")
    steps, labels = row["completions"], row["labels"]
    for column, value in (("completions", steps), ("labels", labels)):
        if not isinstance(value, list):
            raise RowError(where, column, "must be a list with an entry a step", what_is(value))
    if not isinstance(row["prompt"], str):
        raise RowError(where, "prompt", "the prompt of stepwise rows is text", what_is(row["prompt"]))
    if len(steps) != len(labels):
        raise RowError(where, "labels", "every step has one label", f"{len(labels)} labels for {len(steps)} steps")
    for number, step in enumerate(steps):
        if not isinstance(step, str):
            raise RowError(where, f"completions[{number}]", "a step is text", what_is(step))
        if not step.strip():
            raise RowError(where, f"completions[{number}]", EMPTY_COMPLETION, do=FILL)
    if not steps:
        raise RowError(where, "completions", "a row without steps", do=FILL)
    return {**row, "labels": [_label(value, where, f"labels[{number}]") for number, value in enumerate(labels)]}


def _shape_preference(row: Row, where: str) -> Row:
    """With an implicit prompt, what chosen and rejected share from their start is the prompt."""
    require_columns(row, ("chosen", "rejected"), where, "preference")
    if row.get("prompt") is not None:
        return row
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError(where, "rejected", "mixed types", "text beside messages")
    if chosen == rejected:
        raise Dropped(EQUAL_PAIR, "rejected")
    shared = common_text(chosen, rejected) if isinstance(chosen, str) else common_prompt(chosen, rejected)
    if shared == 0:
        raise Dropped(NO_SHARED_PROMPT, "chosen, rejected")
    return {**row, "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _shape_triple(row: Row, where: str) -> Row:
    require_columns(row, TEXT_COLUMNS["triple_preference"], where, "triple_preference")
    return row


def _shape_privileged(row: Row, where: str) -> Row:
    """Beside a prompt of messages, a context of text is one message of the user's."""
    require_columns(row, TEXT_COLUMNS["privileged_context"], where, "privileged_context")
    row = _shape_prompt(row, where)
    if isinstance(row["prompt"], list) and isinstance(row["privileged_context"], str):
        row["privileged_context"] = [{"role": "user", "content": row["privileged_context"]}]
    return row


SHAPES: dict[str, Callable[[Row, str], Row]] = {
    "language_modeling": _shape_language,
    "prompt": _shape_prompt,
    "prompt_completion": _shape_completion,
    "preference": _shape_preference,
    "unpaired_preference": _shape_unpaired,
    "triple_preference": _shape_triple,
    "privileged_context": _shape_privileged,
    "stepwise_supervision": _shape_steps,
    "pretokenized": shape_sequence,
    "pretokenized_preference": shape_preference_ids,
}
