"""Divergences between the token distributions of a student and a teacher: one value per position.

N positions, V vocabulary (one vocabulary for both). Logits in, [N] out; gradients reach the student only if
the teacher's tensors need none. For hidden states instead of logits see `linear_divergence`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from stages.losses.divergence_slopes import forward_kl_slope, jsd_slope, reverse_kl_slope


@dataclass(frozen=True)
class Divergence:
    """A divergence in two forms that agree."""

    of_logits: Callable[[Tensor, Tensor], Tensor]
    """(student_logits [N, V], teacher_logits [N, V]) -> [N]; differentiable."""
    slope: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """The same with its gradient, in place; see `divergence_slopes`."""


def forward_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v t_v (log t_v - log s_v), from logits. Returns [N]. Hinton et al.,
    arXiv:1503.02531.
    """
    student_logs, teacher_logs = _logs(student_NV), _logs(teacher_NV)
    return _kl(teacher_logs, student_logs)


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """KL(student || teacher) = sum_v s_v (log s_v - log t_v), from logits. Returns [N]. Gu et al.,
    arXiv:2306.08543.
    """
    student_logs, teacher_logs = _logs(student_NV), _logs(teacher_NV)
    return _kl(student_logs, teacher_logs)


def jsd(student_NV: Tensor, teacher_NV: Tensor, *, beta: float = 0.5) -> Tensor:
    """Generalized Jensen-Shannon: beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s. Returns
    [N].

    Agarwal et al., arXiv:2306.13649, eq. 1. At beta 0 and 1 it is zero everywhere; see `divergence_of`.
    """
    _check(beta)
    student_logs, teacher_logs = _logs(student_NV), _logs(teacher_NV)
    weights = student_logs.new_tensor([1.0 - beta, beta]).log()
    mixture_logs = torch.logaddexp(student_logs + weights[0], teacher_logs + weights[1])
    return beta * _kl(teacher_logs, mixture_logs) + (1 - beta) * _kl(student_logs, mixture_logs)


def divergence_of(beta: float) -> Divergence:
    """TRL's reading of `beta`: 0 is the forward KL, 1 the reverse KL, between them the generalized JSD.

    Raises ValueError for others.
    """
    if beta in (0.0, 1.0):
        return Divergence(forward_kl, forward_kl_slope) if beta == 0.0 else Divergence(reverse_kl, reverse_kl_slope)
    _check(beta)
    return Divergence(partial(jsd, beta=beta), partial(jsd_slope, beta=beta))


def _check(beta: float) -> None:
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta of the generalized JSD must lie between 0 and 1, found {beta}")


def _logs(logits_NV: Tensor) -> Tensor:
    """log_softmax with the lowest finite number for -inf: a token impossible in both adds 0, not NaN."""
    return log_softmax(logits_NV, -1).clamp(min=torch.finfo(logits_NV.dtype).min)


def _kl(logs_NV: Tensor, other_logs_NV: Tensor) -> Tensor:
    """sum_v p_v (log p_v - log q_v). Returns [N]."""
    return (logs_NV.exp() * (logs_NV - other_logs_NV)).sum(-1)
