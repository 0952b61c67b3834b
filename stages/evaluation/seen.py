"""Rows as the model under test reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stages.data.types import PAIRED

if TYPE_CHECKING:
    from stages.data.ledger import RowLedger
    from stages.data.seen import TokenizedRow
    from stages.data.tokenize import TokenizedSequence
    from stages.data.types import Dataset

_ANSWERED = {"accuracy", "reward"}


def tokenized(
    config: Any, dataset: Dataset, tokenizer: Any, context_length: int, ledger: RowLedger
) -> Sequence[TokenizedRow]:
    """Of the tasks the first that the configuration shows to be done: prompts that the model is to answer, pairs, or
    the rows whose loss is measured (what of them counts is marked)."""
    from stages.data.open_prompts import open_prompts
    from stages.data.pairs import tokenize_pairs
    from stages.data.truncation import RowLimit

    tasks = set(config.tasks)
    if tasks & _ANSWERED or (not tasks and config.rewards):
        return open_prompts(config, dataset, tokenizer, context_length, ledger)
    longest = RowLimit.of(config.max_length, context_length)
    if dataset.type in PAIRED:
        return tokenize_pairs(dataset, tokenizer, max_length=longest, ledger=ledger)
    return loss_rows(config, dataset, tokenizer, longest, ledger)


def loss_rows(
    config: Any, dataset: Dataset, tokenizer: Any, longest: int, ledger: RowLedger
) -> Sequence[TokenizedSequence]:
    """The rows whose loss is measured, of at most so many tokens."""
    from stages.data.tokenize import tokenize_sequences

    return tokenize_sequences(
        dataset,
        tokenizer,
        max_length=longest,
        ledger=ledger,
        assistant_only_loss=config.assistant_only_loss,
        completion_only_loss=config.completion_only_loss,
    )
