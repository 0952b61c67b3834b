"""The model as its own teacher: as it came, following the policy, or the policy itself."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.losses.head import Head
from stages.training.adapters import is_adapted
from stages.training.batch import TokenBatch
from stages.training.distillation import asked_hidden, runs_of
from stages.training.following import FollowedWindows, Follower, Following
from stages.training.initial import as_it_came, fixed
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.objective import Windows
from stages.training.start import frozen_scorer
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
        self.temperature, self._model = temperature, None if scorer is None else fixed(scorer)

    def join(self, trainer: Trainer, config: SelfTeachingConfig) -> None:
        """Be ready for the trainer's first batch. Collective. Raises StageError for adapters that would have to be
        followed."""
        if config.teacher_model_kind == "live":
            self._model = fixed(trainer.policy())
            return
        if config.teacher_model_kind == "base":
            self._model = as_it_came(trainer.context, trainer)
            return
        if is_adapted(trainer.scorer.model):
            raise StageError(
                "teacher_model_kind ema needs the whole model trained, and input model is an adapter; merge it first, "
                "or give base, or live"
            )
        # in float32, of which what follows makes what is computed with
        self._model = fixed(frozen_scorer(trainer.context, "model", trainer.scorer).to(trainer.processes.device))

    def followed(self, trainer: Trainer, windows: Windows, config: SelfTeachingConfig) -> Windows:
        """The windows before whose steps it follows the policy, where it does."""
        if config.teacher_model_kind != "ema":
            return windows
        following = Following(config.teacher_update_rate, config.teacher_sync_steps)
        with self._present() as scorer:
            return FollowedWindows(windows, Follower(trainer, scorer, following))

    @torch.no_grad()
    def hidden(self, batch: TokenBatch) -> Tensor:
        """[n, H] where the asked-for tokens of the batch's taught branches are predicted, in their order."""
        groups = as_taught(batch.groups)
        with self._present() as scorer:
            passes = [scorer.layout(run) for run in runs_of(groups, batch.num_tokens)]
            found: list[Any] = [scorer(one, asked_hidden(one)) for one in passes]
        branches = torch.cat(found).split([branch.asked for group in groups for branch in group.branches])
        numbers = [number for group in groups for number in group.data]
        return torch.cat([branches[place] for place in sorted(range(len(numbers)), key=numbers.__getitem__)])

    def head(self) -> Head:
        """What makes logits of them. To be asked for outside the policy's own passes."""
        with self._present() as scorer:
            return scorer.head(self.temperature).detached()

    def _present(self) -> AbstractContextManager[Scorer]:
        assert self._model is not None, "it has joined the trainer"
        return self._model()
