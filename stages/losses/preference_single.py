"""Preference losses of each completion by itself, against the reference: what is good rises, what is bad falls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.losses.pair_logprobs import PairLogprobs, log_sigmoid
from stages.losses.registry import Losses

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = Losses()


@SINGLE.add("NCA (two completions)", "2402.05369")
def nca_pair(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """-log s(x_c) - (log s(-x_c) + log s(-x_r)) / 2, x = beta log-ratio, s the sigmoid. Returns [B].

    Noise-contrastive alignment, Chen et al., arXiv:2402.05369, with both completions as its noise samples.
    """
    chosen_B, rejected_B = beta * pairs.chosen_log_ratios(), beta * pairs.rejected_log_ratios()
    return -log_sigmoid(chosen_B) - 0.5 * log_sigmoid(-chosen_B) - 0.5 * log_sigmoid(-rejected_B)


@SINGLE.add("BCO on pairs, without its reward shift", "2404.04656")
def bco_pair(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """-log s(x_c) - log s(-x_r), x = beta log-ratio. Returns [B].

    A binary classifier of good and bad completions, Jung et al., arXiv:2404.04656. The running reward shift of the
    paper belongs to `bco` of the unpaired stage; TRL gives this name to the loss without it, as here.
    """
    return -log_sigmoid(beta * pairs.chosen_log_ratios()) - log_sigmoid(-beta * pairs.rejected_log_ratios())


@SINGLE.add("SPPO, hard labels", "2405.00675")
def sppo_hard(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """(r_c - 1/(2 beta))^2 + (r_r + 1/(2 beta))^2, r the log-ratio. Returns [B].

    Wu et al., arXiv:2405.00675, eq. 4.7 with the probability of winning 1 for chosen and 0 for rejected, as in TRL.
    """
    half = 1 / (2 * beta)
    return (pairs.chosen_log_ratios() - half).square() + (pairs.rejected_log_ratios() + half).square()


@SINGLE.add("APO-zero", "2408.06266")
def apo_zero(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """1 - s(x_c) + s(x_r), x = beta log-ratio: for chosen ones better than the model's own. Returns [B].

    D'Oosterlinck et al., arXiv:2408.06266, eq. 7.
    """
    chosen_B, rejected_B = beta * pairs.chosen_log_ratios(), beta * pairs.rejected_log_ratios()
    return (-chosen_B).sigmoid() + rejected_B.sigmoid()


@SINGLE.add("APO-down", "2408.06266")
def apo_down(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """s(x_c) + 1 - s(x_c - x_r), x = beta log-ratio: for chosen ones worse than the model's own. Returns [B].

    D'Oosterlinck et al., arXiv:2408.06266, eq. 8.
    """
    chosen_B, rejected_B = beta * pairs.chosen_log_ratios(), beta * pairs.rejected_log_ratios()
    return chosen_B.sigmoid() + (rejected_B - chosen_B).sigmoid()
