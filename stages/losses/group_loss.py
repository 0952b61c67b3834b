"""Divergence of a student from a teacher with another tokenizer, over groups of tokens that end at the same byte.

N student's and M teacher's tokens, G groups, V and U vocabularies, K parts of a loss. A group has at least one token of
each. What a model says of it is one distribution, `merged` out of those of its tokens. The two are compared by rank
(Boizard et al., arXiv:2402.12030, eq. 5) or, where the tokens of both vocabularies are known to be the same, one by one
(GOLD: Patino et al., "Unlocking On-Policy Distillation for Any Model Family", 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, pad

from stages.losses.host_numbers import beside, on_device


@dataclass(frozen=True)
class GroupTokens:
    """The tokens of the groups as one tokenizer has them, group after group."""

    targets_N: Tensor
    """Ids of the tokens that are there."""
    sizes: Sequence[int]
    """Tokens of each group, at least 1."""


def observed(sizes_G: Tensor) -> Tensor:
    """[G] The first token: its distribution times the probability of the tokens that followed (TRL's "observed")."""
    return sizes_G.cumsum(0) - sizes_G


def bayesian(sizes_G: Tensor) -> Tensor:
    """[G] The last token: its distribution times the probability of the tokens that came before it in the group."""
    return sizes_G.cumsum(0) - 1


MERGES: dict[str, Callable[[Tensor], Tensor]] = {"observed": observed, "bayesian": bayesian}
"""Name -> (tokens of each group [G]) -> index [G] of the token whose distribution stays whole."""


def merged(logits_NV: Tensor, tokens: GroupTokens, whole: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(probabilities [G, V], log-probability [G] of the tokens that are there), differentiable.

    Of a group of several tokens the probabilities sum to less than 1: to that of the tokens beside the whole one.
    """
    sizes_G = on_device(tokens.sizes, logits_NV.device, torch.long)
    whole_G = whole(sizes_G)
    logs_NV = log_softmax(logits_NV, -1)
    own_N = logs_NV.gather(1, tokens.targets_N[:, None])[:, 0]
    group_N = torch.arange(len(sizes_G), device=logits_NV.device).repeat_interleave(sizes_G, output_size=len(own_N))
    beside_N = own_N.index_fill(0, whole_G, 0.0)
    beside_G = own_N.new_zeros(len(sizes_G)).index_add(0, group_N, beside_N)
    return (logs_NV[whole_G] + beside_G[:, None]).exp(), beside_G + own_N[whole_G]


def sorted_distance(student_GV: Tensor, teacher_GU: Tensor) -> Tensor:
    """[G] sum_k |s_(k) - t_(k)|, both sorted from the largest down, the shorter one filled up with zeros. Boizard et
    al., arXiv:2402.12030, eq. 5."""
    student, teacher = (one.sort(-1, descending=True).values for one in (student_GV, teacher_GU))
    width = max(student.shape[1], teacher.shape[1])
    return (_filled(student, width) - _filled(teacher, width)).abs().sum(-1)


def measure_divergence(student_GV: Tensor, teacher_GV: Tensor, beta: float) -> Tensor:
    """[G] The divergence of `distillation.divergence_of`, of measures that need not sum to 1.

    beta 0: sum t log t/s - t + s; 1: sum s log s/t - s + t; between, beta D(t || m) + (1 - beta) D(s || m) with
    m = beta t + (1 - beta) s, whose last two terms cancel. Without them, as in TRL, the extremes can fall below zero,
    and are least where s is not t: at 1 where s = t / e, at 0 where s is as large as it can be.
    """
    tiny = torch.finfo(student_GV.dtype).tiny
    student_GV, teacher_GV = student_GV.clamp(min=tiny), teacher_GV.clamp(min=tiny)
    if beta == 0.0:
        return _relative_entropy(teacher_GV, student_GV)
    if beta == 1.0:
        return _relative_entropy(student_GV, teacher_GV)
    mixture_GV = torch.lerp(student_GV, teacher_GV, beta)
    of_teacher, of_student = _relative_entropy(teacher_GV, mixture_GV), _relative_entropy(student_GV, mixture_GV)
    return beta * of_teacher + (1 - beta) * of_student


def _relative_entropy(first_GV: Tensor, second_GV: Tensor) -> Tensor:
    return (first_GV * (first_GV.log() - second_GV.log()) - first_GV + second_GV).sum(-1)


def _filled(values_GV: Tensor, width: int) -> Tensor:
    return pad(values_GV, (0, width - values_GV.shape[1]))


@dataclass(frozen=True)
class Matching:
    """Which tokens of two vocabularies are the same, pair by pair, and which are left over; ids, none of them twice."""

    student_M: Tensor
    teacher_M: Tensor
    student_rest: Tensor
    teacher_rest: Tensor

    @classmethod
    def of(cls, student_M: Tensor, teacher_M: Tensor, vocabularies: tuple[int, int]) -> Matching:
        """Those of student and teacher, whose heads have so many tokens."""
        sizes = zip(vocabularies, (student_M, teacher_M), strict=True)
        return cls(student_M, teacher_M, *(_others(vocabulary, matched_M) for vocabulary, matched_M in sizes))


def _others(vocabulary: int, matched_M: Tensor) -> Tensor:
    free_V = torch.ones(vocabulary, dtype=torch.bool, device=matched_M.device)
    free_V.index_fill_(0, matched_M, False)
    return free_V.nonzero()[:, 0]


def hybrid_parts(student_GV: Tensor, teacher_GU: Tensor, matching: Matching, beta: float) -> Tensor:
    """[G, 2] The divergence over the tokens that are the same, and the sorted distance of all others."""
    same_G = measure_divergence(student_GV[:, matching.student_M], teacher_GU[:, matching.teacher_M], beta)
    others = student_GV[:, matching.student_rest], teacher_GU[:, matching.teacher_rest]
    return torch.stack([same_G, sorted_distance(*others)], 1)


@dataclass(frozen=True)
class GroupLoss:
    """A loss of a group: its divergence, which is weights times parts, and a weight times its tokens' cross-entropy."""

    whole: Callable[[Tensor], Tensor]
    """One of MERGES."""
    parts: Callable[[Tensor, Tensor], Tensor]
    """(student's probabilities [G, V], teacher's [G, U]) -> [G, K]; differentiable."""
    weights: Sequence[float]
    """Of the K parts."""
    crossentropy_weight: float = 0.0
    """Of the groups' tokens, at temperature 1."""


def group_losses(
    student: tuple[Tensor, GroupTokens],
    teacher: tuple[Tensor, GroupTokens],
    loss: GroupLoss,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(divergence and cross-entropy [G, 2], parts [G, K]) from (logits [N, V], tokens) of student and of teacher.

    Differentiable. `temperature`: what the student's logits were divided by.
    """
    probs_GV, logs_G = merged(*student, loss.whole)
    parts_GK = loss.parts(probs_GV, merged(*teacher, loss.whole)[0])
    if temperature != 1.0 and loss.crossentropy_weight:
        logs_G = merged(student[0] * temperature, student[1], loss.whole)[1]
    divergence_G = parts_GK @ beside(loss.weights, parts_GK)
    return torch.stack([divergence_G, -logs_G], 1), parts_GK
