"""The head's gradient added in place over a step's micro-batches, against autograd's sum of the plain expression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from stages.losses.distillation import divergence_of
from stages.losses.entropy_loss import linear_token_entropy_loss
from stages.losses.head import Head
from stages.losses.head_gradient import GradientTotal
from stages.losses.linear_divergence import linear_divergence
from stages.losses.logprobs import linear_logprobs
from stages.losses.token_loss import linear_token_loss

VOCABULARY, HIDDEN = 37, 5
TEACHER = Head(torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(7)))
Loss = Callable[[Tensor, Head, Tensor], Tensor]


def states(seed: int, positions: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, HIDDEN, generator=generator)
    return hidden.requires_grad_(), torch.randint(VOCABULARY, (positions,), generator=generator)


def weight_and_bias() -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*shape, generator=generator) for shape in ((VOCABULARY, HIDDEN), (VOCABULARY,)))
    return nn.Parameter(weight), nn.Parameter(bias)


def nll(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    return linear_token_loss(hidden, head, targets, lambda logprobs, _: -logprobs, chunk_tokens=4)[0]


def squares(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Not known before the last token is."""
    return linear_logprobs(hidden, head, targets, chunk_tokens=4).logprobs_N.sum().square() / 100


def with_entropy(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    weights = torch.linspace(0.1, 1, len(targets))
    return linear_token_entropy_loss(hidden, head, targets, lambda logprobs, _: -logprobs, weights, chunk_tokens=4)[0]


def divergence(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    return linear_divergence(hidden, head, hidden.detach(), TEACHER, divergence_of(0.5), chunk_tokens=4)[0]


class NewTensors(TorchDispatchMode):
    """How many tensors of the weight's size came into being elsewhere than in `place`."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place, self.found = place, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == VOCABULARY * HIDDEN:
            views = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
            self.found += result.untyped_storage().data_ptr() not in {self.place, *views}
        return result


@pytest.mark.parametrize("loss", [nll, squares, with_entropy, divergence])
@pytest.mark.parametrize("factor", [1.0, 1 / 3])
def test_later_passes_add_in_place(loss: Loss, factor: float) -> None:
    weight, bias = weight_and_bias()
    plain_weight, plain_bias = weight_and_bias()
    total = GradientTotal(weight)
    for step in range(2):
        weight.grad = bias.grad = plain_weight.grad = plain_bias.grad = None
        for micro_batch in range(3):
            hidden, targets = states(10 * step + micro_batch)
            plain_hidden = hidden.detach().clone().requires_grad_()
            (loss(plain_hidden, Head(plain_weight, plain_bias, softcap=4.0), targets) * factor).backward()
            place = 0 if weight.grad is None else weight.grad.untyped_storage().data_ptr()
            with NewTensors(place) as new:
                (loss(hidden, Head(weight, bias, softcap=4.0, total=total), targets) * factor).backward()
            assert (new.found == 0) == (micro_batch > 0)
            assert_close(hidden.grad, plain_hidden.grad)
            assert_close(weight.grad, plain_weight.grad)
            assert_close(bias.grad, plain_bias.grad)


def test_a_step_has_a_factor_of_its_own() -> None:
    weight, _ = weight_and_bias()
    total = GradientTotal(weight)
    for items in (4, 7):
        weight.grad = None
        expected = torch.zeros_like(weight)
        for micro_batch in range(2):
            hidden, targets = states(micro_batch)
            alone, _ = weight_and_bias()
            (nll(hidden, Head(alone), targets) / items).backward()
            assert alone.grad is not None
            expected += alone.grad
            (nll(hidden, Head(weight, total=total), targets) / items).backward()
        assert_close(weight.grad, expected)


def test_another_factor_within_a_step_is_refused() -> None:
    weight, _ = weight_and_bias()
    total = GradientTotal(weight)
    hidden, targets = states(1)
    (nll(hidden, Head(weight, total=total), targets) / 4).backward()
    with pytest.raises(RuntimeError, match=r"multiplied by 0\.25, as in the passes before, but 0\.5 came in"):
        (nll(hidden, Head(weight, total=total), targets) / 2).backward()


def test_passes_that_disagree_from_the_first_keep_gradients_of_their_own() -> None:
    """As with two losses of one pass, of which one has a coefficient."""
    weight, _ = weight_and_bias()
    plain, _ = weight_and_bias()
    total = GradientTotal(weight)
    for seed in range(3):
        hidden, targets = states(seed)
        for head in (Head(plain), Head(weight, total=total)):
            both = nll(hidden, head, targets) / 4 + with_entropy(hidden, head, targets) * 0.01
            both.backward()
        assert_close(weight.grad, plain.grad)
