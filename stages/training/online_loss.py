"""The objective of on-line preference optimization: a loss of pairs, and for XPO the exploration beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.losses.host_numbers import beside
from stages.losses.logprobs import TokenScores
from stages.losses.online import explored
from stages.losses.pair_logprobs import PairLogprobs
from stages.training.batch import TokenBatch
from stages.training.metrics import Mean
from stages.training.pairs import Reference
from stages.training.preference import PairSettings, PreferenceLoss


@dataclass(frozen=True)
class JudgedPair(Reference):
    """A pair of completions as it was judged."""

    rewards: tuple[float | None, float | None] = (None, None)
    """Of chosen and rejected."""
    exploration: tuple[float, float] = (0.0, 0.0)
    """What the log-probabilities of chosen and rejected count in XPO's loss: alpha, where the reference wrote it."""

    @property
    def told_apart(self) -> bool:
        """Whether one is known to be better."""
        return None not in self.rewards and self.rewards[0] != self.rewards[1]


class OnlinePairLoss(PreferenceLoss):
    """The mean over pairs of a preference loss; `explores`: XPO's term is added, and pairs of equal reward have it
    alone. The groups carry `JudgedPair`."""

    def __init__(
        self,
        loss: Callable[[PairLogprobs], Tensor],
        settings: PairSettings,
        *,
        referenced: bool = True,
        explores: bool = False,
    ) -> None:
        super().__init__(loss, settings)
        self.referenced, self.explores = referenced, explores
        of_reference = ("objective/kl", "objective/non_score_reward", "objective/rlhf_reward") if referenced else ()
        parts = ("loss/dpo", "loss/xpo") if explores else ()
        self.metric_names = (*self.metric_names, "objective/entropy", *of_reference, *parts)

    def use(self, loss: Callable[[PairLogprobs], Tensor], settings: PairSettings) -> None:
        """From now on; they differ from those before in beta."""
        self.loss, self.settings = loss, settings

    def losses(self, batch: TokenBatch, pairs: PairLogprobs, scores: TokenScores) -> Tensor:
        """[B]."""
        losses_B = super().losses(batch, pairs, scores)
        return torch.stack(self._parts(batch, losses_B, scores)).sum(0) if self.explores else losses_B

    def _parts(self, batch: TokenBatch, losses_B: Tensor, scores: TokenScores) -> tuple[Tensor, Tensor]:
        """(the loss of those pairs that are told apart, the exploration), [B] each."""
        judged: list[JudgedPair] = [group.data for group in batch.groups]
        sums_B2 = batch.sum_by_branch(scores.logprobs_N).view(-1, 2)
        return (
            losses_B * beside([float(pair.told_apart) for pair in judged], scores.logprobs_N),
            explored(sums_B2, beside([pair.exploration for pair in judged], sums_B2)),
        )

    @torch.no_grad()
    def _metrics(
        self, batch: TokenBatch, pairs: PairLogprobs, scores: TokenScores, *, with_parts: bool
    ) -> dict[str, Mean]:
        """Also TRL's `objective/...`: means over the completions of the step's pairs, of sums over their tokens."""
        metrics = super()._metrics(batch, pairs, scores, with_parts=with_parts)
        completions = 2 * len(pairs.chosen_B)
        metrics["objective/entropy"] = Mean(-(pairs.chosen_B + pairs.rejected_B).sum(), completions)
        if self.referenced:
            kl = sum(log_ratios_B.sum() for log_ratios_B in pairs.log_ratios())
            rewards = sum(reward or 0.0 for group in batch.groups for reward in group.data.rewards)
            metrics["objective/kl"] = Mean(kl, completions)
            metrics["objective/non_score_reward"] = Mean(-self.settings.beta * kl, completions)
            metrics["objective/rlhf_reward"] = Mean(rewards - self.settings.beta * kl, completions)
        if self.explores:
            dpo_B, xpo_B = self._parts(batch, super().losses(batch, pairs, scores), scores)
            metrics |= {"loss/dpo": Mean(dpo_B.sum(), len(dpo_B)), "loss/xpo": Mean(xpo_B.sum(), len(xpo_B))}
        return metrics
