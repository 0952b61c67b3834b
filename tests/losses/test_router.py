"""The load-balancing loss by hand, and against transformers' function."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from stages.losses.router import load_balance, max_load


def one_sequence(values_PE: Tensor) -> Tensor:
    return values_PE.sum(0, keepdim=True)


def test_by_hand() -> None:
    """Two tokens with probabilities 3/4, 1/4 and 1/2 + , 1/2 - of two experts: both go to the first one, f = (1, 0),
    p = (5/8, 3/8), so E f p = 2 x 5/8."""
    logits = torch.tensor([[math.log(3.0), 0.0], [1e-7, 0.0]])
    losses_K, loads_LE = load_balance([logits], 1, one_sequence, torch.tensor([2]))
    assert float(losses_K) == pytest.approx(1.25, rel=1e-6)
    assert loads_LE.tolist() == [[2.0, 0.0]]
    assert max_load(loads_LE) == 2.0


def test_balance_is_the_least_of_equal_probabilities() -> None:
    """Every expert once, all probabilities 1/E: E x E x (k/E x 1/E) = k, whatever is chosen."""
    losses_K, _ = load_balance([torch.zeros(6, 8)], 3, one_sequence, torch.tensor([6]))
    assert float(losses_K) == pytest.approx(3.0, rel=1e-6)


def test_layers_have_a_load_of_their_own() -> None:
    """Together both experts are as busy; in each layer one has all."""
    first = torch.tensor([[2.0, 0.0]]).expand(4, 2)
    losses_K, loads_LE = load_balance([first, -first], 1, one_sequence, torch.tensor([4]))
    assert loads_LE.tolist() == [[4.0, 0.0], [0.0, 4.0]]
    assert max_load(loads_LE) == 2.0 and float(losses_K) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_it_is_transformers_for_one_sequence(top_k: int) -> None:
    torch.manual_seed(top_k)
    logits = [(torch.randn(11, 6) * 3).requires_grad_() for _ in range(3)]
    losses_K, _ = load_balance(logits, top_k, one_sequence, torch.tensor([11]))
    ours = torch.autograd.grad(losses_K.sum(), logits)
    expected = load_balancing_loss_func(tuple(logits), 6, top_k)
    assert isinstance(expected, Tensor)
    assert losses_K.tolist() == pytest.approx([expected.item()], rel=1e-6)
    for left, right in zip(ours, torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(left, right, atol=1e-7, rtol=1e-5)
