"""Losses of single completions that were judged desirable or not: one value a completion. B completions.

Nothing here imports torch before a loss is computed: recipes are checked against the table of losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.losses.pair_logprobs import log_sigmoid
from stages.losses.registry import Losses

if TYPE_CHECKING:
    from torch import Tensor

UNPAIRED_LOSSES = Losses()
"""`loss_type` -> Loss."""


@dataclass(frozen=True)
class JudgedLogprobs:
    """Log-probabilities summed over completion tokens under policy and reference, and what was said of them. [B]."""

    policy_B: Tensor
    reference_B: Tensor
    desirable_B: Tensor
    """bool."""
    kl_B: Tensor
    """Estimate of KL(policy || reference) for the optimizer step, at least 0; no gradient."""
    shift_B: Tensor
    """Reward shift of BCO; no gradient."""
    density_B: Tensor
    """Density ratio of the prompt, desirable over undesirable; 1 where it is not used."""

    def log_ratios(self) -> Tensor:
        """[B]: log pi(y) - log pi_ref(y)."""
        return self.policy_B - self.reference_B

    def signed(self, values_B: Tensor) -> Tensor:
        """The values of desirable completions, and minus those of the others."""
        return values_B.where(self.desirable_B, -values_B)


@UNPAIRED_LOSSES.add("KTO", "2402.01306")
def kto(
    judged: JudgedLogprobs, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """w (1 - s(+-(beta (r - z)))), r the log-ratio, z the KL term, + and w_D for desirable completions. Returns [B].

    Ethayarajh et al., arXiv:2402.01306. z is the mean log-ratio of the step's mismatched completions, at
    least 0. TRL pairs them within a micro-batch of the sorted dataset, so that its loss depends on batch size and order
    of the rows; here a row's mismatched completion depends on the rows' ids alone, and z on the whole step.
    """
    values_B = (-judged.signed(beta * (judged.log_ratios() - judged.kl_B))).sigmoid()
    return _by_kind(judged, values_B, desirable_weight, undesirable_weight)


def _by_kind(judged: JudgedLogprobs, values_B: Tensor, desirable: float, undesirable: float) -> Tensor:
    """The values, each times the weight of its completion's kind."""
    return (values_B * desirable).where(judged.desirable_B, values_B * undesirable)


@UNPAIRED_LOSSES.add("APO-zero, unpaired", "2408.06266")
def apo_zero_unpaired(
    judged: JudgedLogprobs, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """w (1 - s(x)) of desirable completions, w s(x) of the others, x = beta log-ratio: KTO with z = 0. Returns [B].

    D'Oosterlinck et al., arXiv:2408.06266, eq. 7, each completion by itself; the weights are KTO's, as in TRL.
    """
    values_B = (-judged.signed(beta * judged.log_ratios())).sigmoid()
    return _by_kind(judged, values_B, desirable_weight, undesirable_weight)


@UNPAIRED_LOSSES.add("BCO", "2404.04656")
def bco(judged: JudgedLogprobs, *, beta: float) -> Tensor:
    """-log s(+-(beta r - d)), r the log-ratio, d the reward shift, + for desirable completions. Returns [B].

    Jung et al., arXiv:2404.04656. d is the running mean of all rewards beta r, as in TRL's former trainer, so that the
    kind with more completions weighs more in it; the paper takes the mean of both kinds' means. Undesirable completions
    count by their prompts' density ratio.
    """
    losses_B = -log_sigmoid(judged.signed(beta * judged.log_ratios() - judged.shift_B))
    return losses_B.where(judged.desirable_B, losses_B * judged.density_B)
