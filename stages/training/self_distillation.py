"""The objective of SDPO: a policy is compared with itself under a richer prompt, beside the policy gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stages.losses.distillation import Divergence
from stages.losses.host_numbers import beside
from stages.losses.logprobs import linear_logprobs
from stages.losses.self_distillation import (
    Comparison,
    Importance,
    OwnTop,
    clipped_importance,
    linear_self_divergence,
    sampled_token,
)
from stages.losses.token_loss import TokenLossFunction
from stages.training.batch import Group, TokenBatch
from stages.training.entropy_bonus import EntropyBonus
from stages.training.lesson import TOLD
from stages.training.metrics import Mean
from stages.training.model import Scorer
from stages.training.objective import Forward, Readout
from stages.training.policy import PolicyLoss
from stages.training.policy_known import Known, token_values
from stages.training.policy_terms import PolicySettings, PolicyTerms
from stages.training.self_teacher import SelfTeacher
from stages.training.taught_rollouts import is_taught, taught_places


@dataclass(frozen=True)
class SelfTeaching:
    """How the policy is compared with its teacher."""

    weight: float
    """Of the distillation, above 0; the policy's loss has the rest."""
    divergence: Divergence | None
    """None: of the sampled token alone (`sampled_token`)."""
    top: OwnTop | None = None
    """What of the vocabulary is compared; None: all."""
    importance_clip: float | None = None

    @property
    def alone(self) -> bool:
        """Whether there is no policy's loss."""
        return self.weight == 1


@dataclass(frozen=True, kw_only=True)
class TaughtKnown(Known):
    """With what is known of the teaching, token by token."""

    teaching_N: Tensor
    """What a token of the distillation counts in the loss; 0 where nothing is taught."""
    teacher_N: Tensor | None = None
    """Log-probability under the teacher, 0 where nothing is taught; None: all of its distribution is compared."""


class TaughtTerms(PolicyTerms):
    """Losses of tokens: the policy's by its weight, and where sampled tokens are compared the distillation's."""

    def __init__(self, settings: PolicySettings, teaching: SelfTeaching, teacher: SelfTeacher) -> None:
        super().__init__(settings)
        self.teaching, self.teacher = teaching, teacher

    def known(self, batch: TokenBatch) -> TaughtKnown:
        """Also what the teacher says."""
        teaching_N = self.weights(batch)
        teacher_N = None if self.teaching.divergence is not None else self._teacher(batch, teaching_N)
        return TaughtKnown(**vars(super().known(batch)), teaching_N=teaching_N, teacher_N=teacher_N)

    def weights(self, batch: TokenBatch) -> Tensor:
        """[N] float64: the distillation is the mean over a step's completions, those without a teacher among them, of
        the means over their tokens."""
        lengths_K = batch.tokens_per_branch().double()
        share: float | None = batch.groups[0].data.items_per_completion
        assert share is not None, "groups go through taught_step"
        taught_K = beside([bool(one) for group in batch.groups for one in group.data.teacher_prompts], lengths_K)
        weights_K = taught_K * (self.teaching.weight * share) / lengths_K.clamp(min=1)
        return weights_K.index_select(0, batch.branch_N)

    @torch.no_grad()
    def _teacher(self, batch: TokenBatch, teaching_N: Tensor) -> Tensor:
        teacher_N = torch.zeros_like(teaching_N)
        if not any(map(is_taught, batch.groups)):
            return teacher_N
        index = taught_places(batch)
        targets_n = batch.target_N[index]
        scores = linear_logprobs(self.teacher.hidden(batch), self.teacher.head(), targets_n, with_entropy=False)
        return teacher_N.index_copy(0, index, scores.logprobs_N.to(teacher_N.dtype))

    def together(self, known: Known) -> bool:
        """A sampled token's distillation never hangs on others."""
        return not self.teaching.alone and super().together(known)

    def losses(self, known: Known, logprobs_C: Tensor, part: slice) -> Tensor:
        """[C] of the tokens of a slice."""
        policy_C = logprobs_C * 0 if self.teaching.alone else self.policy_losses(known, logprobs_C, part)
        return (1 - self.teaching.weight) * policy_C + self._distilled(known, logprobs_C, part)

    def first_losses(self, known: Known) -> TokenLossFunction:
        """The same on policy."""
        if self.teaching.alone:
            return lambda logprobs_C, part: self._distilled(known, logprobs_C, part)
        first = super().first_losses(known)

        def losses(logprobs_C: Tensor, part: slice) -> Tensor:
            policy_C = first(logprobs_C, part)
            return (1 - self.teaching.weight) * policy_C + self._distilled(known, logprobs_C, part)

        return losses

    def policy_losses(self, known: Known, logprobs_C: Tensor, part: slice) -> Tensor:
        """[C] `rl`'s."""
        return super().losses(known, logprobs_C, part)

    def _distilled(self, known: Known, logprobs_C: Tensor, part: slice) -> Tensor:
        """[C] weighted; zeros where whole distributions are compared, which is done apart."""
        own = known.of_part(part, logprobs_C.dtype)
        assert isinstance(own, TaughtKnown)
        return own.teaching_N * self.distillation(own, logprobs_C)

    def distillation(self, known: Any, logprobs_C: Tensor) -> Tensor:
        """[C] of sampled tokens, times their importance; `known` of the same slice."""
        if known.teacher_N is None:
            return logprobs_C * 0
        losses_C: Tensor = sampled_token(logprobs_C, known.teacher_N)
        most = self.teaching.importance_clip
        if most is None or known.old_N is None:
            return losses_C
        return losses_C * clipped_importance(logprobs_C, known.old_N, most)


class SelfDistillationLoss(PolicyLoss):
    """weight x distillation + (1 - weight) x `PolicyLoss` (SDPO, arXiv:2601.20802); groups carry `TaughtRollouts`.

    The distillation is the mean over the step's completions of the mean over their tokens of min(ratio, clip) x
    divergence(policy under the prompt, teacher under its own); completions without a teacher count as 0. As TRL has it,
    but for the policy's loss: that is `rl`'s with all that this takes, among it the KL term of a `beta` that TRL reads
    and leaves unused, and divides by the items of the whole step, where TRL's dapo divides every micro-batch by its own
    tokens.
    """

    terms: TaughtTerms

    def __init__(
        self, settings: PolicySettings, teaching: SelfTeaching, teacher: SelfTeacher, bonus: EntropyBonus | None = None
    ) -> None:
        super().__init__(settings, bonus)
        self.teaching, self.teacher = teaching, teacher
        self.terms = TaughtTerms(settings, teaching, teacher)
        if teaching.alone:
            self.metrics = {}  # they are of the policy's loss
        told = ("distillation_loss", "logp_difference", "policy_loss")
        self.metric_names = (*self.metric_names, *(f"{TOLD}/{name}" for name in told))

    def count(self, group: Group) -> float:
        """The policy's items, or completions where there is no policy's loss."""
        return float(group.data.completions) if self.teaching.alone else super().count(group)

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(weighted sum of both losses, metrics)."""
        if self.teaching.divergence is None:
            loss, metrics = super().__call__(forward, batch)
        else:
            loss, metrics = self._with_divergence(forward, batch, self._comparison(batch, self.teaching.divergence))
        metrics.pop("policy_loss", None)  # it would be the whole loss without the entropy
        return loss, metrics

    def _with_divergence(
        self, forward: Forward, batch: TokenBatch, compare: Callable[[Tensor, nn.Module], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, dict[str, Mean]]:
        """In one pass; without the policy's loss its readout serves the metrics alone, and needs no gradient."""
        found: list[tuple[Tensor, Tensor]] = []

        def both(batch: TokenBatch, readout: Readout) -> Any:
            def read(hidden_NH: Tensor, scorer: nn.Module) -> tuple[Any, tuple[Tensor, Tensor]]:
                with torch.set_grad_enabled(torch.is_grad_enabled() and not self.teaching.alone):
                    policy = readout.read(hidden_NH, scorer)
                return policy, compare(hidden_NH, scorer)

            policy, compared = forward(batch, replace(readout, read=read))
            found.append(compared)
            return policy

        loss, metrics = super().__call__(both, batch)
        ((distilled, divergences_n),) = found
        metrics[f"{TOLD}/distillation_loss"] = Mean(divergences_n.sum(), len(divergences_n))
        return loss + distilled, metrics

    def _comparison(
        self, batch: TokenBatch, divergence: Divergence
    ) -> Callable[[Tensor, nn.Module], tuple[Tensor, Tensor]]:
        """(hidden states [N, H], student) -> (the weighted sum, divergences [n] of the taught tokens)."""
        if not any(map(is_taught, batch.groups)):
            return lambda hidden_NH, _: (hidden_NH.sum() * 0.0, hidden_NH.new_zeros(0))
        index_n = taught_places(batch)
        told_nH, told_head = self.teacher.hidden(batch), self.teacher.head()
        weights_n = self.terms.weights(batch)[index_n]
        most, old = self.teaching.importance_clip, batch.groups[0].data.old_logprobs
        importance: Importance | None = None
        if most is not None and old is not None:
            old_n = token_values(batch, lambda group: group.old_logprobs)[index_n]
            importance = Importance(batch.target_N[index_n], old_n, most)

        def compare(hidden_NH: Tensor, student: nn.Module) -> tuple[Tensor, Tensor]:
            assert isinstance(student, Scorer)
            head = student.head(self.settings.temperature)
            kind = head.sum_type
            comparison = Comparison(divergence, self.teaching.top, importance and importance.of_type(kind))
            return linear_self_divergence(
                hidden_NH.index_select(0, index_n),
                head,
                told_nH,
                told_head,
                comparison,
                weights_N=weights_n.to(kind),
            )

        return compare

    def _entropy_weights(self, batch: TokenBatch, known: Known) -> Tensor | None:
        weights_N = super()._entropy_weights(batch, known)
        return None if weights_N is None else weights_N * (1 - self.teaching.weight)

    def _metrics(self, batch: TokenBatch, known: Known, scores: Any) -> dict[str, Mean]:
        """Losses without their weights; of sampled tokens also log p - log p_teacher, the estimate of the divergence
        that is learnt."""
        metrics = super()._metrics(batch, known, scores)
        logprobs_N = scores.logprobs_N
        own: Any = known.of_part(slice(None), logprobs_N.dtype)
        if not self.teaching.alone:
            policy_N = self.terms.policy_losses(known, logprobs_N, slice(None))
            items = sum(group.data.items_per_group for group in batch.groups)
            metrics[f"{TOLD}/policy_loss"] = Mean(policy_N.sum(), items)
        if own.teacher_N is not None:
            taught_N = own.teaching_N > 0
            distilled_N = self.terms.distillation(own, logprobs_N)
            metrics[f"{TOLD}/distillation_loss"] = Mean((distilled_N * taught_N).sum(), taught_N.sum())
            differences_N = (logprobs_N - own.teacher_N) * taught_N
            metrics[f"{TOLD}/logp_difference"] = Mean(differences_N.sum(), taught_N.sum())
        return metrics
