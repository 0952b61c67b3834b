"""Arguments of the chat template in rows: the column `chat_template_kwargs`, for example {"enable_thinking": false}."""

from __future__ import annotations

from typing import Any

from stages.data.faults import RowError, what_is
from stages.data.tools import TEMPLATE_ARGUMENTS, from_json
from stages.data.types import TEXT_COLUMNS, Row

OWN_ARGUMENTS = frozenset(
    {
        "self",
        "conversation",
        "conversations",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "kwargs",
        "raise_exception",
        "strftime_now",
        "bos_token",
        "eos_token",
        "unk_token",
        "sep_token",
        "pad_token",
        "cls_token",
        "mask_token",
    }
)
"""What every rendering of a chat template is given or set to already (transformers' names)."""


def template_arguments(value: Any, where: str) -> dict[str, Any] | None:
    """The arguments in a row's column: an object, or JSON text of one; None where there are none."""
    given = from_json(value, where, TEMPLATE_ARGUMENTS)
    if given is None or given == {}:
        return None
    if not isinstance(given, dict):
        reason = "must be an object of the chat template's arguments, or JSON text of one"
        raise RowError(where, TEMPLATE_ARGUMENTS, reason, what_is(given))
    for name in given:
        if not name.isidentifier():
            reason = "an argument's name has letters, digits and _ only, and no digit first"
            raise RowError(where, TEMPLATE_ARGUMENTS, reason, repr(name), "name it as the chat template does")
        if name in OWN_ARGUMENTS:
            reason = "rows may not set the chat template's own arguments"
            raise RowError(where, TEMPLATE_ARGUMENTS, reason, repr(name), "leave it out")
    return given


def refuse_template_arguments(row: Row, kind: str, where: str) -> None:
    """Raises RowError for a row of plain text or token ids that has some: no template would read them."""
    given = row.get(TEMPLATE_ARGUMENTS)
    if given is None or given in ("", {}):
        return
    reason = "arguments of the chat template need conversational rows"
    found = "text" if TEXT_COLUMNS[kind] else "token ids"
    do = "give messages, or leave the column out with keep_columns"
    raise RowError(where, TEMPLATE_ARGUMENTS, reason, found, do)
