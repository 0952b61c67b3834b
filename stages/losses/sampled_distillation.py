"""Distillation by policy gradients: what each token that the student sampled counts.

N tokens of completions, all of a completion side by side and in order; masked ones are not among them. A token's
advantage is a_t = log T(y_t) - log S(y_t), of the teacher and of the policy that sampled it. A loss makes its credit
A_t of these, without a gradient, and the objective is the sum of -A_t log S(y_t). Imports no torch: a recipe's
`loss_type` is checked against this table before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stages.losses.policy_tokens import Sequences
from stages.losses.registry import Loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SampledTokens:
    """What teacher and sampling policy said of the tokens."""

    advantages_N: Tensor
    """a_t."""
    sequences: Sequences


@dataclass(frozen=True, kw_only=True)
class SampledLoss(Loss):
    """A loss `f(tokens, *, parameters)` -> credits [N]."""

    reference: bool = True
    """The teacher."""
    extremes: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Metric -> (the one of `metrics` whose values it bounds, 1 for their largest and -1 for their smallest)."""


def iw_opd(tokens: SampledTokens, *, iw_opd_gamma: float = 0.5) -> Tensor:
    """w_t a_t with weights of `iw_opd_weights`. Returns [N]. IW-OPD, arXiv:2606.22600."""
    return iw_opd_weights(tokens, iw_opd_gamma=iw_opd_gamma) * tokens.advantages_N


def iw_opd_weights(tokens: SampledTokens, *, iw_opd_gamma: float = 0.5) -> Tensor:
    """w_t = 1 + gamma (1 - sum_{s<t} |a_s| / sum_s |a_s|): the further student and teacher have come apart before a
    token, the less its supervision is worth. Returns [N].

    The share that is still to come is summed up as it is, so that nothing cancels; TRL's epsilon below the sum is not
    needed: where all advantages are 0, all of it is to come.
    """
    to_come_N = future_sums(tokens.advantages_N.abs(), tokens.sequences, gamma=1.0)
    totals_N = tokens.sequences.to_tokens(tokens.sequences.sums(tokens.advantages_N.abs()))
    shares_N = (to_come_N / totals_N).masked_fill(totals_N == 0, 1.0).clamp(max=1.0)
    return 1 + iw_opd_gamma * shares_N


def absolute(tokens: SampledTokens) -> Tensor:
    """[N] |a_t|."""
    return tokens.advantages_N.abs()


def minillm(
    tokens: SampledTokens,
    *,
    gamma: float = 1.0,
    length_normalization: bool = True,
    single_step_decomposition: bool = True,
) -> Tensor:
    """R_t = sum_{s>=t} gamma^(s-t) a_s, or gamma^(s-t) weighted mean of these a_s. Returns [N]. MiniLLM, Gu et al.,
    arXiv:2306.08543, sec. 2.2.

    `single_step_decomposition`: the sum is of the tokens after t alone (eq. 3), 0 at the last one, for the objective
    has the exact divergence at t in place of a_t: so the gradient is, on average, that of the divergence of whole
    completions (gamma 1, no normalization). TRL, when it had MiniLLM, left a_t in as well, which counts it twice; its
    gamma was 0, which leaves nothing of what follows.
    """
    sums_N = _from_here(tokens.advantages_N, tokens.sequences, gamma, later=single_step_decomposition)
    if not length_normalization:
        return sums_N
    ones_N = tokens.advantages_N.new_ones(tokens.advantages_N.shape)
    weights_N = _from_here(ones_N, tokens.sequences, gamma, later=single_step_decomposition)
    return (sums_N / weights_N).masked_fill(weights_N == 0, 0.0)


def _from_here(values_N: Tensor, sequences: Sequences, gamma: float, *, later: bool) -> Tensor:
    sums_N = future_sums(values_N, sequences, gamma=gamma)
    return gamma * shifted(sums_N, sequences, 1) if later else sums_N


def future_sums(values_N: Tensor, sequences: Sequences, *, gamma: float) -> Tensor:
    """[N] sum_{s>=t} gamma^(s-t) values_s over the tokens of t's sequence.

    Sums of 1, 2, 4, ... tokens, each of two of the ones before: no loop over tokens, no power of gamma that is divided
    by, and what stands beside a sequence in the batch adds exact zeros.
    """
    step = 1
    while step < len(values_N):
        values_N = values_N + gamma**step * shifted(values_N, sequences, step)
        step *= 2
    return values_N


def shifted(values_N: Tensor, sequences: Sequences, step: int) -> Tensor:
    """[N] values_(t + step); 0 where that is of another sequence, or behind the last."""
    shifted_N = values_N.new_zeros(values_N.shape)
    same = sequences.of_N[step:] == sequences.of_N[:-step]
    shifted_N[:-step] = values_N[step:] * same
    return shifted_N


_WEIGHT = "iw_opd/mean_weight"

_ALL = (
    SampledLoss(
        name="iw_opd",
        function=iw_opd,
        title="IW-OPD: distillation by policy gradients, weighted by position",
        paper="2606.22600",
        metrics={"iw_opd/mean_advantage": iw_opd, "iw_opd/mean_abs_advantage": absolute, _WEIGHT: iw_opd_weights},
        extremes={"iw_opd/min_weight": (_WEIGHT, -1), "iw_opd/max_weight": (_WEIGHT, 1)},
    ),
    SampledLoss(
        name="minillm",
        function=minillm,
        title="MiniLLM: distillation by policy gradients, with what follows a token",
        paper="2306.08543",
        metrics={"minillm/mean_advantage": minillm},
    ),
)

SAMPLED_LOSSES: dict[str, SampledLoss] = {loss.name: loss for loss in _ALL}
"""`loss_type` of `distill` -> the loss of tokens that the student sampled."""
