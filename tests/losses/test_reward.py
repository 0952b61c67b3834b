"""The losses of reward models against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses.reward import bradley_terry, step_cross_entropy

CHOSEN = torch.tensor([2.0, 0.0], dtype=torch.float64)
REJECTED = torch.tensor([1.0, 1.0], dtype=torch.float64)
# logits (0, log 3): probabilities 1/4 and 3/4
LOGITS = torch.tensor([[0.0, 1.098612289], [0.0, 1.098612289]], dtype=torch.float64)
LABELS = torch.tensor([True, False])

CASES: list[tuple[str, Callable[..., Tensor], list[Tensor], tuple[Any, ...], list[float]]] = [
    # differences 1 and -1: log(1 + e^-1), log(1 + e)
    ("bradley_terry", bradley_terry, [CHOSEN, REJECTED], (), [0.313261688, 1.313261688]),
    # margins 1 and -1 cancel the differences: log 2 each; plus 0.1 * 3^2 and 0.1 * 1^2
    (
        "bradley_terry",
        bradley_terry,
        [CHOSEN, REJECTED],
        (torch.tensor([1.0, -1.0], dtype=torch.float64), 0.1),
        [1.593147181, 0.793147181],
    ),
    # log(4/3) and log 4
    ("step_cross_entropy", step_cross_entropy, [LOGITS], (LABELS,), [0.287682072, 1.386294361]),
]
each_case = pytest.mark.parametrize(("name", "loss", "scores", "given", "expected"), CASES)
Case = tuple[Any, ...]


@each_case
def test_values(name: str, loss: Any, scores: list[Tensor], given: Case, expected: list[float]) -> None:
    assert_close(loss(*scores, *given), torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0)


@each_case
def test_gradients(name: str, loss: Any, scores: list[Tensor], given: Case, expected: list[float]) -> None:
    leaves = [values.clone().requires_grad_() for values in scores]
    assert torch.autograd.gradcheck(lambda *values: loss(*values, *given), leaves)


@each_case
def test_rows_do_not_see_each_other(
    name: str, loss: Any, scores: list[Tensor], given: Case, expected: list[float]
) -> None:
    def row(values: Any, index: int) -> Any:
        return values[index : index + 1] if isinstance(values, Tensor) else values

    apart = [loss(*(row(values, index) for values in (*scores, *given))) for index in range(2)]
    assert torch.equal(torch.cat(apart), loss(*scores, *given))


def test_a_constant_added_to_both_scores_changes_nothing_without_centering() -> None:
    assert_close(bradley_terry(CHOSEN + 3, REJECTED + 3), bradley_terry(CHOSEN, REJECTED), atol=1e-12, rtol=0)


def test_extreme_scores_stay_finite() -> None:
    chosen, rejected = (torch.tensor(row, requires_grad=True) for row in ([-1e4, 1e4], [1e4, -1e4]))
    losses = bradley_terry(chosen, rejected, center_coefficient=0.1)
    assert losses.tolist() == [2e4, 0.0]  # the sums of both pairs are 0
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(losses.sum(), (chosen, rejected)))
