"""Rows as the model reads them, part by part, with what of them is learned: for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch

from stages.data.pairs import TokenizedPair
from stages.data.steps import TokenizedSteps
from stages.data.tokenize import TokenizedPrompt, TokenizedSequence
from stages.data.unpaired import TokenizedCompletion

TokenizedRow = TokenizedSequence | TokenizedPair | TokenizedCompletion | TokenizedSteps | TokenizedPrompt


@dataclass(frozen=True)
class Part:
    """A stretch of a row. `learned[t]`: token t is predicted, or judged, and counts in the loss."""

    name: str
    token_ids: Sequence[int]
    learned: Sequence[bool]

    @classmethod
    def whole(cls, name: str, token_ids: Sequence[int], *, learned: bool) -> Part:
        return cls(name, token_ids, [learned] * len(token_ids))


@singledispatch
def parts_of(row: TokenizedRow) -> list[Part]:
    """The parts of a row in the order in which they are read; completions of a pair each follow its prompt."""
    raise TypeError(f"not a tokenized row: {type(row).__name__}")


@parts_of.register
def _(row: TokenizedSequence) -> list[Part]:
    return [Part("row", row.token_ids, row.loss_mask)]


@parts_of.register
def _(row: TokenizedPair) -> list[Part]:
    completions = {"chosen": row.chosen_ids, "rejected": row.rejected_ids, "reference": row.gold_ids or []}
    found = [Part.whole(name, ids, learned=True) for name, ids in completions.items() if ids]
    return [Part.whole("prompt", row.prompt_ids, learned=False), *found]


@parts_of.register
def _(row: TokenizedCompletion) -> list[Part]:
    name = "desirable" if row.label else "undesirable"
    return [
        Part.whole("prompt", row.prompt_ids, learned=False),
        Part.whole(name, row.completion_ids, learned=True),
    ]


@parts_of.register
def _(row: TokenizedSteps) -> list[Part]:
    """Up to the end of each step, whose last token is where it is judged."""
    found, start = [], 0
    for end, label in zip(row.ends, row.labels, strict=True):
        ids = row.token_ids[start : end + 1]
        found.append(Part("right" if label else "wrong", ids, [False] * (len(ids) - 1) + [True]))
        start = end + 1
    return found


@parts_of.register
def _(row: TokenizedPrompt) -> list[Part]:
    return [Part.whole("prompt", row.prompt_ids, learned=False)]
