"""Preference losses: one value per pair, from summed completion log-probabilities.

B pairs. A loss takes `PairLogprobs` and keywords, and returns [B]; the loop sums and divides by the pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class PairLogprobs:
    """Both completions: log-probabilities summed over completion tokens, and token counts. All [B]."""

    chosen_B: Tensor
    rejected_B: Tensor
    reference_chosen_B: Tensor
    reference_rejected_B: Tensor
    chosen_tokens_B: Tensor
    rejected_tokens_B: Tensor

    def chosen_log_ratios(self) -> Tensor:
        """[B]: log pi(chosen) - log pi_ref(chosen)."""
        return self.chosen_B - self.reference_chosen_B

    def rejected_log_ratios(self) -> Tensor:
        """[B]: log pi(rejected) - log pi_ref(rejected)."""
        return self.rejected_B - self.reference_rejected_B

    def margins(self) -> Tensor:
        """[B]: difference of the two log-ratios; times beta it is the implicit reward margin of DPO."""
        return self.chosen_log_ratios() - self.rejected_log_ratios()

    def rewards(self, beta: float) -> tuple[Tensor, Tensor]:
        """Implicit rewards (chosen [B], rejected [B]), detached; `rewards/chosen` and the like."""
        return (beta * self.chosen_log_ratios()).detach(), (beta * self.rejected_log_ratios()).detach()

    def swapped(self) -> PairLogprobs:
        """The same pairs with chosen and rejected exchanged."""
        return PairLogprobs(
            self.rejected_B,
            self.chosen_B,
            self.reference_rejected_B,
            self.reference_chosen_B,
            self.rejected_tokens_B,
            self.chosen_tokens_B,
        )

    @classmethod
    def example(cls) -> PairLogprobs:
        """Two pairs to try a loss and its keywords on before a model is loaded."""
        rows = torch.tensor([[-2.0, -1.0], [-5.0, -4.0], [-3.0, -2.0], [-4.0, -3.0], [2.0, 3.0], [5.0, 4.0]])
        return cls(*rows.unbind(0))


def sigmoid(pairs: PairLogprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -(1-e) log sigmoid(beta d) - e log sigmoid(-beta d), d the margin, e the smoothing. Returns [B].

    Rafailov et al., arXiv:2305.18290, eq. 7; e > 0 is conservative DPO, for labels that are wrong with
    probability e (Mitchell 2023, "A note on DPO with noisy preferences").
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), found {label_smoothing}")
    scaled_B = beta * pairs.margins()
    losses_B = -logsigmoid(scaled_B)
    # the flipped term is skipped at 0: 0 * inf would be NaN for a margin beyond the range of the type
    if label_smoothing == 0.0:
        return losses_B
    return (1 - label_smoothing) * losses_B - label_smoothing * logsigmoid(-scaled_B)


def hinge(pairs: PairLogprobs, *, beta: float = 0.1) -> Tensor:
    """SLiC hinge on the DPO margin d: max(0, 1 - beta d). Returns [B]. Zhao et al., arXiv:2305.10425."""
    return torch.relu(1 - beta * pairs.margins())


def ipo(pairs: PairLogprobs, *, beta: float = 0.1) -> Tensor:
    """IPO: (r_c/|c| - r_r/|r| - 1/(2 beta))^2 with r the log-ratio to the reference. Returns [B].

    Azar et al., arXiv:2310.12036, eq. 17. Length-normalized: log-ratios are means over completion tokens, as
    in TRL (confirmed there with the authors); OpenRLHF sums them. `beta` is the paper's tau.
    """
    chosen_B = pairs.chosen_log_ratios() / pairs.chosen_tokens_B
    rejected_B = pairs.rejected_log_ratios() / pairs.rejected_tokens_B
    return (chosen_B - rejected_B - 1 / (2 * beta)).square()


PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo}
"""`loss_type` -> loss(pairs, *, beta, ...) -> [B]. A keyword that a loss does not have is a TypeError."""
