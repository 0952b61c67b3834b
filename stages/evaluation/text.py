"""Scores of text that the dataset gives: the loss of rows, and which of a pair's completions scores higher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator

from artifacts.errors import StageError
from stages.context import Context
from stages.data.tokenize import TokenizedSequence
from stages.shards import in_shards
from stages.training.batch import Group
from stages.training.language_modeling import sequence_group
from stages.training.model import Scorer
from stages.training.out_of_memory import TokenBudget
from stages.training.reference import branch_logprobs
from stages.training.reward_scoring import score_branches

_SHARD_ROWS = 256
"""Rows of one shard: what a killed run computes again at most."""

BranchScores = Callable[[Scorer, Sequence[Group], TokenBudget], list[list[float]]]
"""(model, groups, token budget) -> [groups][branches]"""


def sequence_losses(
    context: Context, accelerator: Accelerator, scorer: Scorer, rows: Sequence[TokenizedSequence]
) -> list[tuple[float, int]]:
    """(summed negative log-probability of the trained tokens, their number) of every row."""
    groups = [sequence_group(row) for row in rows]
    sums = _scores(context, accelerator, "loss", scorer, groups, logprob_sums)
    return [(-total, sum(row.loss_mask)) for (total,), row in zip(sums, rows, strict=True)]


def pair_logprobs(
    context: Context, accelerator: Accelerator, scorer: Scorer, groups: Sequence[Group], name: str
) -> list[list[float]]:
    """[pairs][chosen, rejected] summed log-probabilities under a causal model."""
    return _scores(context, accelerator, name, scorer, groups, logprob_sums)


def pair_rewards(
    context: Context, accelerator: Accelerator, scorer: Scorer, groups: Sequence[Group]
) -> list[list[float]]:
    """[pairs][chosen, rejected] scores of a reward model."""
    return _scores(context, accelerator, "pair-rewards", scorer, groups, score_branches)


def logprob_sums(scorer: Scorer, groups: Sequence[Group], budget: TokenBudget) -> list[list[float]]:
    """[groups][branches] summed log-probabilities of the asked-for tokens, added up in double precision."""
    scored = branch_logprobs(scorer, groups, budget)
    return [[math.fsum(values) for values, _ in branches] for branches in scored]


def _scores(
    context: Context,
    accelerator: Accelerator,
    name: str,
    scorer: Scorer,
    groups: Sequence[Group],
    score: BranchScores,
) -> list[list[float]]:
    budget = TokenBudget(context, context.config.micro_batch_tokens)

    def compute(part: Sequence[Group]) -> list[dict[str, Any]]:
        context.tokens += sum(group.length for group in part)
        rows = score(scorer, part, budget)
        for group, values in zip(part, rows, strict=True):
            if not all(map(math.isfinite, values)):
                raise StageError(
                    f"row {group.row_id}: the model's scores are not finite ({values}); its weights are damaged, or "
                    "bf16 overflows: look at the training before"
                )
        return [{"scores": values} for values in rows]

    rows = in_shards(context, accelerator, name, groups, compute, size=_SHARD_ROWS)
    return [row["scores"] for row in rows]
