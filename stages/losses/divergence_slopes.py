"""Divergences together with their gradient, written over the student's logits.

C positions, V vocabulary; s and t student's and teacher's logits, p and q their softmaxes, E_p[x] = sum_v p_v x_v.
Every function takes (student_CV, teacher_CV), both of which it destroys, and returns (divergences [C], scales [C]):
then student_CV times its row's scale is d divergence / d s. Logits must be finite. What follows from the definitions
in `distillation`, by d p_v / d s_u = p_v ([u = v] - p_u):

    forward KL      E_q[log q - log p]                                d/ds = p - q
    reverse KL      E_p[x] + log Z_t - log Z_s,  x = s - t            d/ds = p (x - E_p[x])
    JSD(beta)       beta E_q[log q/m] + (1 - beta) E_p[r],            d/ds = (1 - beta) p (r - E_p[r])
                    m = beta q + (1 - beta) p,  r = log p/m

For the JSD: D = beta sum q log q + (1 - beta) sum p log p - sum m log m, so d D / d p_v is (1 - beta) (log p_v - log
m_v), the two constants cancelling.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward_kl_slope(student_CV: Tensor, teacher_CV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) = E_q[t - s] + log Z_s - log Z_t."""
    _shift(student_CV)
    weights_CV = _shift(teacher_CV).exp()
    weight_sums_C = weights_CV.sum(1)
    mean_C = teacher_CV.sub_(student_CV).mul_(weights_CV).sum(1) / weight_sums_C
    sums_C = student_CV.exp_().sum(1)
    ratio_C = sums_C / weight_sums_C
    student_CV.addcmul_(weights_CV, ratio_C[:, None], value=-1)
    return mean_C + ratio_C.log(), 1 / sums_C


def reverse_kl_slope(student_CV: Tensor, teacher_CV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher) = E_p[s - t] + log Z_t - log Z_s."""
    _shift(student_CV)
    weight_sums_C = _shift(teacher_CV).exp().sum(1)
    torch.sub(student_CV, teacher_CV, out=teacher_CV)
    sums_C = student_CV.exp_().sum(1)
    products_CV = teacher_CV.mul_(student_CV)
    mean_C = products_CV.sum(1) / sums_C
    torch.addcmul(products_CV, student_CV, -mean_C[:, None], out=student_CV)
    return mean_C + (weight_sums_C / sums_C).log(), 1 / sums_C


def jsd_slope(student_CV: Tensor, teacher_CV: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Generalized Jensen-Shannon divergence; see `distillation.jsd`."""
    p_CV, q_CV = _normalize(student_CV), _normalize(teacher_CV)
    mixture_CV = _above_zero(torch.lerp(p_CV, q_CV, beta))
    teacher_C = _above_zero(q_CV / mixture_CV).log_().mul_(q_CV).sum(1)
    logs_CV = _above_zero(torch.div(p_CV, mixture_CV, out=q_CV)).log_()
    products_CV = torch.mul(p_CV, logs_CV, out=mixture_CV)
    student_C = products_CV.sum(1)
    torch.addcmul(products_CV, p_CV, -student_C[:, None], out=student_CV)
    return beta * teacher_C + (1 - beta) * student_C, torch.full_like(student_C, 1 - beta)


def _shift(logits_CV: Tensor) -> Tensor:
    return logits_CV.sub_(logits_CV.amax(1, keepdim=True))


def _normalize(logits_CV: Tensor) -> Tensor:
    weights_CV = _shift(logits_CV).exp_()
    return weights_CV.mul_(1 / weights_CV.sum(1, keepdim=True))


def _above_zero(values_CV: Tensor) -> Tensor:
    """0 log 0 is 0, which the lowest positive number gives and zero does not."""
    return values_CV.clamp_(min=torch.finfo(values_CV.dtype).tiny)
