"""Divergences from a teacher's likeliest tokens: numbers by hand, the dense loss, and gradients."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from stages.losses.distillation import divergence_of
from stages.losses.head import Head
from stages.losses.linear_divergence import linear_divergence
from stages.losses.top_divergence import TopTokens, linear_top_divergence, top_divergence, top_tokens

BETAS = (0.0, 0.3, 1.0)
# of four tokens the teacher's likeliest two are 2 and 0: 1/2 and 1/4, the rest 1/4; the student gives these 1/4, 1/4
# and the rest 1/2, in which no matter how much each of the two has
TEACHER = TopTokens(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]], dtype=torch.float64).log())
STUDENT = torch.tensor([[0.25, 0.4, 0.25, 0.1]], dtype=torch.float64).log() + 5
# the mixture of both, half and half: 3/8, 1/4, 3/8
VALUES = [
    (0.0, 0.5 * math.log(2) + 0.25 * math.log(0.5)),
    (1.0, 0.25 * math.log(0.5) + 0.5 * math.log(2)),
    (
        0.5,
        0.5 * (0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)) + 0.5 * (0.25 * math.log(2 / 3) + 0.5 * math.log(4 / 3)),
    ),
]


@pytest.mark.parametrize(("beta", "expected"), VALUES)
def test_values(beta: float, expected: float) -> None:
    found = top_divergence(STUDENT, TEACHER, divergence_of(beta))
    assert_close(found, torch.tensor([expected], dtype=torch.float64), atol=1e-12, rtol=0)


def made(positions: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(3)
    sizes = [(positions, hidden), (vocabulary, hidden), (vocabulary,), (positions, vocabulary)]
    return tuple(torch.randn(size, dtype=dtype) for size in sizes)


@pytest.mark.parametrize("beta", BETAS)
def test_all_tokens_are_the_dense_loss(beta: float) -> None:
    hidden_NH, weight_VH, bias_V, _ = made(7, 5, 11, torch.float32)
    teacher_NH = torch.randn(7, 5)
    head, other = Head(weight_VH.requires_grad_(), bias_V), Head(torch.randn(11, 5))
    hidden_NH.requires_grad_()
    dense, each_N = linear_divergence(hidden_NH, head, teacher_NH, other, divergence_of(beta))
    expected = torch.autograd.grad(dense, [hidden_NH, weight_VH])
    teacher = top_tokens(other.logits(teacher_NH), 11)
    found, found_N = linear_top_divergence(hidden_NH, head, teacher, divergence_of(beta), chunk_tokens=3)
    assert_close(found_N, each_N, atol=1e-6, rtol=1e-6)
    assert_close(torch.autograd.grad(found, [hidden_NH, weight_VH]), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_from_hidden_states(beta: float, softcap: float | None) -> None:
    """Those of the plain expression, which finite differences check; whatever the chunks are."""
    hidden_NH, weight_VH, bias_V, teacher_NV = made(5, 3, 9, torch.float64)
    teacher, weights_N = top_tokens(teacher_NV, 4), torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    leaves = [hidden_NH.requires_grad_(), weight_VH.requires_grad_(), bias_V.requires_grad_()]

    def plain(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor) -> torch.Tensor:
        logits_NV = Head(weight_VH, bias_V, scale=0.7, softcap=softcap, temperature=1.3).logits(hidden_NH)
        return (top_divergence(logits_NV, teacher, divergence_of(beta)) * weights_N).sum()

    assert torch.autograd.gradcheck(plain, leaves)
    expected = torch.autograd.grad(plain(*leaves), leaves)
    head = Head(weight_VH, bias_V, scale=0.7, softcap=softcap, temperature=1.3)
    for chunk in (1, 2, 5):
        found, _ = linear_top_divergence(
            hidden_NH, head, teacher, divergence_of(beta), weights_N=weights_N, chunk_tokens=chunk
        )
        assert_close(found, plain(*leaves), atol=1e-12, rtol=1e-12)
        assert_close(torch.autograd.grad(found, leaves), expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("beta", BETAS)
def test_more_tokens_tell_more(beta: float) -> None:
    """Outcomes that are joined can only bring distributions nearer; the order of tokens does not matter."""
    *_, student_NV = made(6, 2, 12, torch.float64)
    teacher_NV, divergence = torch.randn(6, 12, dtype=torch.float64), divergence_of(beta)
    values = [top_divergence(student_NV, top_tokens(teacher_NV, most), divergence) for most in (1, 3, 8, 12)]
    assert all((less <= more + 1e-12).all() for less, more in pairwise(values))
    assert_close(values[-1], divergence.of_logits(student_NV, teacher_NV), atol=1e-12, rtol=0)
    few = top_tokens(teacher_NV, 3)
    turned = TopTokens(few.ids_NK.flip(1), few.logs_NK.flip(1))
    assert_close(top_divergence(student_NV, turned, divergence), values[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_a_teacher_that_is_sure_leaves_finite_numbers(beta: float) -> None:
    """Its likeliest token has all of the probability that float32 can tell."""
    hidden_NH, weight_VH, bias_V, _ = made(2, 3, 9, torch.float32)
    sure = TopTokens(torch.tensor([[4], [0]]), torch.zeros(2, 1))
    hidden_NH.requires_grad_()
    loss, each_N = linear_top_divergence(hidden_NH, Head(weight_VH, bias_V), sure, divergence_of(beta))
    loss.backward()
    assert each_N.isfinite().all() and hidden_NH.grad.isfinite().all()
