"""A divergence and a loss of sampled tokens on one chunk of logits, against both of whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses.distillation import divergence_of
from stages.losses.divergence_beside import linear_divergence_beside
from stages.losses.head import Head
from tests.losses.heads import H, N, V, Work, inputs, kinds, log_softmax, make_head, trained
from tests.losses.test_linear_divergence import teacher_of

CREDITS = torch.linspace(-2, 1, N, dtype=torch.float64)


def token_loss(logprobs_C: Tensor, part: slice) -> Tensor:
    return CREDITS[part] * logprobs_C + 0.1 * logprobs_C.square()


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_values_and_gradients(kind: dict[str, Any], chunk: int, beta: float) -> None:
    hidden, weight, bias, targets = inputs()
    head, divergence, (teacher_hidden, teacher) = make_head(weight, bias, kind), divergence_of(beta), teacher_of()
    values = divergence.of_logits(head.logits(hidden), teacher.logits(teacher_hidden))
    logprobs = log_softmax(hidden, head).gather(1, targets[:, None])[:, 0]
    expected = values.sum() + token_loss(logprobs, slice(None)).sum()
    wanted = torch.autograd.grad(expected * 0.3, trained(hidden, head))
    loss, found, divergences = linear_divergence_beside(
        hidden, head, targets, token_loss, (teacher_hidden, teacher), divergence, chunk_tokens=chunk
    )
    assert_close(loss, expected, atol=1e-12, rtol=0)
    assert_close(found, logprobs.detach(), atol=1e-12, rtol=0)
    assert_close(divergences, values.detach(), atol=1e-12, rtol=0)
    assert not found.requires_grad and not divergences.requires_grad
    for gradient, other in zip(torch.autograd.grad(loss * 0.3, trained(hidden, head)), wanted, strict=True):
        assert_close(gradient, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("vocabulary", [V - 3, V + 4])
def test_vocabularies_filled_up_to_other_sizes(vocabulary: int) -> None:
    """The divergence is over what both have, the log-probability over all that the student can say."""
    hidden, weight, bias, targets = inputs()
    head, (teacher_hidden, teacher) = Head(weight, bias), teacher_of(vocabulary=vocabulary)
    common, divergence = min(V, vocabulary), divergence_of(1.0)
    targets = targets.clamp(max=common - 1)
    logits = head.logits(hidden)[:, :common], teacher.logits(teacher_hidden)[:, :common]
    values = divergence.of_logits(*logits)
    logprobs = log_softmax(hidden, head).gather(1, targets[:, None])[:, 0]
    wanted = torch.autograd.grad(values.sum() + token_loss(logprobs, slice(None)).sum(), trained(hidden, head))
    loss, found, divergences = linear_divergence_beside(
        hidden, head, targets, token_loss, (teacher_hidden, teacher), divergence, chunk_tokens=3
    )
    assert_close(found, logprobs.detach(), atol=1e-12, rtol=0)
    assert_close(divergences, values.detach(), atol=1e-12, rtol=0)
    for gradient, other in zip(torch.autograd.grad(loss, trained(hidden, head)), wanted, strict=True):
        assert_close(gradient, other, atol=1e-12, rtol=0)


def test_no_product_more_than_of_the_divergence_alone() -> None:
    """The student's logits, and the gradients of hidden states and weight; the teacher's head is 3 wide, not 4."""
    hidden, weight, bias, targets = inputs()
    with Work() as work:
        loss, _, _ = linear_divergence_beside(
            hidden, Head(weight, bias), targets, token_loss, teacher_of(), divergence_of(1.0)
        )
        loss.backward()
    assert work.products(N, V, H) == 3 + 3 / 4


def test_no_positions() -> None:
    hidden, weight, bias, targets = inputs(positions=0)
    loss, found, divergences = linear_divergence_beside(
        hidden, Head(weight, bias), targets, token_loss, teacher_of(positions=0), divergence_of(1.0)
    )
    loss.backward()
    assert loss.item() == 0 and found.shape == divergences.shape == (0,)
    assert weight.grad is not None and not weight.grad.any()
