"""Windows of pairs for what a fixed reference and single pairs do not give: a reference that follows the policy, and
losses that compare the pairs of a step with each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.losses.pair_logprobs import PairLogprobs
from stages.training.batch import Group
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

    def sums(self, scorer: Scorer, groups: Sequence[Group]) -> Tensor:
        """[B, 2] sums of chosen and rejected, in float64, on every process."""

        def sums_of(branches: Sequence[list[float]]) -> list[float]:
            shared = min(map(len, branches))
            return [sum_of_tokens(values, shared, self.settings.ld_alpha) for values in branches]

        return self.measured(scorer, [replace(group, branches=group.branches[:2]) for group in groups], sums_of)


@dataclass(frozen=True)
class Following:
    """How a reference follows the policy (TR-DPO, Gorbatovski et al., arXiv:2404.09656, eq. 3 and 4)."""

    mixup_alpha: float
    """reference <- alpha policy + (1 - alpha) reference; 1 is the paper's hard update."""
    sync_steps: int
    """Steps between two updates; 1 with a small alpha is a moving average."""


class FollowingReference(PairWindows):
    """References from a model that is moved towards the policy, and that travels in the checkpoints."""

    def __init__(
        self, windows: Windows, trainer: Trainer, settings: PairSettings, scorer: Scorer, following: Following
    ) -> None:
        super().__init__(windows, trainer, settings)
        self.scorer, self.following = scorer, following
        own = {name: parameter.shape for name, parameter in scorer.named_parameters()}
        if own != dict(trainer.parallel.shapes()):
            raise StageError("sync_ref_model: reference and model have different weights; wire one of equal shape")

    def data(self, step: int, groups: Sequence[Group]) -> list[Reference]:
        """The sums of every pair under the reference as it is before the step."""
        if step and step % self.following.sync_steps == 0:
            self._follow()
        return [Reference(*row) for row in self.sums(self.scorer, groups).tolist()]

    @torch.no_grad()
    def _follow(self) -> None:
        """Collective."""
        parallel, own = self.trainer.parallel, dict(self.scorer.named_parameters())
        for name in parallel.shapes():
            weight = parallel.weight(name)
            own[name].lerp_(weight.to(own[name].device), self.following.mixup_alpha)

    def tensors(self) -> dict[str, Tensor]:
        """The reference's weights too."""
        return {**self.windows.tensors(), **dict(self.scorer.named_parameters())}

    def load(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take up the reference as it was when the state was saved."""
        super().load(state, tensors)
        with torch.no_grad():
            for name, parameter in self.scorer.named_parameters():
                if name in tensors:
                    parameter.copy_(tensors[name])


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

    def data(self, step: int, groups: Sequence[Group]) -> list[Coupled]:
        """Loss and slopes of every pair, under the weights before the step."""
        sums_2B = self.sums(self.trainer.policy(), groups).t().requires_grad_()
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
