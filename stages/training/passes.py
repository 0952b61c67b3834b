"""A pass without gradients over any number of groups, cut into micro-batches that fit the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from stages.training.batch import Group, TokenBatch, plan_micro_batches
from stages.training.model import Scorer
from stages.training.out_of_memory import TokenBudget


def without_gradients(
    scorer: Scorer,
    groups: Sequence[Group],
    budget: TokenBudget,
    compute: Callable[[list[int], TokenBatch], None],
) -> None:
    """`compute(indices of groups, these groups as a batch)` until every group had its turn once.

    A micro-batch that does not fit is cut again, with all that is still to come; what is done stays done.
    """
    waiting = dict.fromkeys(range(len(groups)))

    def attempt(tokens: int) -> None:
        left = list(waiting)
        for part in plan_micro_batches([groups[index] for index in left], tokens, scorer.share_prefixes):
            indices = [left[place] for place in part]
            together = [groups[index] for index in indices]
            with budget.micro_batch(together), torch.no_grad():
                compute(indices, scorer.layout(together))
            for index in indices:
                del waiting[index]

    budget.fit(attempt)
