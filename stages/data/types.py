"""The dataset types and what a dataset is once it is read: typed rows with ids.

| type                | standard                  | conversational (lists of {role, content}) |
|---------------------|---------------------------|-------------------------------------------|
| language_modeling   | text                      | messages                                  |
| prompt              | prompt                    | prompt                                    |
| prompt_completion   | prompt, completion        | prompt, completion                        |
| preference          | prompt, chosen, rejected  | prompt, chosen, rejected                  |
| unpaired_preference | prompt, completion, label | prompt, completion, label                 |
| triple_preference   | prompt, chosen, rejected and reference, the gold completion; both namings     |
| privileged_context  | prompt, and privileged_context, which a teacher sees besides; both namings       |
| stepwise_supervision | prompt; completions and labels: a list of steps, and whether each is right  |
| pretokenized        | input_ids; if given, labels, completion_mask, assistant_masks, as long as these |
| pretokenized_preference | prompt_ids, chosen_ids, rejected_ids                                     |

Names as TRL's. Other columns are kept beside them; `tools` of conversational rows holds the schemas of the tools that
the assistant may call, `chat_template_kwargs` further arguments of the chat template.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

DatasetType = Literal[
    "language_modeling",
    "prompt",
    "prompt_completion",
    "preference",
    "unpaired_preference",
    "triple_preference",
    "privileged_context",
    "stepwise_supervision",
    "pretokenized",
    "pretokenized_preference",
]

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}; `tool_calls` of the assistant, `name` and
`tool_call_id` of a tool."""

Row = dict[str, Any]

TEXT_COLUMNS: dict[str, tuple[str, ...]] = {
    "language_modeling": ("text",),
    "prompt": ("prompt",),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired_preference": ("prompt", "completion"),
    "triple_preference": ("prompt", "chosen", "rejected", "reference"),
    "privileged_context": ("prompt", "privileged_context"),
    "stepwise_supervision": ("prompt",),
    "pretokenized": (),
    "pretokenized_preference": (),
}
"""The columns that hold text or messages, standard naming."""

PAIRED = ("preference", "triple_preference", "pretokenized_preference")
"""The types that hold pairs of a chosen and a rejected completion."""
SEQUENCE_TYPES = ("language_modeling", "prompt_completion", "pretokenized")
"""The types that are trained on as they are, one sequence a row."""

PROMPT_TYPES = tuple(name for name, columns in TEXT_COLUMNS.items() if columns)
"""The types that have prompts: all but token ids, though of language_modeling only conversations."""

FURTHER_COLUMNS: dict[str, tuple[str, ...]] = {
    "unpaired_preference": ("label",),
    "stepwise_supervision": ("completions", "labels"),
    "pretokenized": ("input_ids",),
    "pretokenized_preference": ("prompt_ids", "chosen_ids", "rejected_ids"),
}
"""The columns that a type asks for besides."""

TOKEN_TYPES = ("pretokenized", "pretokenized_preference")
"""The types whose rows are token ids."""

TOKEN_MASKS = ("labels", "completion_mask", "assistant_masks")
"""The columns that a pretokenized dataset may have: all of its rows, or none of them."""

OPTIONAL_COLUMNS: dict[str, tuple[str, ...]] = {"pretokenized": TOKEN_MASKS}
"""The columns that mean something to a type and need not be there."""

ROW_ID = "row_id"


def text_columns(dataset_type: str, conversational: bool) -> tuple[str, ...]:
    """The columns of that type that hold text (standard) or messages (conversational)."""
    if dataset_type == "language_modeling" and conversational:
        return ("messages",)
    return TEXT_COLUMNS[dataset_type]


def required_columns(dataset_type: str, conversational: bool) -> tuple[str, ...]:
    """Every column that a row of that type must have, `row_id` excepted."""
    return text_columns(dataset_type, conversational) + FURTHER_COLUMNS.get(dataset_type, ())


@dataclass(frozen=True)
class Dataset:
    """Typed rows. `rows[i]` is a dict with `row_id`, the columns of the type, and whatever else was kept."""

    type: str
    conversational: bool
    columns: tuple[str, ...]
    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def select(self, indices: Sequence[int]) -> Dataset:
        """The rows at `indices`, in that order."""
        return Dataset(self.type, self.conversational, self.columns, [self.rows[index] for index in indices])

    def blocks(self, size: int) -> Iterator[list[Row]]:
        """The rows in order, at most `size` at a time."""
        for start in range(0, len(self.rows), size):
            yield [self.rows[index] for index in range(start, min(start + size, len(self.rows)))]
