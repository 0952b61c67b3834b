"""What a preference loss knows of a pair: log-probabilities of its completions under policy and reference.

B pairs. Nothing here imports torch before a loss is computed: recipes are checked against the table of losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def log_sigmoid(values: Tensor) -> Tensor:
    """log(1 / (1 + e^-x)), finite for every finite x."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)


def smoothed(logits_B: Tensor, label_smoothing: float) -> Tensor:
    """Binary cross-entropy of logits whose label is 1 with probability 1 - e. Returns [B]."""
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), found {label_smoothing}")
    losses_B = -log_sigmoid(logits_B)
    # the flipped term is skipped at 0: 0 * inf would be NaN for a margin beyond the range of the type
    if label_smoothing == 0.0:
        return losses_B
    return (1 - label_smoothing) * losses_B - label_smoothing * log_sigmoid(-logits_B)


_LARGEST_EXPONENT = 80.0
"""e^80 is the largest round power that float32 holds; TRL clamps there as well. Beyond, values stay flat."""


def bounded_expm1(values: Tensor) -> Tensor:
    """e^x - 1, finite for every finite x."""
    return values.clamp(max=_LARGEST_EXPONENT).expm1()


def reverse_kl(log_ratios_B: Tensor) -> Tensor:
    """The score of DPO itself: the log-ratio. Others are in `f_divergence`."""
    return log_ratios_B


@dataclass(frozen=True)
class PairLogprobs:
    """Both completions: log-probabilities summed over completion tokens, and token counts. All [B].

    Where a loss has no reference, the reference's sums are zero.
    """

    chosen_B: Tensor
    rejected_B: Tensor
    reference_chosen_B: Tensor
    reference_rejected_B: Tensor
    chosen_tokens_B: Tensor
    rejected_tokens_B: Tensor
    whole_chosen_B: Tensor | None = None
    """The sum over all tokens of the chosen completion, where `chosen_B` weighs some of them less (LD-DPO)."""
    gold_B: Tensor | None = None
    """The third completion of triple preferences."""
    gold_tokens_B: Tensor | None = None
    divergence: Callable[[Tensor], Tensor] = reverse_kl
    """Log-ratio to the reference -> score (f-DPO)."""

    def chosen_log_ratios(self) -> Tensor:
        """[B]: log pi(chosen) - log pi_ref(chosen)."""
        return self.chosen_B - self.reference_chosen_B

    def rejected_log_ratios(self) -> Tensor:
        """[B]: log pi(rejected) - log pi_ref(rejected)."""
        return self.rejected_B - self.reference_rejected_B

    def scores(self) -> tuple[Tensor, Tensor]:
        """(chosen [B], rejected [B]): what the divergence makes of the log-ratios."""
        return self.divergence(self.chosen_log_ratios()), self.divergence(self.rejected_log_ratios())

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """(chosen [B], rejected [B]): log-ratios to the reference, or plain log-probabilities where there is none."""
        return self.chosen_log_ratios(), self.rejected_log_ratios()

    def margins(self) -> Tensor:
        """[B]: difference of the two scores; times beta it is the implicit reward margin of DPO."""
        chosen_B, rejected_B = self.scores()
        return chosen_B - rejected_B

    def margins_per_token(self) -> Tensor:
        """[B]: difference of the two scores, each over its completion's tokens."""
        chosen_B, rejected_B = self.scores()
        return chosen_B / self.chosen_tokens_B - rejected_B / self.rejected_tokens_B

    def mean_logprobs(self) -> tuple[Tensor, Tensor]:
        """(chosen [B], rejected [B]): the policy's log-probability of a token, on average."""
        return self.chosen_B / self.chosen_tokens_B, self.rejected_B / self.rejected_tokens_B

    def chosen_nll(self) -> Tensor:
        """[B]: the policy's negative log-likelihood of the chosen completion, a token."""
        sums_B = self.chosen_B if self.whole_chosen_B is None else self.whole_chosen_B
        return -sums_B / self.chosen_tokens_B

    def gold_nll(self) -> Tensor:
        """[B]: the same of the third completion. Raises ValueError where there is none."""
        if self.gold_B is None or self.gold_tokens_B is None:
            raise ValueError("this loss needs the third completion of triple preferences")
        return -self.gold_B / self.gold_tokens_B

    def map(self, change: Callable[[Tensor], Tensor]) -> PairLogprobs:
        """The same with every tensor changed: rows chosen, a detached copy, another type."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "divergence"}
        changed = {name: None if value is None else change(value) for name, value in values.items()}
        return PairLogprobs(divergence=self.divergence, **changed)  # type: ignore[arg-type]
