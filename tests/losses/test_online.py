"""Losses and numbers of XPO, Nash-MD and A*-PO, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses.online import PREFERENCES, advantage_regression, explored, nash_md, optimal_value


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# of two pairs the second, and the first, completion is the reference's
WEIGHTS = tensor([[0.0, 0.1], [0.1, 0.0]])
REFERENCE, ADVANTAGES = tensor([-1.0, -3.0]), tensor([0.25, -0.5])

LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], list[object], list[float]]] = {
    # the loss of log-probabilities (or log-ratios), these, and its values
    "explored": (lambda logprobs: explored(logprobs, WEIGHTS), [[-2.0, -5.0], [-3.0, -7.0]], [-0.5, -0.3]),
    # (0.2 (-2 + 1) - 0.25) (-2) and (0.2 (-2 + 3) + 0.5) (-2)
    "nash_md": (lambda logprobs: nash_md(logprobs, REFERENCE, ADVANTAGES, beta=0.2), [-2.0, -2.0], [0.9, -1.4]),
    # (0.1 * 2 - 0.25)^2 and (0.1 * -4 + 0.5)^2
    "advantage_regression": (
        lambda ratios: advantage_regression(ratios, ADVANTAGES, beta2=0.1),
        [2.0, -4.0],
        [0.0025, 0.01],
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_values(name: str) -> None:
    loss, values, expected = LOSSES[name]
    assert_close(loss(tensor(values)), tensor(expected), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    """Numerically; of Nash-MD the log-ratio is held fast: its slope is beta (log pi - log pi_ref) - (P - 1/2)."""
    loss, values, _ = LOSSES[name]
    at = tensor(values).requires_grad_()
    if name == "nash_md":
        (slopes,) = torch.autograd.grad(loss(at).sum(), at)
        assert_close(slopes, tensor([-0.2 - 0.25, 0.2 + 0.5]), atol=1e-12, rtol=0)
        held = 0.2 * (at.detach() - REFERENCE) - ADVANTAGES
        assert_close(loss(at), held * at, atol=1e-12, rtol=0)
        assert torch.autograd.gradcheck(lambda free: held * free, (at,))
    else:
        assert torch.autograd.gradcheck(loss, (at,))


@pytest.mark.parametrize("name", LOSSES)
def test_rows_do_not_see_each_other(name: str) -> None:
    """Another value in the second row leaves the first as it is."""
    loss, values, expected = LOSSES[name]
    other = tensor(values)
    other[1] -= 1.0
    assert float(loss(other)[0]) == pytest.approx(expected[0], abs=1e-12)
    assert float(loss(other)[1]) != pytest.approx(expected[1], abs=1e-6)


def test_nash_mds_gradient_is_the_kl_divergences() -> None:
    """With equal preferences, over all tokens of a distribution weighted by it: d/d logits of KL(pi || pi_ref)."""
    logits, reference = tensor([0.3, -1.0, 2.0]).requires_grad_(), tensor([1.0, 0.5, -0.5]).log_softmax(0)
    logprobs = logits.log_softmax(0)
    estimate = (logprobs.exp().detach() * nash_md(logprobs, reference, torch.zeros(3), beta=0.7)).sum()
    exact = 0.7 * (logprobs.exp() * (logprobs - reference)).sum()
    found, expected = (torch.autograd.grad(one, logits, retain_graph=True)[0] for one in (estimate, exact))
    assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("name", "gap", "expected"),
    [
        # sigmoid(log 3) = 3 / 4
        ("bradley_terry", math.log(3), 0.75),
        ("bradley_terry", -math.log(3), 0.25),
        ("bradley_terry", 0.0, 0.5),
        ("bradley_terry", -1e4, 0.0),
        ("higher", 0.01, 1.0),
        ("higher", 0.0, 0.5),
        ("higher", -3.0, 0.0),
    ],
)
def test_preferences(name: str, gap: float, expected: float) -> None:
    assert PREFERENCES[name](gap) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("rewards", "beta1", "expected"),
    [
        ([0.5, 0.5, 0.5], 0.5, 0.5),
        # 1/2 log((e^2 + 3) / 4)
        ([1.0, 0.0, 0.0, 0.0], 0.5, math.log((math.e**2 + 3) / 4) / 2),
        # a small beta1 is the best reward, a large one the mean
        ([1.0, 0.0], 1e-3, 1.0 - 1e-3 * math.log(2)),
        ([1.0, 0.0], 1e6, 0.5),
        ([1e5, 1e5 - 700.0], 1.0, 1e5 - math.log(2)),
    ],
)
def test_optimal_values(rewards: list[float], beta1: float, expected: float) -> None:
    assert optimal_value(rewards, beta1=beta1) == pytest.approx(expected, abs=1e-6)


def test_at_the_optimal_policy_the_regression_is_zero() -> None:
    """pi* = pi_ref exp((r - V*) / beta): its log-ratio times beta is r - V*, for every completion."""
    reference, rewards, beta = tensor([0.5, 0.3, 0.2]), tensor([1.0, 0.0, -2.0]), 0.4
    best = (reference.log() + rewards / beta).log_softmax(0)
    value = beta * float((reference.log() + rewards / beta).logsumexp(0))
    losses = advantage_regression(best - reference.log(), rewards - value, beta2=beta)
    assert_close(losses, torch.zeros(3, dtype=torch.float64), atol=1e-20, rtol=0)
