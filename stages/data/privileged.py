"""Prompts with privileged context as token ids: what the student sees, and what a teacher who knows more sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from artifacts.errors import DataError
from stages.data.chat import Encoder
from stages.data.columns import fill
from stages.data.encode import ROWS_PER_BLOCK, encode_prompts, note_unknown, require_rows, require_type
from stages.data.ledger import RowLedger
from stages.data.tokenize import TokenizedPrompt, usable_prompt
from stages.data.types import ROW_ID, TEXT_COLUMNS, Dataset, Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = TEXT_COLUMNS["privileged_context"]
"""The {field}s of a template of teachers' prompts."""
TEACHER_PROMPT_TOO_LONG = "filtered: teacher's prompt too long"


def tokenize_privileged(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_length: int,
    ledger: RowLedger,
) -> list[TokenizedPrompt]:
    """The prompts of a privileged_context dataset, with `teacher_ids`: the prompt that `teacher_prompt` makes.

    A row is dropped where one of the two prompts has more than `max_length` tokens. Records each row's state in the
    ledger, and raises DataError when no row is left.
    """
    require_type(dataset, ("privileged_context",))
    encoder = Encoder(tokenizer)
    prompts = []
    for rows in dataset.blocks(ROWS_PER_BLOCK):
        shown = [{**row, "prompt": teacher_prompt(row, template)} for row in rows]
        own, others = encode_prompts(encoder, dataset, rows), encode_prompts(encoder, dataset, shown)
        for row, prompt_ids, teacher_ids in zip(rows, own, others, strict=True):
            if not usable_prompt(row, prompt_ids, max_length, ledger):
                continue
            if len(teacher_ids) > max_length:
                detail = f"{len(teacher_ids)} tokens, max_length is {max_length}"
                ledger.drop(row[ROW_ID], TEACHER_PROMPT_TOO_LONG, detail, tokens=len(prompt_ids))
                continue
            note_unknown(ledger, row[ROW_ID], encoder, teacher_ids)
            ledger.use(row[ROW_ID], tokens=len(prompt_ids))
            prompts.append(TokenizedPrompt(row[ROW_ID], prompt_ids, row, teacher_ids))
    return require_rows(prompts, dataset, ledger, max_length)


def teacher_prompt(row: Row, template: str) -> str | list[Message]:
    """`template` with the row's {prompt} and {privileged_context}.

    Of a conversation, it is the last message of the user's that becomes the filled template; of a context of messages,
    the contents are taken, a line end between them (both as TRL has it).
    """
    where, known = f"row {row[ROW_ID]}", row["privileged_context"]
    if not isinstance(known, str):
        known = "\n".join(message["content"] for message in known)

    def shown(asked: str) -> str:
        return fill(template, {"prompt": asked, "privileged_context": known}, where)

    return with_request(row, shown)


def with_request(row: Row, change: Callable[[str], str]) -> str | list[Message]:
    """The row's prompt, and of a conversation the last message of the user's, as `change` makes it. Raises DataError
    for a conversation in which no user speaks."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return change(prompt)
    places = [index for index, message in enumerate(prompt) if message["role"] == "user"]
    if not places:
        raise DataError(
            f"row {row[ROW_ID]}: its prompt has no message of a user, which is what a teacher is shown more in; leave "
            "the row out"
        )
    place = places[-1]
    return [*prompt[:place], {**prompt[place], "content": change(prompt[place]["content"])}, *prompt[place + 1 :]]
