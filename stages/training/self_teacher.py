"""The model as its own teacher: as it came, following the policy, or the policy itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.losses.head import Head
from stages.training.adapters import is_adapted
from stages.training.batch import TokenBatch
from stages.training.distillation import asked_hidden, runs_of
from stages.training.following import FollowedWindows, Follower, Following
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.objective import Windows
from stages.training.start import frozen_scorer, say_own_teacher
from stages.training.taught_rollouts import as_taught

if TYPE_CHECKING:
    from stages.training.self_teaching_settings import SelfTeachingConfig


class SelfTeacher:
    """Says what it makes of completions under its own prompts.

    Of adapters there is none that follows: a mean of their two matrices apart is not that of what they do together. TRL
    takes it, and begins at zeros, so that its teacher is the base however the adapter came.
    """

    def __init__(self, temperature: float, scorer: Scorer | None = None) -> None:
        """`temperature` divides its logits; `scorer`: None until it joins a trainer."""
        self.temperature, self._scorer = temperature, scorer

    def join(self, trainer: Trainer, config: SelfTeachingConfig) -> None:
        """Be ready for the trainer's first batch. Collective. Raises StageError for adapters that would have to be
        followed."""
        kind, bf16 = config.teacher_model_kind, trainer.config.bf16
        if kind == "live":
            self._scorer = trainer.policy()
            return
        if kind == "ema" and is_adapted(trainer.scorer.model):
            raise StageError(
                "teacher_model_kind ema needs the whole model trained, and input model is an adapter; merge it first, "
                "or give base, or live"
            )
        say_own_teacher(trainer.context)
        # one that follows the policy stays in float32: small moves would be rounded away
        frozen = frozen_scorer(trainer.context, "model", trainer.scorer, bf16=bf16 and kind == "base")
        self._scorer = frozen.to(trainer.processes.device)

    def followed(self, trainer: Trainer, windows: Windows, config: SelfTeachingConfig) -> Windows:
        """The windows before whose steps it follows the policy, where it does."""
        if config.teacher_model_kind != "ema":
            return windows
        following = Following(config.teacher_update_rate, config.teacher_sync_steps)
        return FollowedWindows(windows, Follower(trainer, self.scorer, following))

    @property
    def scorer(self) -> Scorer:
        """The model."""
        assert self._scorer is not None, "it has joined the trainer"
        return self._scorer

    @torch.no_grad()
    def hidden(self, batch: TokenBatch) -> Tensor:
        """[n, H] where the asked-for tokens of the batch's taught branches are predicted, in their order."""
        passes = [self.scorer.layout(run) for run in runs_of(as_taught(batch.groups), batch.num_tokens)]
        found: list[Any] = [self.scorer(one, asked_hidden(one)) for one in passes]
        return torch.cat(found)

    def head(self) -> Head:
        """What makes logits of them."""
        return self.scorer.head(self.temperature).detached()
