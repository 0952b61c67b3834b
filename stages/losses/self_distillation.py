"""What a token costs a student whose teacher is the same model under a richer prompt: SDPO, Hübotter et al.,
arXiv:2601.20802, with the supports and the importance of TRL's `SDPOTrainer`.

N positions, C positions of a chunk, H hidden size, V vocabulary, K likeliest tokens. The teacher has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.losses.distillation import Divergence
from stages.losses.head import Head, chunk_length
from stages.losses.linear_divergence import Compare, LogitsOf, compared, logits_in_parts, over_all_tokens
from stages.losses.top_divergence import student_outcomes

_MOST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class OwnTop:
    """The student's likeliest tokens, at which the two distributions are compared."""

    most: int
    add_tail: bool
    """All other tokens are one outcome more; else the likeliest alone are taken for distributions."""

    def outcomes(self, logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
        """[N, K] or [N, K + 1] logits of the outcomes; differentiable."""
        return student_outcomes(logits_NV, ids_NK) if self.add_tail else logits_NV.gather(1, ids_NK)


@dataclass(frozen=True)
class Importance:
    """How much likelier the student finds what was sampled than the policy that sampled it, up to a bound."""

    targets_N: Tensor
    old_N: Tensor
    most: float

    def of_type(self, dtype: torch.dtype) -> Importance:
        """The same with floats of this type."""
        return replace(self, old_N=self.old_N.to(dtype))

    def of_logits(self, part: slice, logits_CV: Tensor) -> Tensor:
        """[C], without a gradient."""
        chosen_C = logits_CV.gather(1, self.targets_N[part][:, None])[:, 0]
        return clipped_importance(chosen_C - logits_CV.logsumexp(1), self.old_N[part], self.most)


@dataclass(frozen=True)
class Comparison:
    """How two models' distributions are compared."""

    divergence: Divergence
    top: OwnTop | None = None
    """None: over the whole vocabulary."""
    importance: Importance | None = None
    """None: every token counts 1."""


def clipped_importance(logprobs_N: Tensor, old_N: Tensor, most: float) -> Tensor:
    """min(exp(log p - log p_old), most), log-ratios being within 20. Returns [N], without a gradient."""
    log_ratios_N = (logprobs_N.detach() - old_N).clamp(-_MOST_LOG_RATIO, _MOST_LOG_RATIO)
    return log_ratios_N.exp().clamp(max=most)


def sampled_token(logprobs_N: Tensor, teacher_N: Tensor) -> Tensor:
    """sg(log s - log t) log s of the token that was sampled. Returns [N].

    On policy its gradient is on average that of KL(s || t), whose gradient is E_s[(log s - log t) d log s]; its value
    is none: log s - log t is the estimate of the divergence.
    """
    return (logprobs_N - teacher_N).detach() * logprobs_N


def own_top_divergence(student_NV: Tensor, teacher_NV: Tensor, top: OwnTop, divergence: Divergence) -> Tensor:
    """[N] from logits, over the outcomes of `top`. A plain differentiable expression, beside `linear_self_divergence`.

    The tail is added up from the other logits themselves. TRL's is 1 less the likeliest tokens' probabilities, at
    least 1e-7, so that where these are all but certain its value is off by as much and its tail has no gradient.
    """
    ids_NK = student_NV.detach().topk(min(top.most, student_NV.shape[1]), dim=1).indices
    return divergence.of_logits(top.outcomes(student_NV, ids_NK), top.outcomes(teacher_NV, ids_NK))


def linear_self_divergence(
    hidden_NH: Tensor,
    head: Head,
    teacher_hidden_NH: Tensor,
    teacher_head: Head,
    comparison: Comparison,
    *,
    weights_N: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum of weight x importance x divergence, importance x divergence [N] without a gradient), from hidden states.

    As `linear_divergence`. Raises ValueError for shapes that do not fit.
    """
    head.check(hidden_NH, teacher_hidden_NH)
    teacher_head.check(teacher_hidden_NH, hidden_NH)
    longest = chunk_tokens or chunk_length(head)
    teacher = logits_in_parts(teacher_hidden_NH, teacher_head, longest)
    divergence, top = comparison.divergence, comparison.top
    compare = over_all_tokens(teacher, divergence) if top is None else _over_own_top(teacher, top, divergence)
    if comparison.importance is not None:
        compare = _weighted(compare, comparison.importance)
    return compared(hidden_NH, head, compare, weights_N=weights_N, longest=longest)


def _over_own_top(teacher: LogitsOf, top: OwnTop, divergence: Divergence) -> Compare:
    def compare(part: slice, student_CV: Tensor) -> tuple[Tensor, Tensor]:
        ids_CK = student_CV.topk(min(top.most, student_CV.shape[1]), dim=1).indices
        student = top.outcomes(student_CV, ids_CK)
        # both of them are destroyed: the first becomes slopes
        rest_C1 = student[:, ids_CK.shape[1] :].clone()
        divergences_C, scales_C = divergence.slope(student, top.outcomes(teacher(part), ids_CK))
        if rest_C1.numel():
            # of the tail's slope each token has the share that it has of the tail's probability
            student_CV.sub_(rest_C1).exp_().mul_(student[:, -1:])
        else:
            student_CV.zero_()
        student_CV.scatter_(1, ids_CK, student[:, : ids_CK.shape[1]])
        return divergences_C, scales_C

    return compare


def _weighted(compare: Compare, importance: Importance) -> Compare:
    def weighted(part: slice, student_CV: Tensor) -> tuple[Tensor, Tensor]:
        ratios_C = importance.of_logits(part, student_CV)
        divergences_C, scales_C = compare(part, student_CV)
        return divergences_C * ratios_C, scales_C * ratios_C

    return weighted
