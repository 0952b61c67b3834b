"""Preference losses: one value per pair, from summed completion log-probabilities.

B pairs. A loss takes `PairLogprobs` and keywords, and returns [B]; the loop sums and divides by the pairs. Losses that
look at each completion by itself are in `preference_single`, those without a reference in `preference_free`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from stages.losses.pair_logprobs import PairLogprobs, log_sigmoid, smoothed
from stages.losses.preference_free import REFERENCE_FREE
from stages.losses.preference_single import SINGLE
from stages.losses.registry import Losses

if TYPE_CHECKING:
    from torch import Tensor

MARGIN = Losses()


@MARGIN.add("DPO; with label_smoothing cDPO", "2305.18290", f_divergence=True)
def sigmoid(pairs: PairLogprobs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -(1-e) log sigmoid(beta d) - e log sigmoid(-beta d), d the margin, e the smoothing. Returns [B].

    Rafailov et al., arXiv:2305.18290, eq. 7; e > 0 is conservative DPO, for labels that are wrong with
    probability e (Mitchell 2023, "A note on DPO with noisy preferences"), which TRL 1.16 leaves out.
    """
    return smoothed(beta * pairs.margins(), label_smoothing)


@MARGIN.add("length-normalized DPO (Tulu 3)", "2411.15124", f_divergence=True)
def sigmoid_norm(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """DPO on scores per token. Returns [B]. Lambert et al., arXiv:2411.15124, eq. 6.

    Keeps the reference; SimPO, which some call by this name, has none and is `simpo`.
    """
    return -log_sigmoid(beta * pairs.margins_per_token())


@MARGIN.add("SLiC, RSO", "2305.10425, 2309.06657", f_divergence=True)
def hinge(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """Hinge on the DPO margin d: max(0, 1 - beta d). Returns [B].

    Zhao et al., arXiv:2305.10425, normalized by the reference as in Liu et al., arXiv:2309.06657.
    """
    return (1 - beta * pairs.margins()).relu()


@MARGIN.add("IPO", "2310.12036", f_divergence=True)
def ipo(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """IPO: (r_c/|c| - r_r/|r| - 1/(2 beta))^2 with r the log-ratio to the reference. Returns [B].

    Azar et al., arXiv:2310.12036, eq. 17. Length-normalized: log-ratios are means over completion tokens, as
    in TRL (confirmed there with the authors); OpenRLHF and TRL's on-line trainer sum them. `beta` is the paper's tau.
    """
    return (pairs.margins_per_token() - 1 / (2 * beta)).square()


@MARGIN.add("EXO (two completions)", "2402.00856", f_divergence=True, needs=("label_smoothing",))
def exo_pair(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> Tensor:
    """KL(q || p) with q = sigmoid(+-beta d) and p = (1 - e, e), d the margin. Returns [B].

    Ji et al., arXiv:2402.00856, eq. 16; the smoothing e keeps p above zero. Raises ValueError for e = 0.
    """
    if not 0.0 < label_smoothing < 0.5:
        raise ValueError(f"exo_pair needs a label_smoothing in (0, 0.5), found {label_smoothing}")
    from math import log, log1p

    logits_B = beta * pairs.margins()
    log_chosen_B, log_rejected_B = log_sigmoid(logits_B), log_sigmoid(-logits_B)
    return log_chosen_B.exp() * (log_chosen_B - log1p(-label_smoothing)) + log_rejected_B.exp() * (
        log_rejected_B - log(label_smoothing)
    )


@MARGIN.add("robust DPO", "2403.00409", f_divergence=True)
def robust(pairs: PairLogprobs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """An unbiased estimate of the DPO loss when a share e of the labels is flipped. Returns [B].

    (-(1-e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2e): Chowdhury et al., arXiv:2403.00409, eq. 11.
    """
    logits_B = beta * pairs.margins()
    clean_B, flipped_B = smoothed(logits_B, 0.0), smoothed(-logits_B, 0.0)
    return ((1 - label_smoothing) * clean_B - label_smoothing * flipped_B) / (1 - 2 * label_smoothing)


@MARGIN.add("DiscoPOP", "2406.08414", f_divergence=True)
def discopop(pairs: PairLogprobs, *, beta: float, discopop_tau: float = 0.05) -> Tensor:
    """Log-ratio modulated loss: (1 - m) (-log sigmoid(x)) + m e^-x, x = beta d, m = sigmoid(x / tau). Returns [B].

    Lu et al., arXiv:2406.08414, eq. 5 (found by a language model's search).
    """
    logits_B = beta * pairs.margins()
    log_blend_B = log_sigmoid(logits_B / discopop_tau)
    # the second term in logarithms: far to the left m is 0 where e^-x is infinite
    return -log_sigmoid(-logits_B / discopop_tau).exp() * log_sigmoid(logits_B) + (log_blend_B - logits_B).exp()


@MARGIN.add("AOT", "2406.05882", couples_rows=True)
def aot(pairs: PairLogprobs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Policy log-ratios of the pairs dominate the reference's in distribution: smoothed DPO on sorted values. [B].

    d = sort(log pi(c) - log pi(r)) - sort(log pi_ref(c) - log pi_ref(r)), over all pairs of the optimizer step; the
    loss of a pair stands at its own place. Melnyk et al., arXiv:2406.05882, paired variant. TRL sorts the pairs of
    one device's micro-batch, so that its loss depends on how a batch is cut up.
    """
    log_ratios_B = pairs.chosen_B - pairs.rejected_B
    order_B = log_ratios_B.argsort(stable=True)
    partners_B = (pairs.reference_chosen_B - pairs.reference_rejected_B).sort().values
    return smoothed(beta * (log_ratios_B - partners_B[order_B.argsort()]), label_smoothing)


@MARGIN.add("AOT, unpaired", "2406.05882", couples_rows=True)
def aot_unpaired(pairs: PairLogprobs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Log-ratios of chosen completions dominate those of rejected ones in distribution. Returns [B].

    d = sort(chosen log-ratios) - sort(rejected log-ratios) over all pairs of the optimizer step; the loss stands at
    the place of the chosen completion. Melnyk et al., arXiv:2406.05882. TRL sorts within a micro-batch.
    """
    chosen_B = pairs.chosen_log_ratios()
    order_B = chosen_B.argsort(stable=True)
    partners_B = pairs.rejected_log_ratios().sort().values
    return smoothed(beta * (chosen_B - partners_B[order_B.argsort()]), label_smoothing)


PREFERENCE_LOSSES = Losses({**MARGIN, **SINGLE, **REFERENCE_FREE})
"""`loss_type` -> Loss. A keyword that a loss does not have is a TypeError."""


def weighted(
    names: Sequence[str], weights: Sequence[float], settings: Mapping[str, float]
) -> Callable[[PairLogprobs], Tensor]:
    """sum_k w_k loss_k, each with those of the settings that it takes (MPO: Wang et al., arXiv:2411.10442)."""
    losses = [PREFERENCE_LOSSES[name].with_settings(settings) for name in names]

    def total(pairs: PairLogprobs) -> Tensor:
        values = [weight * loss(pairs) for loss, weight in zip(losses, weights, strict=True)]
        return sum(values[1:], start=values[0])

    return total
