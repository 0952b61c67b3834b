"""What a batch of rollouts knows, token by token, besides the log-probabilities that are about to be computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stages.losses.host_numbers import on_device
from stages.losses.policy_aggregation import Aggregation
from stages.losses.policy_tokens import Sequences
from stages.training.batch import Group, TokenBatch


@dataclass(frozen=True)
class Rollouts:
    """What is known of a group's completions, one entry a branch; lists of floats are per asked-for token."""

    advantages: tuple[float, ...]
    sampled_logprobs: tuple[list[float], ...]
    """Under the sampler, of the distribution that it sampled from."""
    old_logprobs: tuple[list[float], ...] | None = None
    """Under the policy at sampling time; None: this is the first step on them, where they equal the policy's."""
    reference_logprobs: tuple[list[float], ...] | None = None
    kept: tuple[list[bool], ...] | None = None
    """Tokens that this step learns from; None: all."""
    entropy_share: float | None = None
    """Items of this step per token that it learns from; None: no entropy in the loss."""


@dataclass(frozen=True)
class Known:
    """What a batch's losses depend on besides its log-probabilities, token by token; floats are float64."""

    advantages_N: Tensor
    weights_N: Tensor
    branch_N: Tensor
    num_branches: int
    old_N: Tensor | None
    """None: on policy."""
    reference_N: Tensor | None = None
    sampled_N: Tensor | None = None
    kept_N: Tensor | None = None
    corrections_N: Tensor | None = None
    """Importance to the sampler; None where it follows from the log-probabilities to come, or there is none."""

    @classmethod
    def of(
        cls, batch: TokenBatch, aggregation: Aggregation, max_completion_length: int, *, reference: bool, sampled: bool
    ) -> Known:
        """From the rollouts that the batch's groups carry, with the reference's and the sampler's where asked for."""
        rollouts: list[Rollouts] = [group.data for group in batch.groups]
        advantages = [value for group in rollouts for value in group.advantages]
        advantages_K = on_device(advantages, batch.branch_N.device, torch.float64)
        weights_N = aggregation.weights(batch.tokens_per_branch(), batch.branch_N, max_completion_length, torch.float64)
        on_policy = rollouts[0].old_logprobs is None
        assert all((group.old_logprobs is None) == on_policy for group in rollouts), "a batch is on policy or off it"
        return cls(
            advantages_N=advantages_K.index_select(0, batch.branch_N),
            weights_N=weights_N,
            branch_N=batch.branch_N,
            num_branches=batch.num_branches,
            old_N=None if on_policy else token_values(batch, lambda group: group.old_logprobs),
            reference_N=token_values(batch, lambda group: group.reference_logprobs) if reference else None,
            sampled_N=token_values(batch, lambda group: group.sampled_logprobs) if sampled else None,
            kept_N=None if rollouts[0].kept is None else token_values(batch, lambda group: group.kept, torch.bool),
        )

    def of_part(self, part: slice, dtype: torch.dtype) -> Known:
        """The tokens of a slice, floats in a type."""
        cut = {name: value[part] for name, value in vars(self).items() if isinstance(value, Tensor)}
        floats: dict[str, Any] = {name: value.to(dtype) for name, value in cut.items() if value.is_floating_point()}
        return replace(self, **{**cut, **floats})

    @property
    def sequences(self) -> Sequences:
        """The branches as sequences of tokens; of a slice, cut ones."""
        return Sequences(self.branch_N, self.num_branches)


def token_values(
    batch: TokenBatch,
    field: Callable[[Rollouts], tuple[list[Any], ...] | None],
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """[N]: per-token values of all branches one after the other, as the batch lays them out."""
    values = []
    for group in batch.groups:
        branches = field(group.data)
        assert branches is not None
        values += [value for branch in branches for value in branch]
    return on_device(values, batch.target_N.device, dtype)


def group_of_branch(batch: TokenBatch, branch: int) -> Group:
    """The group that a branch of the batch belongs to."""
    for group in batch.groups:
        branch -= len(group.branches)
        if branch < 0:
            return group
    raise AssertionError("a branch belongs to a group")
