"""Windows of pairs for what a fixed reference and single pairs do not give: a reference that follows the policy, and
losses that compare the pairs of a step with each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stages.losses.pair_logprobs import PairLogprobs
from stages.training.batch import Group
from stages.training.following import Follower, Following
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.objective import Windows
from stages.training.pairs import Reference, sum_of_tokens
from stages.training.preference import Coupled, PairSettings
from stages.training.scored_windows import ScoredWindows


class PairWindows(ScoredWindows):
    """Windows of pairs and their sums as the loss takes them."""

    def __init__(self, windows: Windows, trainer: Trainer, settings: PairSettings) -> None:
        super().__init__(windows, trainer)
        self.settings = settings

    def referenced(self, scorer: Scorer, groups: Sequence[Group]) -> list[Reference]:
        """The data of every pair, with its sums under a reference."""
        sums = self.sums(scorer, groups).tolist()
        return [
            replace(group.data, chosen=chosen, rejected=rejected)
            for group, (chosen, rejected) in zip(groups, sums, strict=True)
        ]

    def sums(self, scorer: Scorer, groups: Sequence[Group]) -> Tensor:
        """[B, 2] sums of chosen and rejected, in float64, on every process."""

        def sums_of(branches: Sequence[list[float]]) -> list[float]:
            shared = min(map(len, branches))
            return [sum_of_tokens(values, shared, self.settings.ld_alpha) for values in branches]

        return self.measured(scorer, [replace(group, branches=group.branches[:2]) for group in groups], sums_of)


class FollowingReference(PairWindows):
    """References from a model that is moved towards the policy, and that travels in the checkpoints."""

    def __init__(
        self, windows: Windows, trainer: Trainer, settings: PairSettings, scorer: Scorer, following: Following
    ) -> None:
        super().__init__(windows, trainer, settings)
        self.scorer, self.follower = scorer, Follower(trainer, scorer, following)

    def before(self, step: int, groups: Sequence[Group]) -> None:
        """The reference moves, where it is time."""
        self.follower.before(step)

    def present(self, groups: Sequence[Group]) -> list[Reference]:
        """The sums of every pair under the reference as it is."""
        return self.referenced(self.scorer, groups)

    def tensors(self) -> dict[str, Tensor]:
        """The reference's weights too."""
        return {**super().tensors(), **self.follower.tensors()}

    def load(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take up the reference as it was when the state was saved."""
        super().load(state, tensors)
        self.follower.load(tensors)


class CoupledWindows(PairWindows):
    """Pairs with what a loss over the whole step says of each, however the step is cut into micro-batches.

    A pass without gradients gives the sums of all pairs; the loss of the step and its slopes at these sums follow; the
    step then trains on the slopes, pair by pair (the gradient cache of Gao et al., arXiv:2101.06983, sec. 3). Exact but
    for dropout, which the first pass is without.
    """

    def __init__(
        self, windows: Windows, trainer: Trainer, settings: PairSettings, loss: Callable[[PairLogprobs], Tensor]
    ) -> None:
        super().__init__(windows, trainer, settings)
        self.loss = loss

    def present(self, groups: Sequence[Group]) -> list[Coupled]:
        """Loss and slopes of every pair, under the weights as they are."""
        sums_2B = self.sums(self.trainer.policy(), groups).t().requires_grad_()
        with torch.enable_grad():
            losses_B = self.loss(step_pairs(groups, sums_2B, self.settings))
            (slopes_2B,) = torch.autograd.grad(losses_B.sum(), sums_2B)
        values = zip(losses_B.tolist(), *slopes_2B.tolist(), strict=True)
        return [Coupled(group.data, *value) for group, value in zip(groups, values, strict=True)]


def step_pairs(groups: Sequence[Group], sums_2B: Tensor, settings: PairSettings) -> PairLogprobs:
    """The pairs of a whole step, from their sums; groups carry their `Reference`."""
    like = sums_2B.new_tensor
    tokens = [[len(branch.token_ids) for branch in group.branches[:2]] for group in groups]
    return PairLogprobs(
        chosen_B=sums_2B[0],
        rejected_B=sums_2B[1],
        reference_chosen_B=like([group.data.chosen for group in groups]),
        reference_rejected_B=like([group.data.rejected for group in groups]),
        chosen_tokens_B=like([chosen for chosen, _ in tokens]),
        rejected_tokens_B=like([rejected for _, rejected in tokens]),
        divergence=settings.divergence,
    )
