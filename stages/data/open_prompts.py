"""Prompts that a model is to complete, as every stage that samples takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from artifacts.errors import StageError
from stages.data.ledger import RowLedger
from stages.data.tokenize import TokenizedPrompt, tokenize_prompts
from stages.data.truncation import RowLimit
from stages.data.types import Dataset, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Lengths(Protocol):
    """The configuration of a stage that samples; both in tokens."""

    @property
    def max_length(self) -> int: ...

    @property
    def max_completion_length(self) -> int: ...


def open_prompts(
    config: Lengths,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    ledger: RowLedger,
    *,
    complete: Callable[[Row], Row] = lambda row: row,
) -> list[TokenizedPrompt]:
    """The prompts that leave room for a completion in the model's context; the ledger says which do not. `complete`:
    what gives a row the schemas of its tools."""
    longest = room_for_prompts(config, context_length)
    return tokenize_prompts(dataset, tokenizer, max_length=longest, ledger=ledger, complete=complete)


def room_for_prompts(config: Lengths, context_length: int) -> RowLimit:
    """The longest prompt, in tokens, that leaves room for a completion. Raises StageError when there is none."""
    if context_length - config.max_completion_length < 1:
        raise StageError(
            f"max_completion_length is {config.max_completion_length}, but the model takes {context_length} tokens "
            "in all, so there is no room for a prompt; lower it"
        )
    return RowLimit.of(config.max_length, context_length, config.max_completion_length)
