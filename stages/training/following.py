"""A frozen model that follows the one in training, step by step, and travels in the checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.objective import Window, Windows, WindowsAround
from stages.training.parallel import float_weights, use_bfloat16


@dataclass(frozen=True)
class Following:
    """How a model follows the policy (TR-DPO, Gorbatovski et al., arXiv:2404.09656, eq. 3 and 4)."""

    mixup_alpha: float
    """follower <- alpha policy + (1 - alpha) follower; 1 is the paper's hard update."""
    sync_steps: int
    """Steps between two updates; 1 with a small alpha is a moving average."""
    averaged: bool = False
    """It follows the policy's averaged weights (with BEMA and alpha 1: arXiv:2508.00180)."""


class Follower:
    """The weights of `scorer`, which are moved towards the policy's before a step, on its device and without waiting
    for it.

    What moves is float32: small moves would be rounded away. Where the policy computes in bfloat16, so does the scorer,
    with a rounded copy.
    """

    def __init__(self, trainer: Trainer, scorer: Scorer, following: Following) -> None:
        """`scorer`: in float32, where it stays. Raises StageError for a model of another shape."""
        self.trainer, self.scorer, self.following = trainer, scorer, following
        own, policy = (
            {name: parameter.shape for name, parameter in one.named_parameters()} for one in (scorer, trainer.scorer)
        )
        policy |= trainer.parallel.shapes()
        if own != policy:
            name = next(name for name in {**policy, **own} if own.get(name) != policy.get(name))
            shapes = " and ".join(f"{list(one[name])}" if name in one else "none" for one in (own, policy))
            raise StageError(
                f"a model that follows input model needs weights of its names and shapes, but of {name} they have "
                f"{shapes}; give one made from the same model"
            )
        parameters = dict(scorer.named_parameters())
        self._kept: dict[str, Tensor] = {name: parameters[name].data for name in trainer.parallel.shapes()}
        if trainer.config.bf16:
            use_bfloat16(scorer)
        self._seen = {name: parameters[name].data for name in self._kept}

    @torch.no_grad()
    def before(self, step: int) -> None:
        """Move, where it is time. Collective."""
        if step == 0 or step % self.following.sync_steps:
            return
        weight_of = self.trainer.averaging.weight if self.following.averaged else self.trainer.parallel.weight
        for bucket in float_weights(self._kept, weight_of):
            torch._foreach_lerp_(
                [self._kept[name] for name in bucket], list(bucket.values()), self.following.mixup_alpha
            )
        self._show()

    def tensors(self) -> dict[str, Tensor]:
        """Its weights that move."""
        return dict(self._kept)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the weights as they were when a state was saved."""
        for name, kept in self._kept.items():
            if name in tensors:
                kept.copy_(tensors[name])
        self._show()

    def _show(self) -> None:
        """The weights that moved, to what computes with them."""
        if self.trainer.config.bf16:
            torch._foreach_copy_(list(self._seen.values()), list(self._kept.values()))


class FollowedWindows(WindowsAround):
    """Windows before whose steps a model follows."""

    def __init__(self, windows: Windows, follower: Follower) -> None:
        super().__init__(windows)
        self.follower = follower

    def window(self, step: int) -> Window:
        """The groups of a step."""
        self.follower.before(step)
        return super().window(step)

    def tensors(self) -> dict[str, Tensor]:
        """The follower's weights too."""
        return {**super().tensors(), **self.follower.tensors()}

    def load(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Into the windows inside and the follower."""
        super().load(state, tensors)
        self.follower.load(tensors)
