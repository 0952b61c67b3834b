"""Rollouts that a teacher reads once more: what their groups carry, and what is left of them for a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import compress
from itertools import count as counted

import torch
from torch import Tensor

from stages.losses.host_numbers import on_device
from stages.training.batch import Group, TokenBatch
from stages.training.policy_known import Rollouts
from stages.training.policy_step import OfStep
from stages.training.rollout_records import Sampled


@dataclass(frozen=True)
class TaughtRollouts(Rollouts):
    """With the prompts of the teacher, one a branch."""

    teacher_prompts: tuple[list[int], ...] = ()
    """Token ids; empty: the branch is not taught."""
    completions: int = 0
    """Completions that the group stands for, some of which may be left out of it."""
    items_per_completion: float | None = None
    """What a completion of this step comes to in the items that the step's loss is divided by."""
    items_per_group: float | None = None
    """What a group that is computed in this step comes to in them."""

    @property
    def taught(self) -> list[int]:
        """Which branches are, by their indices."""
        return [index for index, prompt in enumerate(self.teacher_prompts) if prompt]


def with_lessons(sampled: Sampled, group: Group) -> Group:
    """The group with the teacher's prompts of those completions of which some token is asked for."""
    prompts = tuple(
        lesson.teacher_ids if branch.asked else []
        for lesson, branch in zip(sampled.lessons, group.branches, strict=True)
    )
    return replace(group, data=TaughtRollouts(**vars(group.data), teacher_prompts=prompts, completions=len(prompts)))


def is_taught(group: Group) -> bool:
    """Whether the teacher has a prompt for any of its branches."""
    return any(group.data.teacher_prompts)


def taught_branches(group: Group) -> list[int]:
    """The indices of branches that the teacher has a prompt for."""
    taught: list[int] = group.data.taught
    return taught


def taught_places(batch: TokenBatch) -> Tensor:
    """[n] which of the asked-for tokens belong to taught branches."""
    prompts = [prompt for group in batch.groups for prompt in group.data.teacher_prompts]
    taught = [bool(prompt) for prompt, count in zip(prompts, batch.counts, strict=True) for _ in range(count)]
    return on_device(list(compress(range(len(taught)), taught)), batch.branch_N.device, torch.long)


def taught_step(
    of_step: OfStep,
    count: Callable[[Group], float],
    *,
    alone: bool,
    is_idle: Callable[[Group], bool] = lambda group: False,
) -> OfStep:
    """As another, and each group knows what a completion counts in the step. `count`: of the items of a group;
    `alone`: nothing but the distillation is learnt, so that branches without a teacher need not be computed; `is_idle`:
    of groups that are not computed."""

    def settled(groups: list[Group], on_policy: bool) -> list[Group]:
        groups = of_step(groups, on_policy)
        items, computed = sum(map(count, groups)), sum(not is_idle(group) for group in groups)
        share = items / sum(group.data.completions for group in groups)
        shares = {"items_per_completion": share, "items_per_group": items / max(1, computed)}
        groups = [replace(group, data=replace(group.data, **shares)) for group in groups]
        return [_taught_alone(group) for group in groups] if alone else groups

    return settled


def _taught_alone(group: Group) -> Group:
    """Without the branches that have no teacher, unless none has."""
    indices = group.data.taught
    if not indices:
        return group
    by_branch = {
        field.name: tuple(value[index] for index in indices)
        for field in fields(group.data)
        if isinstance(value := getattr(group.data, field.name), tuple)
    }
    branches = tuple(group.branches[index] for index in indices)
    return replace(group, branches=branches, data=replace(group.data, **by_branch))


def as_taught(groups: Sequence[Group]) -> list[Group]:
    """What the teacher reads of the groups: the taught branches under its prompts, one group a prompt, so that passes
    can be cut between them. Its data: which of all taught branches they are."""
    numbers = counted()
    pairs = [(group, [(index, next(numbers)) for index in group.data.taught]) for group in groups]
    return [part for group, taught in pairs for part in _as_taught(group, taught)]


def _as_taught(group: Group, taught: Sequence[tuple[int, int]]) -> list[Group]:
    by_prompt: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for index, number in taught:
        by_prompt.setdefault(tuple(group.data.teacher_prompts[index]), []).append((index, number))
    return [
        Group(group.row_id, list(prompt), tuple(group.branches[index] for index, _ in members), [n for _, n in members])
        for prompt, members in by_prompt.items()
    ]
