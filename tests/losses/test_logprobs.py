"""The chunked head against log_softmax, the products that it takes, and the memory that it never takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from stages.losses import head as head_module
from stages.losses import logprobs as logprobs_module
from stages.losses.head import Head
from stages.losses.logprobs import linear_logprobs
from tests.losses.heads import H, N, V, Work, entropy, frozen, inputs, kinds, log_softmax, make_head, trained

UPSTREAM = torch.linspace(-1, 2, N, dtype=torch.float64)


def test_a_number() -> None:
    # logits 0 and log 3: probabilities 1/4 and 3/4, entropy log 4 - 3/4 log 3
    hidden, weight = torch.ones(1, 1).double(), torch.tensor([[1.0], [3.0]]).double().log()
    logprobs, entropies, *_ = linear_logprobs(hidden, Head(weight), torch.tensor([1]))
    assert_close(logprobs.exp().item(), 0.75, atol=1e-12, rtol=0)
    assert_close(entropies.item(), 0.562335145, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_values_and_gradients_equal_log_softmax(kind: dict[str, Any], chunk: int) -> None:
    hidden, weight, bias, targets = inputs()
    head = make_head(weight, bias, kind)
    logs = log_softmax(hidden, head)
    expected = logs.gather(1, targets[:, None])[:, 0]
    wanted = torch.autograd.grad((expected * UPSTREAM).sum(), trained(hidden, head))
    scores = linear_logprobs(hidden, head, targets, chunk_tokens=chunk)
    gradients = torch.autograd.grad((scores.logprobs_N * UPSTREAM).sum(), trained(hidden, head))
    assert_close(scores.logprobs_N, expected, atol=1e-12, rtol=0)
    assert_close(scores.entropy_N, entropy(logs).detach(), atol=1e-12, rtol=0)
    assert torch.equal(scores.is_likeliest_N, logs.argmax(-1) == targets)
    assert scores.entropy_N is not None and not scores.entropy_N.requires_grad
    for gradient, other in zip(gradients, wanted, strict=True):
        assert_close(gradient, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", kinds())
def test_gradcheck(kind: dict[str, Any]) -> None:
    hidden, weight, bias, targets = inputs(positions=3, hidden=2, vocabulary=4)

    def logprobs(*tensors: torch.Tensor) -> torch.Tensor:
        head = make_head(tensors[1], tensors[-1], kind)
        return linear_logprobs(tensors[0], head, targets, chunk_tokens=2).logprobs_N

    assert torch.autograd.gradcheck(logprobs, [hidden, weight, bias][: 3 if kind["bias"] else 2])


@pytest.mark.parametrize("kind", kinds())
def test_entropy_without_gradients(kind: dict[str, Any]) -> None:
    hidden, weight, bias, targets = inputs()
    head = frozen(make_head(weight, bias, kind))
    scores = linear_logprobs(hidden.detach(), head, targets, chunk_tokens=3)
    assert_close(scores.entropy_N, entropy(log_softmax(hidden.detach(), head)), atol=1e-12, rtol=0)
    assert linear_logprobs(hidden.detach(), head, targets, with_entropy=False).entropy_N is None


@pytest.mark.parametrize("kind", kinds())
def test_squares(kind: dict[str, Any]) -> None:
    hidden, weight, bias, targets = inputs()
    head = make_head(weight, bias, kind)
    scores = linear_logprobs(hidden, head, targets, with_squares=True, chunk_tokens=3)
    expected = log_softmax(hidden, head).exp().square().sum(-1).log().detach()
    assert scores.log_squares_N is not None and not scores.log_squares_N.requires_grad
    assert_close(scores.log_squares_N, expected, atol=1e-12, rtol=0)
    assert linear_logprobs(hidden, head, targets).log_squares_N is None


@pytest.mark.parametrize("kind", kinds())
def test_only_the_gradients_that_are_asked_for(kind: dict[str, Any]) -> None:
    hidden, weight, bias, targets = inputs()
    head = make_head(weight, bias, kind)
    for states, used in ((hidden, frozen(head)), (hidden.detach(), head)):
        scores = linear_logprobs(states, used, targets, chunk_tokens=3)
        gradients = torch.autograd.grad(scores.logprobs_N.sum(), trained(states, used))
        logs = log_softmax(states, used).gather(1, targets[:, None]).sum()
        for gradient, other in zip(gradients, torch.autograd.grad(logs, trained(states, used)), strict=True):
            assert_close(gradient, other, atol=1e-12, rtol=0)


def test_a_weight_that_is_the_embedding_too() -> None:
    _, weight, _, targets = inputs()
    tokens = torch.tensor([0, 3, 3, 8, 1, 0, 5])
    mixing = torch.linspace(-1, 1, H * H, dtype=torch.float64).reshape(H, H)
    hidden = torch.tanh(weight[tokens] @ mixing)
    wanted = torch.autograd.grad(log_softmax(hidden, Head(weight)).gather(1, targets[:, None]).sum(), weight)
    hidden = torch.tanh(weight[tokens] @ mixing)
    actual = torch.autograd.grad(linear_logprobs(hidden, Head(weight), targets).logprobs_N.sum(), weight)
    assert_close(actual[0], wanted[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", kinds())
def test_no_positions_give_no_values_and_zero_gradients(kind: dict[str, Any]) -> None:
    hidden, weight, bias, targets = inputs(positions=0)
    head = make_head(weight, bias, kind)
    scores = linear_logprobs(hidden, head, targets)
    gradients = torch.autograd.grad(scores.logprobs_N.sum(), trained(hidden, head))
    assert [len(score) for score in scores if score is not None] == [0, 0, 0]
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in trained(hidden, head)]
    assert all(not gradient.any() for gradient in gradients)


def test_float32_keeps_large_logits_finite() -> None:
    hidden, weight = torch.tensor([[300.0]]), torch.tensor([[1.0], [-1.0]])
    logprobs, entropies, *_ = linear_logprobs(hidden, Head(weight), torch.tensor([1]))
    assert logprobs.tolist() == [-600.0] and entropies.tolist() == [0.0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_logits(sign: float) -> None:
    # logits of one token stand 1e4 above or below the others: its log-probability, and the gradient 1 - p, are exact
    weight = torch.zeros(5, 2).index_fill(0, torch.tensor([2]), 1.0).requires_grad_()
    hidden = torch.full((2, 2), sign * 5000.0, requires_grad=True)
    targets = torch.tensor([2, 0])
    scores = linear_logprobs(hidden, Head(weight), targets, chunk_tokens=1)
    scores.logprobs_N.sum().backward()
    log4 = torch.tensor(4.0).log().item()
    expected = [0.0, -1e4] if sign > 0 else [-1e4 - log4, -log4]
    assert_close(scores.logprobs_N, torch.tensor(expected))
    assert_close(scores.entropy_N, torch.full((2,), 0.0 if sign > 0 else log4), atol=1e-3, rtol=0)
    # d/dh is 0 where p = 1, W_target - p W otherwise
    slopes = [0.0, -1.0] if sign > 0 else [1.0, 0.0]
    assert_close(hidden.grad, torch.tensor(slopes)[:, None].expand(2, 2))
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_an_almost_certain_token_keeps_its_gradient() -> None:
    # p = 1 - 1e-9 in float32 is 1; d logprob / d h is (1 - p) (W_y - W_other)
    hidden = torch.tensor([[20.723266]], requires_grad=True)
    linear_logprobs(hidden, Head(torch.tensor([[1.0], [0.0]])), torch.tensor([0])).logprobs_N.sum().backward()
    assert hidden.grad is not None
    assert_close(hidden.grad.item(), 1e-9, rtol=1e-5, atol=0)


def test_bfloat16_weights_sum_in_float32() -> None:
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs(64, 8, 50, torch.float32)[:3]]
    exact = [tensor.detach().double().requires_grad_() for tensor in low]
    targets = inputs(64, 8, 50)[3]
    scores = linear_logprobs(low[0], Head(low[1], low[2]), targets, chunk_tokens=5)
    expected = linear_logprobs(exact[0], Head(exact[1], exact[2]), targets)
    assert scores.logprobs_N.dtype == torch.float32
    assert_close(scores.logprobs_N.double(), expected.logprobs_N, atol=1e-5, rtol=0)
    scores.logprobs_N.sum().backward()
    expected.logprobs_N.sum().backward()
    for tensor, other in zip(low, exact, strict=True):
        # the only rounding to bfloat16 is that of the finished gradient, half a unit of 2^-8
        assert tensor.grad is not None and other.grad is not None and tensor.grad.dtype == torch.bfloat16
        assert_close(tensor.grad.double(), other.grad, rtol=2**-8, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="products with sums of a wider type are CUDA's")
def test_bfloat16_products_on_a_gpu_sum_in_float32() -> None:
    low = [tensor.detach().bfloat16().cuda().requires_grad_() for tensor in inputs(96, 64, 512, torch.float32)[:3]]
    exact = [tensor.detach().double().requires_grad_() for tensor in low]
    targets = inputs(96, 64, 512)[3].cuda()
    scores = linear_logprobs(low[0], Head(low[1], low[2]), targets, chunk_tokens=40)
    expected = linear_logprobs(exact[0], Head(exact[1], exact[2]), targets)
    assert_close(scores.logprobs_N.double(), expected.logprobs_N, atol=1e-3, rtol=0)
    scores.logprobs_N.sum().backward()
    expected.logprobs_N.sum().backward()
    for tensor, other in zip(low, exact, strict=True):
        assert tensor.grad is not None and other.grad is not None
        error = (tensor.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < 2**-7


def test_autocast_does_not_apply() -> None:
    hidden, weight, bias, targets = inputs(dtype=torch.float32)
    head = Head(weight, bias)
    plain = linear_logprobs(hidden, head, targets, with_squares=True)
    expected = torch.autograd.grad(plain.logprobs_N.sum(), [hidden, weight])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = linear_logprobs(hidden, head, targets, with_squares=True)
        gradients = torch.autograd.grad(scores.logprobs_N.sum(), [hidden, weight])
    for value, other in zip((*scores, *gradients), (*plain, *expected), strict=True):
        assert torch.equal(value, other)


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, weight, _, targets = inputs()
    with pytest.raises(ValueError, match=r"do not fit: found \[\(7, 4\), \(9, 4\), \(6,\)\]"):
        linear_logprobs(hidden, Head(weight), targets[:6])


def products(states: torch.Tensor, head: Head, targets: torch.Tensor, **settings: Any) -> float:
    with Work() as work:
        scores = linear_logprobs(states, head, targets, **settings)
        if scores.logprobs_N.requires_grad:
            scores.logprobs_N.sum().backward()
    return work.products(N, V, H)


@pytest.mark.parametrize("kind", kinds())
def test_number_of_products(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = inputs()
    head = make_head(weight, bias, kind)
    assert products(hidden, head, targets) == 3
    assert products(hidden, frozen(head), targets, chunk_tokens=3) == 2
    assert products(hidden.detach(), frozen(head), targets, with_entropy=False, chunk_tokens=3) == 1
    with torch.no_grad():
        assert products(hidden, head, targets, with_entropy=False) == 1
    # more probabilities than are kept: they are computed again
    monkeypatch.setattr(logprobs_module, "KEPT_BYTES", 0)
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 1)
    assert products(hidden, head, targets) == 4


def test_memory_is_that_of_a_chunk_or_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = inputs(positions=64, hidden=4, vocabulary=50, dtype=torch.float32)
    with Work() as work:
        linear_logprobs(hidden, Head(weight, bias), targets, chunk_tokens=8).logprobs_N.sum().backward()
    assert work.largest == 8 * 50
    monkeypatch.setattr(logprobs_module, "KEPT_BYTES", 64 * 50 * 4 - 1)
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 1)
    with Work() as work:
        linear_logprobs(hidden, Head(weight, bias), targets).logprobs_N.sum().backward()
    assert work.largest == max(weight.numel(), hidden.numel())
