"""Preference losses without a reference model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.losses.pair_logprobs import PairLogprobs, bounded_expm1, log_sigmoid, smoothed
from stages.losses.registry import Losses

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE_FREE = Losses()
CHOSEN_NLL = {"nll_loss": PairLogprobs.chosen_nll}
GOLD_NLL = {"nll_loss": PairLogprobs.gold_nll}
PER_TOKEN = PairLogprobs.mean_logprobs


def log_odds_ratio(pairs: PairLogprobs) -> Tensor:
    """[B]: log odds of the chosen completion minus those of the rejected one; odds = p / (1 - p) of a token's
    geometric mean p."""
    # a completion of probability 1 has infinite odds
    chosen_B, rejected_B = (mean_B.clamp(max=-1e-7) for mean_B in pairs.mean_logprobs())
    return (chosen_B - rejected_B) - ((-chosen_B.expm1()).log() - (-rejected_B.expm1()).log())


def log_sigmoid_odds(pairs: PairLogprobs) -> Tensor:
    """[B]: what ORPO raises."""
    return log_sigmoid(log_odds_ratio(pairs))


@REFERENCE_FREE.add("NLL of the chosen completion (term of RPO, MPO)", "2404.19733, 2405.16436", reference=False)
def sft(pairs: PairLogprobs) -> Tensor:
    """-log pi(c) / |c|. Returns [B].

    Normalized by the pair's own length, as in Pang et al., arXiv:2404.19733, eq. 2 (RPO; Liu et al., arXiv:2405.16436,
    add the same term to DPO). TRL takes the mean over all chosen tokens of a micro-batch, in which long completions
    count more and which depends on how a batch is cut; so in every likelihood term below (cpo, orpo, tpo and kin).
    """
    return pairs.chosen_nll()


def log_ratio(pairs: PairLogprobs) -> Tensor:
    """[B]: log pi(c) - log pi(r), without a reference."""
    return pairs.chosen_B - pairs.rejected_B


def log_ratio_per_token(pairs: PairLogprobs) -> Tensor:
    """[B]: log pi(c)/|c| - log pi(r)/|r|."""
    chosen_B, rejected_B = pairs.mean_logprobs()
    return chosen_B - rejected_B


@REFERENCE_FREE.add("CPO", "2401.08417", reference=False, metrics=CHOSEN_NLL)
def cpo(pairs: PairLogprobs, *, beta: float, label_smoothing: float = 0.0, cpo_alpha: float = 1.0) -> Tensor:
    """-log s(beta (log pi(c) - log pi(r))) + a (-log pi(c) / |c|). Returns [B].

    Xu et al., arXiv:2401.08417, eq. 5 and 6: DPO with a uniform reference, and behaviour cloning. a = `cpo_alpha`; the
    second term is per token and pair, as `sft`.
    """
    return smoothed(beta * log_ratio(pairs), label_smoothing) + cpo_alpha * pairs.chosen_nll()


@REFERENCE_FREE.add("CPO with SLiC's hinge", "2401.08417, 2305.10425", reference=False, metrics=CHOSEN_NLL)
def cpo_hinge(pairs: PairLogprobs, *, beta: float, cpo_alpha: float = 1.0) -> Tensor:
    """max(0, 1 - beta (log pi(c) - log pi(r))) + a (-log pi(c) / |c|). Returns [B].

    The hinge of Zhao et al., arXiv:2305.10425, in the place of CPO's sigmoid (arXiv:2401.08417): TRL's CPO trainer with
    loss_type hinge.
    """
    return (1 - beta * log_ratio(pairs)).relu() + cpo_alpha * pairs.chosen_nll()


@REFERENCE_FREE.add(
    "CPO with IPO's square", "2401.08417, 2310.12036", reference=False, reward=PER_TOKEN, metrics=CHOSEN_NLL
)
def cpo_ipo(pairs: PairLogprobs, *, beta: float, cpo_alpha: float = 1.0) -> Tensor:
    """(log pi(c)/|c| - log pi(r)/|r| - 1/(2 beta))^2 + a (-log pi(c) / |c|). Returns [B].

    The square of Azar et al., arXiv:2310.12036, in the place of CPO's sigmoid (arXiv:2401.08417): TRL's CPO trainer
    with loss_type ipo.
    """
    return (log_ratio_per_token(pairs) - 1 / (2 * beta)).square() + cpo_alpha * pairs.chosen_nll()


@REFERENCE_FREE.add("SimPO", "2405.14734", reference=False, reward=PER_TOKEN)
def simpo(pairs: PairLogprobs, *, beta: float, simpo_gamma: float = 0.5, label_smoothing: float = 0.0) -> Tensor:
    """-log s(beta (log pi(c)/|c| - log pi(r)/|r|) - gamma). Returns [B]. Meng et al., arXiv:2405.14734, eq. 6.

    TRL's CPO trainer adds an NLL term unless its cpo_alpha is 0; here that is `[simpo, sft]` with `loss_weights`.
    `label_smoothing` as in `sigmoid`; the paper has none, TRL has.
    """
    return smoothed(beta * log_ratio_per_token(pairs) - simpo_gamma, label_smoothing)


def power_rewards(pairs: PairLogprobs, *, alpha: float) -> tuple[Tensor, Tensor]:
    """(chosen [B], rejected [B]): (1 - p^-a) / a, p the geometric mean of token probabilities; log p for a = 0."""
    chosen_B, rejected_B = pairs.mean_logprobs()
    if alpha == 0.0:
        return chosen_B, rejected_B
    return -bounded_expm1(-alpha * chosen_B) / alpha, -bounded_expm1(-alpha * rejected_B) / alpha


@REFERENCE_FREE.add("AlphaPO", "2501.03884", reference=False, reward=power_rewards)
def alphapo(
    pairs: PairLogprobs,
    *,
    beta: float,
    alpha: float = 0.25,
    simpo_gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """SimPO with the reward (1 - p^-alpha) / alpha, p the geometric mean of token probabilities. Returns [B].

    Gupta et al., arXiv:2501.03884, eq. 5; alpha towards 0 is SimPO. The power is kept within what float32 holds.
    """
    chosen_B, rejected_B = power_rewards(pairs, alpha=alpha)
    return smoothed(beta * (chosen_B - rejected_B) - simpo_gamma, label_smoothing)


ORPO_METRICS = {**CHOSEN_NLL, "log_odds_ratio": log_sigmoid_odds, "log_odds_chosen": log_odds_ratio}


@REFERENCE_FREE.add("ORPO", "2403.07691", reference=False, reward=PER_TOKEN, metrics=ORPO_METRICS)
def orpo(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """-l_c - beta log s(log odds(c) - log odds(r)), l = log pi(y)/|y|, odds = e^l / (1 - e^l). Returns [B].

    Hong et al., arXiv:2403.07691, eq. 6 and 7; beta is the paper's lambda. The likelihood is the chosen completion's,
    as in the paper; TRL's also counts the prompt's tokens.
    """
    return pairs.chosen_nll() - beta * log_sigmoid_odds(pairs)


@REFERENCE_FREE.add("TPO", "2405.16681", reference=False, gold=True, metrics=GOLD_NLL)
def tpo(pairs: PairLogprobs, *, beta: float, label_smoothing: float = 0.0, tpo_alpha: float = 1.0) -> Tensor:
    """-log s(beta (log pi(c) - log pi(r))) + a (-log pi(g) / |g|), g the gold completion. Returns [B].

    Saeidi et al., arXiv:2405.16681, triple preferences; a = `tpo_alpha`.
    """
    return smoothed(beta * log_ratio(pairs), label_smoothing) + tpo_alpha * pairs.gold_nll()


@REFERENCE_FREE.add("TPO with SLiC's hinge", "2405.16681, 2305.10425", reference=False, gold=True, metrics=GOLD_NLL)
def tpo_hinge(pairs: PairLogprobs, *, beta: float, tpo_alpha: float = 1.0) -> Tensor:
    """max(0, 1 - beta (log pi(c) - log pi(r))) + a (-log pi(g) / |g|). Returns [B].

    The hinge of Zhao et al., arXiv:2305.10425, in the place of TPO's sigmoid (arXiv:2405.16681), as in TRL.
    """
    return (1 - beta * log_ratio(pairs)).relu() + tpo_alpha * pairs.gold_nll()


@REFERENCE_FREE.add(
    "TPO with IPO's square",
    "2405.16681, 2310.12036",
    reference=False,
    gold=True,
    reward=PER_TOKEN,
    metrics=GOLD_NLL,
)
def tpo_ipo(pairs: PairLogprobs, *, beta: float, tpo_alpha: float = 1.0) -> Tensor:
    """(log pi(c)/|c| - log pi(r)/|r| - 1/(2 beta))^2 + a (-log pi(g) / |g|). Returns [B].

    The square of Azar et al., arXiv:2310.12036, in the place of TPO's sigmoid (arXiv:2405.16681), as in TRL.
    """
    return (log_ratio_per_token(pairs) - 1 / (2 * beta)).square() + tpo_alpha * pairs.gold_nll()


@REFERENCE_FREE.add("TPO-L", "2405.16681", reference=False, gold=True, reward=PER_TOKEN, metrics=GOLD_NLL)
def tpo_l(
    pairs: PairLogprobs,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    tpo_alpha: float = 1.0,
    tpo_l_gamma: float = 0.5,
) -> Tensor:
    """-log s(beta (log pi(c)/|c| - log pi(r)/|r|) - gamma) + a (-log pi(g) / |g|). Returns [B].

    Saeidi et al., arXiv:2405.16681, the length-normalized variant with a target margin.
    """
    logits_B = beta * log_ratio_per_token(pairs) - tpo_l_gamma
    return smoothed(logits_B, label_smoothing) + tpo_alpha * pairs.gold_nll()
