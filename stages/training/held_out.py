"""Rows that are measured while a model is trained on others; they change nothing of its training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from artifacts.errors import DataError, StageError
from stages.context import Context
from stages.data.dataset import read_dataset
from stages.data.given_tokens import require_vocabulary
from stages.data.ledger import RowLedger, say_dropped
from stages.data.types import Dataset
from stages.training.batch import Group
from stages.training.metrics import Mean, MetricSums, pairs
from stages.training.objective import Completing, Concluding, Windows
from stages.training.turns import turns_of

if TYPE_CHECKING:
    from stages.training.loop import Trainer

PREFIX = "eval/"
"""How the names of their metrics begin."""
LOSS = f"{PREFIX}loss"
"""The one that the best weights have least of."""
SECONDS = "eval_seconds"
"""What measuring takes, among the timings."""
_USUAL_TIMES = 10
"""How often they are measured unless the settings say otherwise."""


@dataclass(frozen=True)
class HeldOut:
    """The rows, and after how many steps they are measured; None: ten times over the run."""

    groups: Sequence[Group]
    every_steps: int | None = None
    keeps_best: bool = False
    """The run leaves the weights that had their lowest loss."""
    patience: int | None = None
    """Measurements without a lower loss after which the run ends."""

    @classmethod
    def of(
        cls,
        context: Context,
        vocabulary: int,
        groups_of: Callable[[Dataset, RowLedger], Sequence[Group]],
        trained: Sequence[Group],
    ) -> HeldOut | None:
        """Input `eval_dataset`, where it is wired in; rows that are `trained` on too are said. Raises DataError where
        it does not fit or has no row left."""
        if not context.has("eval_dataset"):
            return None
        ledger = RowLedger()
        try:
            dataset = require_vocabulary(read_dataset(context.input("eval_dataset")), vocabulary)
            groups = groups_of(dataset, ledger)
        except DataError as error:
            raise DataError(f"input eval_dataset: {error}") from error
        say_dropped(context, ledger.states, output="eval_dataset")
        _say_known(context, groups, trained)
        context.counts["eval_rows"] = len(groups)
        config = context.config
        patience = config.early_stopping_patience
        return cls(groups, config.eval_steps, keeps_best=config.keep == "best", patience=patience)

    def is_due(self, step: int, total: int) -> bool:
        """After step number `step` of `total`; always after the last one."""
        return step == total or step % (self.every_steps or -(-total // _USUAL_TIMES)) == 0


def _say_known(context: Context, groups: Sequence[Group], trained: Sequence[Group]) -> None:
    known = set(map(_tokens, trained))
    if count := sum(_tokens(group) in known for group in groups):
        context.counts["eval_rows_trained_on"] = count
        context.log(
            f"input eval_dataset: {count} of its {len(groups)} rows are trained on too, so that its loss says less of "
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
def measure(trainer: Trainer, rows: HeldOut, windows: Windows) -> dict[str, float]:
    """`eval/loss`, divided as the loss of a step is, and the objective's other metrics of these groups, by the weights
    as they are and without dropout. Collective. Raises StageError for a loss that is not finite, or of nothing."""
    processes, objective = trainer.processes, trainer.objective
    groups = windows.held_out(rows.groups) if isinstance(windows, Completing) else rows.groups
    items = sum(objective.count(group) for group in groups)
    if items <= 0:
        raise StageError("input eval_dataset has nothing to measure: every item of its rows is masked")
    trainer.scorer.eval()
    sums = trainer.budget.fit(lambda tokens: _passes(trainer, groups, tokens), alone=processes.size == 1)
    names = ["loss", *objective.metric_names]
    totals = pairs(names, processes.sum(sums.stacked(names, processes.device)).tolist())
    loss = totals.pop("loss")[0] / items
    if not math.isfinite(loss):
        raise StageError(
            f"the loss of input eval_dataset is {loss} after step {trainer.steps_done + 1}, though that of the step is "
            "finite: look at its rows, or lower learning_rate"
        )
    means = {name: total / count for name, (total, count) in totals.items() if count != 0}
    if isinstance(objective, Concluding):
        means |= objective.concluded(means)
    return {f"{PREFIX}{name}": value for name, value in {"loss": loss, **means}.items()}


def _passes(trainer: Trainer, groups: Sequence[Group], budget_tokens: int) -> MetricSums:
    sums, parallel, scorer = MetricSums(), trainer.parallel, trainer.scorer
    for turn in turns_of(
        groups, budget_tokens, trainer.processes, shared=scorer.share_prefixes, lockstep=parallel.lockstep
    ):
        with trainer.budget.micro_batch(turn.groups):
            loss, metrics = trainer.objective(parallel.forward, scorer.layout(turn.groups))
        if turn.weight:
            sums.add({**metrics, "loss": Mean(loss, 0)})
    return sums
