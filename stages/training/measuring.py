"""What fresh rollouts are compared with: their log-probabilities at sampling time, and under the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from stages.training.batch import Group
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.out_of_memory import TokenBudget
from stages.training.reference import branch_logprobs

Compared = Callable[[Group], Sequence[int]]
"""A fresh group -> the indices of its branches whose log-probabilities a loss will read."""


def every_branch(group: Group) -> Sequence[int]:
    """All of a group."""
    return range(len(group.branches))


def no_branch(group: Group) -> Sequence[int]:
    """None of a group."""
    return ()


def only_where(teaches: Callable[[Group], bool], compared: Compared = every_branch) -> Compared:
    """None of groups that do not teach, which no step computes."""
    return lambda group: compared(group) if teaches(group) else ()


def measure_groups(
    trainer: Trainer,
    reference: Callable[[], AbstractContextManager[Scorer]] | None,
    config: Any,
    *,
    old: bool,
    compared: Compared = every_branch,
) -> Callable[[list[Group]], list[Group]]:
    """Adds to fresh rollouts the log-probabilities that later steps compare with: the policy's own where it will
    have moved on by then (`old`), and the reference's where the loss has a KL term. Those of branches that are not
    `compared` are NaN."""

    budget = TokenBudget(trainer.context, config.micro_batch_tokens)

    def logprobs(scorer: Scorer, groups: list[Group]) -> list[tuple[list[float], ...]]:
        wanted = [compared(group) for group in groups]
        parts = [
            replace(group, branches=tuple(group.branches[index] for index in indices))
            for group, indices in zip(groups, wanted, strict=True)
            if indices
        ]
        scored = iter(branch_logprobs(scorer, parts, budget, temperature=config.temperature))
        return [
            _of_group(group, indices, [values for values, _ in next(scored)] if indices else [])
            for group, indices in zip(groups, wanted, strict=True)
        ]

    def measure(groups: list[Group]) -> list[Group]:
        if old:
            values = logprobs(trainer.policy(), groups)
            groups = [
                replace(group, data=replace(group.data, old_logprobs=found))
                for group, found in zip(groups, values, strict=True)
            ]
        if reference is not None:
            with reference() as scorer:
                values = logprobs(scorer, groups)
            groups = [
                replace(group, data=replace(group.data, reference_logprobs=found))
                for group, found in zip(groups, values, strict=True)
            ]
        return groups

    return measure


def _of_group(group: Group, indices: Sequence[int], found: Sequence[list[float]]) -> tuple[list[float], ...]:
    """Found for the branches of these indices; a loss that read another's would not be finite."""
    by_index = dict(zip(indices, found, strict=True))
    return tuple(by_index.get(index) or [math.nan] * one.asked for index, one in enumerate(group.branches))
