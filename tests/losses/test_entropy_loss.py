"""Losses with a weighted entropy, formed chunk by chunk, against the same of log_softmax."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses.entropy_loss import linear_token_entropy_loss
from stages.losses.head import Head
from stages.losses.token_loss import linear_token_loss
from tests.losses.heads import H, N, V, Work, entropy, frozen, inputs, kinds, log_softmax, make_head, trained
from tests.losses.test_token_loss import curved, weighted_nll

WEIGHTS = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.3, -0.2, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("token_loss", [None, curved])
def test_loss_and_gradients(kind: dict[str, Any], chunk: int, token_loss: Any) -> None:
    hidden, weight, bias, targets = inputs()
    head = make_head(weight, bias, kind)
    logs = log_softmax(hidden, head)
    logprobs = logs.gather(1, targets[:, None])[:, 0]
    expected = (WEIGHTS * entropy(logs)).sum()
    if token_loss is not None:
        expected = expected + token_loss(logprobs, slice(None)).sum()
    wanted = torch.autograd.grad(0.3 * expected, trained(hidden, head))
    loss, scores = linear_token_entropy_loss(hidden, head, targets, token_loss, WEIGHTS, chunk_tokens=chunk)
    gradients = torch.autograd.grad(0.3 * loss, trained(hidden, head))
    assert_close(loss, expected, atol=1e-12, rtol=0)
    assert_close(scores.logprobs_N, logprobs.detach(), atol=1e-12, rtol=0)
    assert_close(scores.entropy_N, entropy(logs).detach(), atol=1e-12, rtol=0)
    assert torch.equal(scores.is_likeliest_N, logs.argmax(-1) == targets)
    assert not any(score.requires_grad for score in scores if score is not None)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert_close(gradient, other, atol=1e-12, rtol=0)


def test_slopes_by_hand() -> None:
    # logits log 2, 0 and 0: p = 1/2, 1/4, 1/4, entropy 1.5 log 2; dE/dz_v = -p_v (log p_v + E)
    hidden = torch.tensor([[math.log(2)]], dtype=torch.float64)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    head = Head(torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64), bias)
    loss, scores = linear_token_entropy_loss(hidden, head, torch.tensor([0]), None, torch.ones(1, dtype=torch.float64))
    loss.backward()
    log2 = math.log(2)
    assert scores.entropy_N is not None and scores.entropy_N.item() == pytest.approx(1.5 * log2, abs=1e-15)
    assert_close(bias.grad, torch.tensor([-0.25, 0.125, 0.125], dtype=torch.float64) * log2, atol=1e-15, rtol=0)


def test_positions_do_not_see_each_other() -> None:
    hidden, weight, bias, targets = inputs()
    head = make_head(weight, bias, next(iter(kinds())))
    whole, _ = linear_token_entropy_loss(hidden, head, targets, None, WEIGHTS)
    apart = [
        linear_token_entropy_loss(hidden[part], head, targets[part], None, WEIGHTS[part])[0]
        for part in (slice(0, 2), slice(2, 3), slice(3, N))
    ]
    assert_close(torch.stack(apart).sum(), whole, atol=1e-12, rtol=0)


def test_without_weight_it_is_the_token_loss() -> None:
    hidden, weight, _, targets = inputs(40, 8, 30, torch.float32)
    plain, _ = linear_token_loss(hidden, Head(weight), targets, lambda logprobs, _: -logprobs)
    wanted = torch.autograd.grad(plain, [hidden, weight])
    loss, _ = linear_token_entropy_loss(hidden, Head(weight), targets, lambda logprobs, _: -logprobs, torch.zeros(40))
    assert_close(loss, plain, rtol=1e-6, atol=0)
    for gradient, other in zip(torch.autograd.grad(loss, [hidden, weight]), wanted, strict=True):
        assert_close(gradient, other, rtol=1e-5, atol=1e-6)


def test_certain_and_uniform_distributions() -> None:
    """Their entropies are 0 and log V, and both have a gradient of zero."""
    weight = torch.zeros(V, H, dtype=torch.float64)
    weight[3, 0] = 1.0
    hidden = torch.zeros(2, H, dtype=torch.float64)
    hidden[1, 0] = 2000.0
    hidden.requires_grad_()
    loss, scores = linear_token_entropy_loss(
        hidden, Head(weight), torch.tensor([3, 3]), None, torch.ones(2, dtype=torch.float64)
    )
    assert scores.entropy_N is not None
    assert_close(scores.entropy_N, torch.tensor([math.log(V), 0.0], dtype=torch.float64), atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", kinds())
def test_number_of_products(kind: dict[str, Any]) -> None:
    hidden, weight, bias, targets = inputs()
    head = make_head(weight, bias, kind)

    def products(states: Tensor, used: Head) -> float:
        with Work() as work:
            loss, _ = linear_token_entropy_loss(states, used, targets, weighted_nll, WEIGHTS, chunk_tokens=3)
            if loss.requires_grad:
                loss.backward()
        return work.products(N, V, H)

    assert products(hidden, head) == 3
    assert products(hidden, frozen(head)) == 2
    assert products(hidden.detach(), frozen(head)) == 1


def test_never_more_than_a_chunk() -> None:
    hidden, weight, bias, targets = inputs(positions=60, hidden=3, vocabulary=20)
    weights = torch.ones(60, dtype=torch.float64)
    with Work() as work:
        linear_token_entropy_loss(hidden, Head(weight, bias), targets, curved_of_any, weights, chunk_tokens=10)
    assert work.largest == 10 * 20


def curved_of_any(logprobs: Tensor, part: slice) -> Tensor:
    return logprobs.square()


@pytest.mark.parametrize("kind", kinds())
def test_no_positions(kind: dict[str, Any]) -> None:
    hidden, weight, bias, targets = inputs(positions=0)
    head = make_head(weight, bias, kind)
    loss, _ = linear_token_entropy_loss(hidden, head, targets, weighted_nll, WEIGHTS[:0])
    gradients = torch.autograd.grad(loss, trained(hidden, head))
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients)


def test_shapes_that_do_not_fit() -> None:
    hidden, weight, _, targets = inputs()
    with pytest.raises(ValueError, match="do not fit"):
        linear_token_entropy_loss(hidden, Head(weight), targets, None, WEIGHTS[:3])
