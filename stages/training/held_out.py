"""Rows that are measured while a model is trained on others; they change nothing of its training."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch

from artifacts.errors import DataError, StageError
from stages.context import Context
from stages.data.dataset import read_dataset
from stages.data.given_tokens import require_vocabulary
from stages.data.ledger import RowLedger, say_dropped
from stages.data.types import Dataset
from stages.training.batch import Group
from stages.training.metrics import extremes, pairs
from stages.training.micro_batches import balance_loss, passes
from stages.training.objective import Completing, Concluding, Objective, Windows

if TYPE_CHECKING:
    from stages.training.loop import Trainer

INPUT = "eval_dataset"
PREFIX = "eval/"
"""How the names of their metrics begin."""
LOSS = f"{PREFIX}loss"
"""The one that the best weights have least of, unless rows say another."""
SECONDS = "eval_seconds"
"""What measuring takes, among the timings."""
_USUAL_TIMES = 10
"""How often they are measured unless the settings say otherwise."""

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """When rows are measured, and what comes of it."""

    every_steps: int | None = None
    """After so many steps, and after the last one; None: ten times over the run."""
    keeps_best: bool = False
    """The run leaves the weights of their best measurement."""
    patience: int | None = None
    """Measurements without a better one after which the run ends."""

    metric: ClassVar[str] = LOSS
    """What says which measurement is best."""
    largest: ClassVar[bool] = False
    """Whether more of it is better."""
    at_start: ClassVar[bool] = False
    """Whether the model is measured as it comes, too."""

    def is_due(self, step: int, total: int) -> bool:
        """After step number `step` of `total`; always after the last one."""
        return step == total or step % self.steps_between(total) == 0

    def steps_between(self, total: int) -> int:
        """Steps between two measurements of a run of `total`."""
        return self.every_steps or -(-total // _USUAL_TIMES)

    def stops_every(self, total: int) -> int | None:
        """The same where the run may end by them; None where it does not."""
        return None if self.patience is None else self.steps_between(total)

    def measure(self, trainer: Trainer, windows: Windows) -> dict[str, float]:
        """Metrics of the rows under the weights as they are, by names that begin with PREFIX. Collective; changes
        nothing of the training. Raises StageError where they cannot be measured."""
        raise NotImplementedError


@dataclass(frozen=True)
class HeldOut(Measured):
    """Rows with their completions: what training would make of them."""

    groups: Sequence[Group]

    @classmethod
    def of(
        cls,
        context: Context,
        vocabulary: int,
        groups_of: Callable[[Dataset, RowLedger], Sequence[Group]],
        trained: Sequence[Group],
    ) -> Self | None:
        """Input `eval_dataset`, where it is wired in; rows that are `trained` on too are said. Raises DataError where
        it does not fit or has no row left."""
        if not context.has(INPUT):
            return None
        groups = read_apart(context, vocabulary, groups_of)
        say_known(context, map(_tokens, groups), map(_tokens, trained), metric="loss")
        return cls(groups, **when(context.config))

    def measure(self, trainer: Trainer, windows: Windows) -> dict[str, float]:
        """`eval/loss` and the objective's other metrics."""
        groups = windows.held_out(self.groups) if isinstance(windows, Completing) else self.groups
        return measure(trainer, groups)


def require_items(rows: Measured | None, objective: Objective) -> None:
    """Given rows stay as they are, so this is known before the first step. Raises StageError where all of their items
    are masked."""
    if isinstance(rows, HeldOut) and rows.groups and not any(map(objective.count, rows.groups)):
        raise StageError(
            f"input {INPUT} has nothing to measure: every item of its {len(rows.groups)} rows is masked, row "
            f"{rows.groups[0].row_id} the first of them. They may be cut before what is asked for, by max_length or by "
            "what a model reads at most; give rows of which something is left, or leave the input out"
        )


def when(config: Any) -> dict[str, Any]:
    """The fields of `Measured`, of a stage's configuration (a `MeasuredConfig`)."""
    patience = config.early_stopping_patience
    return {"every_steps": config.eval_steps, "keeps_best": config.keep == "best", "patience": patience}


def read_apart(context: Context, vocabulary: int, rows_of: Callable[[Dataset, RowLedger], Sequence[R]]) -> Sequence[R]:
    """The rows of input `eval_dataset`, counted. Raises DataError where it does not fit or has no row left."""
    ledger = RowLedger()
    try:
        dataset = require_vocabulary(read_dataset(context.input(INPUT)), vocabulary)
        rows = rows_of(dataset, ledger)
    except DataError as error:
        raise DataError(f"input {INPUT}: {error}") from error
    say_dropped(context, ledger.states, output=INPUT)
    context.counts["eval_rows"] = len(rows)
    return rows


def say_known(context: Context, apart: Iterable[Hashable], trained: Iterable[Hashable], *, metric: str) -> None:
    """How many of the rows `apart` are trained on too, by what tells rows from each other."""
    known, apart = set(trained), list(apart)
    if count := sum(row in known for row in apart):
        context.counts["eval_rows_trained_on"] = count
        context.log(
            f"input {INPUT}: {count} of its {len(apart)} rows are trained on too, so that its {metric} says less of "
            "others; stage contamination takes such rows out"
        )


def _tokens(group: Group) -> int:
    """Of the prompt and the first completion."""
    return hash((*group.prefix_ids, *group.branches[0].token_ids))


def together(
    groups: Sequence[Group],
    rows: HeldOut | None,
    complete: Callable[[Sequence[Sequence[Group]]], list[list[Group]]],
) -> tuple[list[Group], HeldOut | None]:
    """The groups that are trained on, and the rows, with what `complete` adds to both sets."""
    if rows is None:
        return complete([groups])[0], None
    trained, apart = complete([groups, rows.groups])
    return trained, replace(rows, groups=apart)


@torch.no_grad()
def measure(trainer: Trainer, groups: Sequence[Group]) -> dict[str, float]:
    """`eval/loss`, divided as the loss of a step is, and the objective's other metrics of these groups, by the weights
    as they are and without dropout; at least one item is asked for. Collective. Raises StageError for a loss that is
    not finite."""
    processes, objective = trainer.processes, trainer.objective
    items = sum(objective.count(group) for group in groups)
    trainer.scorer.eval()
    sums = trainer.budget.fit(lambda tokens: passes(trainer, groups, tokens), alone=processes.size == 1)
    names = ["loss", *trainer.metric_names]
    bounds = sums.stacked_extremes(processes.rank, processes.size, processes.device)
    values = processes.sum(torch.cat([sums.stacked(names, processes.device), bounds])).tolist()
    totals = pairs(names, values)
    loss = totals.pop("loss")[0] / items + balance_loss(trainer, totals)
    if not math.isfinite(loss):
        raise StageError(
            f"the loss of input {INPUT} is {loss} after step {trainer.steps_done}, though that of the step is "
            "finite: look at its rows, or lower learning_rate"
        )
    means = {name: total / count for name, (total, count) in totals.items() if count != 0}
    if isinstance(objective, Concluding):
        found = extremes(sums.signs, values[2 * len(names) :], processes.size)
        try:
            means |= objective.concluded(means | found)
        except StageError as error:
            raise StageError(f"input {INPUT}: {error}") from error
    return named({"loss": loss, **means})


def named(metrics: dict[str, float]) -> dict[str, float]:
    """As metrics of rows that are not trained on."""
    return {f"{PREFIX}{name}": value for name, value in metrics.items()}
