"""What a token costs a student whose teacher is itself: numbers by hand, the dense loss, gradients and importance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses.distillation import divergence_of
from stages.losses.head import Head
from stages.losses.linear_divergence import linear_divergence
from stages.losses.self_distillation import (
    Comparison,
    Importance,
    OwnTop,
    clipped_importance,
    linear_self_divergence,
    own_top_divergence,
    sampled_token,
)

BETAS = (0.0, 0.3, 1.0)
LN2 = math.log(2)
# the student's likeliest two of four tokens are 1 and 3: 1/2 and 1/4, the rest 1/4; the teacher gives these 1/8 and
# 3/8, the rest 1/2
STUDENT = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64).log() - 3
TEACHER = torch.tensor([[0.3, 0.125, 0.2, 0.375]], dtype=torch.float64).log() + 2
# scaled up to 1 they are 2/3, 1/3 and 1/4, 3/4
VALUES = [
    (True, 0.0, (LN2 * (-2) + 3 * math.log(1.5) + 4 * LN2) / 8),
    (True, 1.0, (4 * 2 * LN2 + 2 * math.log(2 / 3) - 2 * LN2) / 8),
    (False, 0.0, 0.25 * math.log(3 / 8) + 0.75 * math.log(9 / 4)),
    (False, 1.0, 2 / 3 * math.log(8 / 3) + 1 / 3 * math.log(4 / 9)),
    # m = 11/24, 13/24
    (
        False,
        0.5,
        0.5 * (0.25 * math.log(6 / 11) + 0.75 * math.log(18 / 13))
        + 0.5 * (2 / 3 * math.log(16 / 11) + 1 / 3 * math.log(8 / 13)),
    ),
]


@pytest.mark.parametrize(("tail", "alpha", "expected"), VALUES)
def test_values_over_the_likeliest(tail: bool, alpha: float, expected: float) -> None:
    found = own_top_divergence(STUDENT, TEACHER, OwnTop(2, tail), divergence_of(alpha))
    assert_close(found, torch.tensor([expected], dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_sampled_token() -> None:
    """(log 1/2 - log 1/8) log 1/2 = -2 log^2 2, whose slope is 2 log 2."""
    logprobs = torch.tensor([0.5], dtype=torch.float64).log().requires_grad_()
    loss = sampled_token(logprobs, torch.tensor([0.125], dtype=torch.float64).log())
    assert loss.item() == pytest.approx(-2 * LN2**2, rel=1e-12)
    assert torch.autograd.grad(loss, logprobs)[0].item() == pytest.approx(2 * LN2, rel=1e-12)


def test_on_average_the_sampled_token_has_the_slope_of_the_divergence() -> None:
    """Over all tokens, each as often as the student draws it."""
    logits = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-0.5, 0.2, 0.9], dtype=torch.float64).log_softmax(0)
    logs = logits.log_softmax(0)
    drawn = (logs.exp().detach() * sampled_token(logs, teacher)).sum()
    whole = (logs.exp() * (logs - teacher)).sum()
    expected = torch.autograd.grad(whole, logits, retain_graph=True)
    assert_close(torch.autograd.grad(drawn, logits), expected, atol=1e-12, rtol=0)


def test_importance_is_bounded() -> None:
    """e^0.5, 2 in the place of e^3, and e^-20 in the place of e^-50."""
    found = clipped_importance(torch.tensor([-1.0, 0.0, -60.0]), torch.tensor([-1.5, -3.0, -10.0]), 2.0)
    assert_close(found, torch.tensor([math.exp(0.5), 2.0, math.exp(-20)]))


def made(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Hidden states, weight and bias of two models; 6 positions, hidden size 3, 9 tokens."""
    torch.manual_seed(3)
    return [torch.randn(size, dtype=dtype) for size in ((6, 3), (9, 3), (9,), (6, 3), (9, 3))]


TARGETS = torch.tensor([4, 0, 8, 2, 2, 5])
OLD = torch.tensor([-2.0, -1.0, -4.0, -3.0, -0.1, -6.0], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 0.25], dtype=torch.float64)


@pytest.mark.parametrize("alpha", BETAS)
@pytest.mark.parametrize("top", [None, OwnTop(4, True), OwnTop(4, False), OwnTop(9, True), OwnTop(20, False)])
@pytest.mark.parametrize("clip", [None, 1.5])
def test_gradients_from_hidden_states(alpha: float, top: OwnTop | None, clip: float | None) -> None:
    """Those of the plain expression, whatever the chunks are; all tokens are the dense loss."""
    hidden_NH, weight_VH, bias_V, told_NH, teacher_VH = made()
    leaves = [hidden_NH.requires_grad_(), weight_VH.requires_grad_(), bias_V.requires_grad_()]
    head = Head(weight_VH, bias_V, scale=0.7, softcap=2.0, temperature=1.3)
    teacher, divergence = Head(teacher_VH, temperature=1.3), divergence_of(alpha)
    logits_NV, teacher_NV = head.logits(hidden_NH), teacher.logits(told_NH)
    each_N = (
        divergence.of_logits(logits_NV, teacher_NV)
        if top is None
        else own_top_divergence(logits_NV, teacher_NV, top, divergence)
    )
    if clip is not None:
        logprobs_N = logits_NV.log_softmax(1).gather(1, TARGETS[:, None])[:, 0]
        each_N = each_N * clipped_importance(logprobs_N, OLD, clip)
    expected = (each_N * WEIGHTS).sum()
    slopes = torch.autograd.grad(expected, leaves)
    importance = None if clip is None else Importance(TARGETS, OLD, clip)
    for chunk in (1, 4, 6):
        found, found_N = linear_self_divergence(
            hidden_NH,
            head,
            told_NH,
            teacher,
            Comparison(divergence, top, importance),
            weights_N=WEIGHTS,
            chunk_tokens=chunk,
        )
        assert_close(found, expected, atol=1e-12, rtol=1e-12)
        assert_close(found_N, each_N.detach(), atol=1e-12, rtol=1e-12)
        assert_close(torch.autograd.grad(found, leaves), slopes, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("alpha", BETAS)
def test_all_tokens_are_the_dense_loss(alpha: float) -> None:
    hidden_NH, weight_VH, bias_V, told_NH, teacher_VH = made(torch.float32)
    head, teacher, divergence = Head(weight_VH, bias_V), Head(teacher_VH), divergence_of(alpha)
    _, dense_N = linear_divergence(hidden_NH, head, told_NH, teacher, divergence)
    for top in (None, OwnTop(9, True), OwnTop(9, False)):
        _, found_N = linear_self_divergence(hidden_NH, head, told_NH, teacher, Comparison(divergence, top))
        assert_close(found_N, dense_N, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tail", [True, False])
def test_a_student_that_is_sure_leaves_finite_numbers(tail: bool) -> None:
    """The likeliest token has all of the probability that float32 can tell."""
    hidden_NH = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    head, teacher = Head(torch.tensor([[1.0], [0.0], [-1.0], [0.3]])), Head(torch.tensor([[0.1], [0.2], [-0.1], [0.0]]))
    for alpha in BETAS:
        comparison = Comparison(divergence_of(alpha), OwnTop(2, tail))
        loss, each_N = linear_self_divergence(hidden_NH, head, torch.ones(2, 1), teacher, comparison)
        (slope,) = torch.autograd.grad(loss, hidden_NH)
        assert each_N.isfinite().all() and slope.isfinite().all()
