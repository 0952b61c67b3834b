"""The token losses of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses.supervised import SUPERVISED_LOSSES

# Tokens of probability 1/4, 1 and 1/e: logarithms -1.386294361, 0 and -1.
PROBABILITIES = torch.tensor([0.25, 1.0, 0.367879441], dtype=torch.float64)
LOSSES = {name: loss.function for name, loss in SUPERVISED_LOSSES.items()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # log 4, log 1, log e
        ("nll", [1.386294361, 0.0, 1.0]),
        # each times its own probability
        ("dft", [0.346573590, 0.0, 0.367879441]),
    ],
)
def test_values(name: str, expected: list[float]) -> None:
    losses = LOSSES[name](PROBABILITIES.log())
    assert_close(losses, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("nll", lambda logprobs: -logprobs),
        # the weight has no gradient of its own, which finite differences would see: it is held fast
        ("dft", lambda logprobs: -PROBABILITIES * logprobs),
    ],
)
def test_gradients(name: str, same: Callable[[Tensor], Tensor]) -> None:
    """Those of a function that has the loss's gradient by definition, which finite differences confirm."""
    logprobs = PROBABILITIES.log().requires_grad_()
    assert torch.autograd.gradcheck(same, [logprobs])
    found, expected = (torch.autograd.grad(loss(logprobs).sum(), logprobs) for loss in (LOSSES[name], same))
    assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", SUPERVISED_LOSSES)
def test_tokens_do_not_see_each_other(name: str) -> None:
    logprobs = torch.tensor([-0.5, -2.0, -3.0])
    assert torch.equal(LOSSES[name](logprobs[1:2]), LOSSES[name](logprobs)[1:2])


@pytest.mark.parametrize("name", SUPERVISED_LOSSES)
def test_an_impossible_token_stays_finite(name: str) -> None:
    logprobs = torch.tensor([-1e4], requires_grad=True)
    losses = LOSSES[name](logprobs)
    assert losses.isfinite().all() and torch.autograd.grad(losses.sum(), logprobs)[0].isfinite().all()
