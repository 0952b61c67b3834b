"""Losses formed chunk by chunk against the same losses of log_softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses import head as head_module
from stages.losses.head import Head
from stages.losses.head_gradient import HeadGradient
from stages.losses.token_loss import linear_token_loss
from tests.losses.heads import H, N, V, Work, entropy, frozen, inputs, kinds, log_softmax, make_head, trained

WEIGHTS = torch.linspace(-1, 2, N, dtype=torch.float64)


def weighted_nll(logprobs: Tensor, part: slice) -> Tensor:
    return -WEIGHTS[part].to(logprobs.dtype) * logprobs


def curved(logprobs: Tensor, part: slice) -> Tensor:
    """Its slope depends on the log-probability itself."""
    return WEIGHTS[part] * logprobs.exp() + 0.1 * logprobs.square()


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("token_loss", [weighted_nll, curved])
def test_loss_and_gradients(kind: dict[str, Any], chunk: int, token_loss: Callable[..., Tensor]) -> None:
    hidden, weight, bias, targets = inputs()
    head = make_head(weight, bias, kind)
    logs = log_softmax(hidden, head)
    logprobs = logs.gather(1, targets[:, None])[:, 0]
    expected = token_loss(logprobs, slice(None)).sum()
    wanted = torch.autograd.grad(0.3 * expected, trained(hidden, head))
    loss, scores = linear_token_loss(hidden, head, targets, token_loss, chunk_tokens=chunk)
    gradients = torch.autograd.grad(0.3 * loss, trained(hidden, head))
    assert_close(loss, expected, atol=1e-12, rtol=0)
    assert_close(scores.logprobs_N, logprobs.detach(), atol=1e-12, rtol=0)
    assert_close(scores.entropy_N, entropy(logs).detach(), atol=1e-12, rtol=0)
    assert torch.equal(scores.is_likeliest_N, logs.argmax(-1) == targets)
    assert not any(score.requires_grad for score in scores if score is not None)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert_close(gradient, other, atol=1e-12, rtol=0)


def test_cross_entropy_of_torch_in_float32() -> None:
    hidden, weight, _, targets = inputs(40, 8, 30, torch.float32)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    wanted = torch.autograd.grad(expected, [hidden, weight])
    loss, _ = linear_token_loss(hidden, Head(weight), targets, lambda logprobs, _: -logprobs, chunk_tokens=7)
    gradients = torch.autograd.grad(loss, [hidden, weight])
    assert_close(loss, expected, rtol=1e-6, atol=0)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert_close(gradient, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", kinds())
def test_only_the_gradients_that_are_asked_for(kind: dict[str, Any]) -> None:
    hidden, weight, bias, targets = inputs()
    head = make_head(weight, bias, kind)
    for states, used in ((hidden, frozen(head)), (hidden.detach(), head)):
        loss, _ = linear_token_loss(states, used, targets, weighted_nll, chunk_tokens=3)
        logprobs = log_softmax(states, used).gather(1, targets[:, None])[:, 0]
        wanted = torch.autograd.grad(weighted_nll(logprobs, slice(None)).sum(), trained(states, used))
        for gradient, other in zip(torch.autograd.grad(loss, trained(states, used)), wanted, strict=True):
            assert_close(gradient, other, atol=1e-12, rtol=0)
    with torch.no_grad():
        value, _ = linear_token_loss(hidden, head, targets, weighted_nll)
    assert not value.requires_grad
    assert_close(value, loss.detach(), atol=1e-12, rtol=0)


def test_a_weight_that_is_the_embedding_too() -> None:
    _, weight, _, targets = inputs()
    tokens = torch.tensor([0, 3, 3, 8, 1, 0, 5])
    logprobs = log_softmax(torch.tanh(weight[tokens]), Head(weight)).gather(1, targets[:, None])[:, 0]
    (wanted,) = torch.autograd.grad(weighted_nll(logprobs, slice(None)).sum(), weight)
    loss, _ = linear_token_loss(torch.tanh(weight[tokens]), Head(weight), targets, weighted_nll, chunk_tokens=2)
    assert_close(torch.autograd.grad(loss, weight)[0], wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", kinds())
def test_no_positions(kind: dict[str, Any]) -> None:
    hidden, weight, bias, targets = inputs(positions=0)
    head = make_head(weight, bias, kind)
    loss, _ = linear_token_loss(hidden, head, targets, weighted_nll)
    gradients = torch.autograd.grad(loss, trained(hidden, head))
    assert loss.item() == 0
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in trained(hidden, head)]
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", kinds())
def test_number_of_products(kind: dict[str, Any]) -> None:
    hidden, weight, bias, targets = inputs()
    head = make_head(weight, bias, kind)

    def products(states: Tensor, used: Head, **settings: Any) -> float:
        with Work() as work:
            loss, _ = linear_token_loss(states, used, targets, curved, chunk_tokens=3, **settings)
            if loss.requires_grad:
                loss.backward()
        return work.products(N, V, H)

    assert products(hidden, head) == 3
    assert products(hidden, frozen(head)) == 2
    assert products(hidden.detach(), frozen(head), with_entropy=False) == 1
    with torch.no_grad():
        assert products(hidden, head, with_entropy=False) == 1


def test_memory_does_not_grow_with_positions_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 1)
    for positions in (16, 64):
        hidden, weight, bias, targets = inputs(positions=positions, hidden=8, vocabulary=100)
        with Work() as work:
            loss, _ = linear_token_loss(hidden, Head(weight, bias), targets, lambda logprobs, _: -logprobs)
            loss.backward()
        assert work.largest == weight.numel()


def test_the_gradient_becomes_the_parameters_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, targets = inputs()
    places = []
    result = HeadGradient.result

    def noted(self: HeadGradient, scale: Tensor | None = None) -> Any:
        grads = result(self, scale)
        places.extend(grad.data_ptr() for grad in grads if grad is not None)
        return grads

    monkeypatch.setattr(HeadGradient, "result", noted)
    (linear_token_loss(hidden, Head(weight), targets, weighted_nll)[0] / 3).backward()
    assert weight.grad is not None
    assert [weight.grad.data_ptr()] == places


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, _, targets = inputs()
    loss, _ = linear_token_loss(hidden, Head(weight), targets, weighted_nll)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="forms its gradient once"):
        loss.backward()


def test_losses_that_are_not_one_a_token_are_refused() -> None:
    hidden, weight, _, targets = inputs()
    with pytest.raises(ValueError, match=r"gave losses \(\) for 7 log-probabilities"):
        linear_token_loss(hidden, Head(weight), targets, lambda logprobs, _: -logprobs.sum())
