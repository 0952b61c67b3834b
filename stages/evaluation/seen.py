"""Rows as the model under test reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from artifacts.errors import StageError
from stages.evaluation.tasks import obstacles_of_type

if TYPE_CHECKING:
    from stages.data.ledger import RowLedger
    from stages.data.token_parts import TokenizedRow
    from stages.data.tokenize import TokenizedSequence
    from stages.data.types import Dataset

_ANSWERED = {"accuracy", "reward"}


def tokenized(
    config: Any, dataset: Dataset, tokenizer: Any, context_length: int, ledger: RowLedger
) -> Sequence[TokenizedRow]:
    """Of the tasks that the rows permit, the first that the configuration shows to be done: prompts that the model is
    to answer, pairs, or the rows whose loss is measured (what of them counts is marked).

    Raises StageError where a task is asked for that such rows do not permit.
    """
    from stages.data.open_prompts import open_prompts
    from stages.data.pairs import tokenize_pairs
    from stages.data.truncation import RowLimit

    obstacles = obstacles_of_type(dataset)
    for task in config.tasks:
        if obstacles[task]:
            raise StageError(f"task {task}: {obstacles[task]}")
    tasks = config.tasks or [task for task, obstacle in obstacles.items() if not obstacle]
    longest = RowLimit.of(config.max_length, context_length)
    if not _ANSWERED & {*tasks} or not (config.tasks or config.rewards):
        if "preference_accuracy" in tasks:
            return tokenize_pairs(dataset, tokenizer, max_length=longest, ledger=ledger)
        if "loss" in tasks:
            return loss_rows(config, dataset, tokenizer, longest, ledger)
    return open_prompts(config, dataset, tokenizer, context_length, ledger)


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
