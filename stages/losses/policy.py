"""Policy-gradient losses: one value per completion token, from its log-ratio and its advantage.

N completion tokens of S sequences (`PolicyTokens`). A loss gives [N]; its `Aggregation` says how these become the loss
of a step. On policy every ratio is 1, and the gradient of each is that of -A log pi, weighted by its aggregation: they
differ in what they make of ratios that have moved. Imports no torch: a recipe's `loss_type` is checked against this
table before anything heavy is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log
from typing import TYPE_CHECKING

from stages.losses.policy_aggregation import AGGREGATIONS, Aggregation
from stages.losses.policy_tokens import PolicyTokens, ratios
from stages.losses.registry import Loss

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_LOG_WEIGHT, _MOST_LOG_WEIGHT = log(1e-8), 20.0


@dataclass(frozen=True, kw_only=True)
class Surrogate(Loss):
    """A policy loss `f(tokens, *, parameters)` -> [N], and how it is summed up."""

    reference: bool = False
    """The KL term is not the loss's own: it is added where beta is above 0."""
    aggregation: Aggregation
    level: str = "token"
    """`importance_sampling_level` where a recipe says none."""
    only_level: bool = False
    """Takes no other."""
    couples_tokens: bool = False
    """The loss of a token depends on the other tokens of its sequence, whatever the level."""
    weighs_corrections: bool = False
    """Reads the corrections to the sampler itself; others are multiplied by them."""


def clipped(
    tokens: PolicyTokens, *, epsilon: float = 0.2, epsilon_high: float | None = None, delta: float | None = None
) -> Tensor:
    """-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A), rho = exp(log-ratio). Returns [N].

    Schulman et al., arXiv:1707.06347, eq. 7, with the group's advantage GRPO (arXiv:2402.03300, 2503.20783); an
    `epsilon_high` of its own is DAPO's clip-higher (arXiv:2503.14476), `delta` INTELLECT-2's bound on rho where A < 0
    (arXiv:2505.07291). With ratios of sequences GSPO (arXiv:2507.18071) and LUSPO (arXiv:2602.05261).
    """
    ratios_N = ratios(tokens.log_ratios_N)
    bounded_N = ratios_N.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    if delta is not None:
        ratios_N = ratios_N.clamp(max=delta)
    return -(ratios_N * tokens.advantages_N).minimum(bounded_N * tokens.advantages_N)


def clipped_low(tokens: PolicyTokens, *, epsilon: float = 0.2) -> Tensor:
    """[N] bool: below 1 - epsilon with A < 0, where `clipped` gives no gradient."""
    return (tokens.log_ratios_N.exp() < 1 - epsilon) & (tokens.advantages_N < 0)


def clipped_high(tokens: PolicyTokens, *, epsilon: float = 0.2, epsilon_high: float | None = None) -> Tensor:
    """[N] bool: above 1 + epsilon_high with A > 0, where `clipped` gives no gradient."""
    highest = 1 + (epsilon if epsilon_high is None else epsilon_high)
    return (tokens.log_ratios_N.exp() > highest) & (tokens.advantages_N > 0)


def clipped_at_all(tokens: PolicyTokens, *, epsilon: float = 0.2, epsilon_high: float | None = None) -> Tensor:
    """[N] bool: either of them."""
    return clipped_low(tokens, epsilon=epsilon) | clipped_high(tokens, epsilon=epsilon, epsilon_high=epsilon_high)


def cispo(tokens: PolicyTokens, *, epsilon_high: float) -> Tensor:
    """-sg(min(rho, epsilon_high)) A log pi: a bounded weight instead of a clip, so that every token learns. [N].

    MiniMax-M1, arXiv:2506.13585; ScaleRL, arXiv:2510.13786, with epsilon_high = 5. The bound is of rho itself, not of
    rho - 1 as in the losses that clip.
    """
    weights_N = tokens.log_ratios_N.detach().exp().clamp(max=epsilon_high)
    return -weights_N * tokens.advantages_N * tokens.logprobs_N


def cispo_clipped(tokens: PolicyTokens, *, epsilon_high: float) -> Tensor:
    """[N] bool: rho above epsilon_high, A > 0."""
    return (tokens.log_ratios_N.exp() > epsilon_high) & (tokens.advantages_N > 0)


def sapo(tokens: PolicyTokens, *, sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05) -> Tensor:
    """-(4 / t) sigmoid(t (rho - 1)) A, t the temperature of A's sign: a gate instead of a clip. Returns [N].

    Qwen's SAPO, arXiv:2511.20347. On policy the value is -2 A / t and the slope -A.
    """
    advantages_N = tokens.advantages_N
    temperatures_N = advantages_N.new_full(advantages_N.shape, sapo_temperature_pos)
    temperatures_N = temperatures_N.masked_fill(advantages_N <= 0, sapo_temperature_neg)
    gates_N = (temperatures_N * (ratios(tokens.log_ratios_N) - 1)).sigmoid() * 4 / temperatures_N
    return -gates_N * advantages_N


def vespo(
    tokens: PolicyTokens,
    *,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> Tensor:
    """-sg(phi) A log pi, phi a weight of the whole sequence (`vespo_phi`). Returns [N]. VESPO, arXiv:2602.10693."""
    phi_S = vespo_phi(
        tokens,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
    )
    return -tokens.sequences.to_tokens(phi_S) * tokens.advantages_N * tokens.logprobs_N


def vespo_phi(
    tokens: PolicyTokens,
    *,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> Tensor:
    """phi(w) = e^l w^k e^(-l w), with (k, l) of A's sign; phi(1) = 1. Returns [S], without a gradient.

    w is the product of the sequence's token ratios and of its corrections to the sampler. It is kept within 1e-8 and
    e^20, and a log-ratio within 20.
    """
    sequences = tokens.sequences
    log_weights_N = tokens.changes_N.detach().clamp(-20.0, 20.0)
    if tokens.corrections_N is not None:
        log_weights_N = log_weights_N + tokens.corrections_N.log().clamp(_LEAST_LOG_WEIGHT, _MOST_LOG_WEIGHT)
    log_weights_S = sequences.sums(log_weights_N).clamp(_LEAST_LOG_WEIGHT, _MOST_LOG_WEIGHT)
    worse_S = sequences.means(tokens.advantages_N.detach()) < 0
    k_S = log_weights_S.new_full(worse_S.shape, vespo_k_pos).masked_fill(worse_S, vespo_k_neg)
    lambda_S = log_weights_S.new_full(worse_S.shape, vespo_lambda_pos).masked_fill(worse_S, vespo_lambda_neg)
    return (lambda_S + k_S * log_weights_S - lambda_S * log_weights_S.exp()).exp()


def gmpo(tokens: PolicyTokens, *, epsilon: float = 0.4, epsilon_high: float | None = None) -> Tensor:
    """-A times the geometric mean of the sequence's ratios, each clipped. Returns [N], the sequence's at every token.

    GMPO, arXiv:2507.20673: log-ratios are clipped to [-epsilon, epsilon_high], above where A > 0 and below elsewhere.
    The mean is over the tokens that are learned from, and what they get is scaled to all tokens' share.
    """
    sequences, log_ratios_N = tokens.sequences, tokens.log_ratios_N
    highest = epsilon if epsilon_high is None else epsilon_high
    bounded_N = log_ratios_N.clamp(max=highest).where(tokens.advantages_N > 0, log_ratios_N.clamp(min=-epsilon))
    lengths_S = sequences.lengths().to(bounded_N.dtype)
    kept_S = lengths_S
    if tokens.kept_N is not None:
        bounded_N = bounded_N * tokens.kept_N
        kept_S = sequences.sums(tokens.kept_N.to(bounded_N.dtype))
    means_S = sequences.sums(bounded_N) / kept_S.clamp(min=1)
    shares_S = lengths_S / kept_S.clamp(min=1)
    return -sequences.to_tokens(ratios(means_S) * shares_S) * tokens.advantages_N


def gmpo_low(tokens: PolicyTokens, *, epsilon: float = 0.4) -> Tensor:
    """[N] bool: log-ratio below -epsilon with A < 0."""
    return (tokens.log_ratios_N < -epsilon) & (tokens.advantages_N < 0)


def gmpo_high(tokens: PolicyTokens, *, epsilon: float = 0.4, epsilon_high: float | None = None) -> Tensor:
    """[N] bool: log-ratio above epsilon_high with A > 0."""
    return (tokens.log_ratios_N > (epsilon if epsilon_high is None else epsilon_high)) & (tokens.advantages_N > 0)


def gmpo_at_all(tokens: PolicyTokens, *, epsilon: float = 0.4, epsilon_high: float | None = None) -> Tensor:
    """[N] bool: either of them."""
    return gmpo_low(tokens, epsilon=epsilon) | gmpo_high(tokens, epsilon=epsilon, epsilon_high=epsilon_high)


_MEAN_OF_MEANS, _TOKEN_MEAN = AGGREGATIONS["mean_of_means"], AGGREGATIONS["token_mean"]
_CLIPS = {
    "clip_ratio/low_mean": clipped_low,
    "clip_ratio/high_mean": clipped_high,
    "clip_ratio/region_mean": clipped_at_all,
}
_GRPO = Surrogate(
    name="grpo", function=clipped, title="GRPO", paper="2402.03300", aggregation=_MEAN_OF_MEANS, metrics=_CLIPS
)
_CISPO, _VESPO = {"cispo_clip_ratio": cispo_clipped}, {"vespo/phi_seq_mean": vespo_phi}
_GMPO = {
    "clip_ratio/low_mean": gmpo_low,
    "clip_ratio/high_mean": gmpo_high,
    "clip_ratio/region_mean": gmpo_at_all,
}

_ALL = (
    _GRPO,
    # TRL takes the mean over the tokens of a micro-batch; micro-batches must not change a result here, so it is dapo
    replace(_GRPO, name="bnpo", title="GRPO, mean over tokens (as `dapo`)", aggregation=_TOKEN_MEAN),
    replace(_GRPO, name="dr_grpo", title="Dr. GRPO", paper="2503.20783", aggregation=AGGREGATIONS["constant"]),
    replace(_GRPO, name="dapo", title="DAPO", paper="2503.14476", aggregation=_TOKEN_MEAN),
    replace(
        _GRPO,
        name="luspo",
        title="LUSPO",
        paper="2602.05261",
        aggregation=AGGREGATIONS["mean_of_sums"],
        level="sequence",
    ),
    replace(_GRPO, name="gspo", title="GSPO", paper="2507.18071", level="sequence", only_level=True),
    replace(_GRPO, name="gspo_token", title="GSPO-token", paper="2507.18071", level="sequence_token", only_level=True),
    replace(
        _GRPO,
        name="cispo",
        function=cispo,
        title="CISPO",
        paper="2506.13585, 2510.13786",
        aggregation=_TOKEN_MEAN,
        metrics=_CISPO,
    ),
    replace(_GRPO, name="sapo", function=sapo, title="SAPO", paper="2511.20347", metrics={}),
    replace(
        _GRPO,
        name="vespo",
        function=vespo,
        title="VESPO",
        paper="2602.10693",
        aggregation=_TOKEN_MEAN,
        only_level=True,
        couples_tokens=True,
        weighs_corrections=True,
        metrics=_VESPO,
    ),
    replace(
        _GRPO,
        name="gmpo",
        function=gmpo,
        title="GMPO",
        paper="2507.20673",
        only_level=True,
        couples_tokens=True,
        metrics=_GMPO,
    ),
)

POLICY_LOSSES: dict[str, Surrogate] = {loss.name: loss for loss in _ALL}
"""`loss_type` -> the loss of a policy's tokens."""
