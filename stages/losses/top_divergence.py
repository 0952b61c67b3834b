"""The divergence of a student from what is known of a teacher: its likeliest tokens, and what the others sum to.

N positions, C positions of a chunk, K tokens that are known, V vocabulary. Every distribution is taken as one over
K + 1 outcomes, the last of which is "another token" (none where K is V). So a divergence is never larger than that of
the whole distributions, and equal to it with K = V; Anshumann et al., arXiv:2503.16870, on why the rest has to count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from stages.losses.distillation import Divergence
from stages.losses.head import Head, chunk_length
from stages.losses.linear_divergence import compared


@dataclass(frozen=True)
class TopTokens:
    """What is known of a teacher's distributions."""

    ids_NK: Tensor
    """Token ids, no two of a position alike."""
    logs_NK: Tensor
    """Their log-probabilities, in float32 or wider."""

    def rest_N(self, vocabulary: int) -> Tensor:
        """[N] the probability of all other tokens; 0 with K = V, else at least what float32 can tell from 0."""
        if self.ids_NK.shape[1] == vocabulary:
            return self.logs_NK.new_zeros(len(self.logs_NK))
        return (1 - self.logs_NK.exp().sum(1)).clamp(min=torch.finfo(torch.float32).eps)

    def outcomes(self, vocabulary: int) -> Tensor:
        """[N, K + 1] logits of the outcomes, or [N, K] with K = V."""
        if self.ids_NK.shape[1] == vocabulary:
            return self.logs_NK
        return torch.cat([self.logs_NK, self.rest_N(vocabulary).log()[:, None]], 1)


def top_tokens(logits_NV: Tensor, most: int) -> TopTokens:
    """The likeliest tokens, the first of equal ones."""
    logs_NV = log_softmax(logits_NV, -1)
    logs_NK, ids_NK = logs_NV.topk(min(most, logs_NV.shape[1]), dim=1)
    return TopTokens(ids_NK, logs_NK)


def student_outcomes(student_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """[N, K + 1] logits of the same outcomes for a student, or [N, K] with K = V; differentiable."""
    known_NK = student_NV.gather(1, ids_NK)
    if ids_NK.shape[1] == student_NV.shape[1]:
        return known_NK
    rest_N = student_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1)
    return torch.cat([known_NK, rest_N[:, None]], 1)


def top_divergence(student_NV: Tensor, teacher: TopTokens, divergence: Divergence) -> Tensor:
    """[N] from the student's logits. A plain differentiable expression, beside `linear_top_divergence`."""
    outcomes = teacher.outcomes(student_NV.shape[1])
    return divergence.of_logits(student_outcomes(student_NV, teacher.ids_NK), outcomes)


def linear_top_divergence(
    hidden_NH: Tensor,
    head: Head,
    teacher: TopTokens,
    divergence: Divergence,
    *,
    weights_N: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum of weight x divergence over all positions, divergences [N] without a gradient), from hidden states.

    As `linear_divergence`; the teacher has the temperature of the head already. Raises ValueError for shapes that do
    not fit.
    """
    head.check(hidden_NH, teacher.ids_NK)
    outcomes = teacher.outcomes(head.vocabulary).to(head.sum_type)

    def compare(part: slice, student_CV: Tensor) -> tuple[Tensor, Tensor]:
        ids_CK = teacher.ids_NK[part]
        student = student_outcomes(student_CV, ids_CK)
        # both of them are destroyed: the first becomes slopes, the second is a view of what comes again
        rest_C1 = student[:, len(ids_CK[0]) :].clone()
        divergences_C, scales_C = divergence.slope(student, outcomes[part].clone())
        if rest_C1.numel():
            # of another token's slope each has the share that it has of their probability
            student_CV.sub_(rest_C1).exp_().mul_(student[:, -1:])
        student_CV.scatter_(1, ids_CK, student[:, : ids_CK.shape[1]])
        return divergences_C, scales_C

    longest = chunk_tokens or chunk_length(head)
    return compared(hidden_NH, head, compare, weights_N=weights_N, longest=longest)
