"""Losses of groups of tokens: by hand, their gradients, and chunk by chunk against all at once."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses import linear_group_loss as module
from stages.losses.distillation import divergence_of
from stages.losses.group_loss import (
    MERGES,
    GroupLoss,
    GroupTokens,
    Matching,
    group_losses,
    hybrid_parts,
    measure_divergence,
    merged,
    sorted_distance,
)
from stages.losses.head import Head
from stages.losses.linear_group_loss import linear_group_loss
from tests.losses.heads import H, N, V, Work, inputs, kinds, make_head, trained

U = 6
"""The teacher's vocabulary."""
SIZES = [1, 2, 1, 3], [2, 1, 1, 1]
"""Tokens of four groups: N of the student's, 5 of the teacher's."""
BETAS = [0.0, 0.3, 1.0]


def tensor(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def by_rank(student_GV: Tensor, teacher_GU: Tensor) -> Tensor:
    return sorted_distance(student_GV, teacher_GU)[:, None]


def losses() -> list[GroupLoss]:
    """Of every kind."""
    matching = Matching.of(torch.tensor([0, 7, 3]), torch.tensor([5, 1, 2]), (V, U))
    parts = [(by_rank, (1.0,)), *((partial(hybrid_parts, matching=matching, beta=beta), (0.4, 0.7)) for beta in BETAS)]
    return [GroupLoss(whole, *one, weight) for whole in MERGES.values() for one in parts for weight in (0.0, 0.5)]


def teacher_of(**settings: Any) -> tuple[tuple[Tensor, Head], GroupTokens]:
    draws = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(rows, 3, generator=draws, dtype=torch.float64) for rows in (sum(SIZES[1]), U))
    tokens = torch.randint(0, U, (sum(SIZES[1]),), generator=draws)
    return (hidden, Head(weight, softcap=3.0, **settings)), GroupTokens(tokens, SIZES[1])


def test_merging() -> None:
    """Distributions (1/2, 1/2), (1/4, 3/4), (1/8, 7/8); the last two are a group, of the tokens 1 and 0."""
    probs = tensor([1 / 2, 1 / 2], [1 / 4, 3 / 4], [1 / 8, 7 / 8])
    tokens = GroupTokens(torch.tensor([0, 1, 0]), [1, 2])
    observed, logs = merged(probs.log(), tokens, MERGES["observed"])
    assert_close(observed, tensor([1 / 2, 1 / 2], [1 / 32, 3 / 32]))  # times 1/8, of the token that followed
    bayesian, same = merged(probs.log(), tokens, MERGES["bayesian"])
    assert_close(bayesian, tensor([1 / 2, 1 / 2], [3 / 32, 21 / 32]))  # times 3/4, of the token before
    assert_close(logs, tensor(math.log(1 / 2), math.log(3 / 32)).flatten())
    assert_close(same, logs)


def test_distance_by_rank() -> None:
    """(0.5, 0.3, 0.2) and (0.6, 0.4, 0) are 0.1 + 0.1 + 0.2 apart, in whatever order they come."""
    student, teacher = tensor([0.2, 0.5, 0.3], [1.0, 0.0, 0.0]), tensor([0.4, 0.6], [0.5, 0.5])
    assert_close(sorted_distance(student, teacher), tensor(0.4, 1.0).flatten())
    assert_close(sorted_distance(teacher, student), tensor(0.4, 1.0).flatten())
    assert_close(sorted_distance(student, student[:, [2, 0, 1]]), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        # s = (1/4, 1/8), t = (1/2, 0): mixture (3/8, 1/16) at 1/2
        (0.5, 0.5 * (0.5 * math.log(4 / 3)) + 0.5 * (0.25 * math.log(2 / 3) + 0.125 * math.log(2))),
        (0.0, 0.5 * math.log(2) - 0.5 + 0.25 + 0.125),
    ],
)
def test_divergence_of_measures(beta: float, expected: float) -> None:
    found = measure_divergence(tensor([1 / 4, 1 / 8]), tensor([1 / 2, 0.0]), beta)
    assert_close(found, tensor(expected).flatten(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_of_whole_distributions_it_is_the_divergence_of_one_tokenizer(beta: float) -> None:
    """Equal tokenizers: groups of one token, and every token matched."""
    hidden, weight, _, targets = inputs()
    logits, others = hidden @ weight.t(), torch.randn(N, V, dtype=torch.float64)
    every = torch.arange(V)
    parts = partial(hybrid_parts, matching=Matching.of(every, every, (V, V)), beta=beta)
    tokens = GroupTokens(targets, [1] * N)
    sums, values = group_losses((logits, tokens), (others, tokens), GroupLoss(MERGES["observed"], parts, (1.0, 0.0)))
    expected = divergence_of(beta).of_logits(logits, others)
    assert_close(sums[:, 0], expected, atol=1e-12, rtol=0)
    assert_close(values[:, 1], torch.zeros(N, dtype=torch.float64))
    one, other = (torch.autograd.grad(value.sum(), logits, retain_graph=True) for value in (sums[:, 0], expected))
    assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_it_is_least_where_student_and_teacher_are_equal(beta: float) -> None:
    teacher = tensor([0.1, 0.3, 0.05])
    student = teacher.clone().requires_grad_()
    value = measure_divergence(student, teacher, beta)
    (slope,) = torch.autograd.grad(value.sum(), student)
    assert_close(value, torch.zeros(1, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)
    for moved in (teacher * 0.7, teacher * 1.3, teacher + tensor([0.1, -0.1, 0.0])):
        assert measure_divergence(moved, teacher, beta) > 0


@pytest.mark.parametrize("loss", losses())
def test_gradients(loss: GroupLoss) -> None:
    _, _, _, targets = inputs()
    (teacher, head), tokens = teacher_of()

    def total(logits: Tensor) -> Tensor:
        sums, _ = group_losses(
            (logits, GroupTokens(targets, SIZES[0])), (head.logits(teacher), tokens), loss, temperature=0.7
        )
        return sums[:, 0] + loss.crossentropy_weight * sums[:, 1]

    logits = torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.autograd.gradcheck(total, (logits,))


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunk_by_chunk(kind: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = inputs()
    head, student = make_head(weight, bias, kind), GroupTokens(targets, SIZES[0])
    teacher, tokens = teacher_of(temperature=1.3)
    counted = [True, False, True, False]
    for rows in (1, 100):
        monkeypatch.setitem(module.BLOCK_BYTES, "cpu", rows * V * 8)
        for loss in losses():
            sums, parts = group_losses(
                (head.logits(hidden), student),
                (teacher[1].logits(teacher[0]), tokens),
                loss,
                temperature=head.temperature,
            )
            wanted = (sums[:, 0] + loss.crossentropy_weight * sums[:, 1] * torch.tensor(counted)).sum()
            total, *found = linear_group_loss(
                (hidden, head), student, teacher, tokens, loss, crossentropy=counted, chunk_tokens=chunk
            )
            assert_close(total, wanted, atol=1e-12, rtol=0)
            assert_close(found, [sums.detach(), parts.detach()], atol=1e-12, rtol=0)
            ours, plain = (torch.autograd.grad(0.3 * one, trained(hidden, head)) for one in (total, wanted))
            assert_close(ours, plain, atol=1e-12, rtol=0)


def test_the_teacher_gets_no_gradient_and_without_one_nothing_is_kept() -> None:
    hidden, weight, _, targets = inputs()
    student, ((states, head), tokens) = GroupTokens(targets, SIZES[0]), teacher_of()
    states.requires_grad_(), head.weight_VH.requires_grad_()
    linear_group_loss((hidden, Head(weight)), student, (states, head), tokens, losses()[0])[0].backward()
    assert states.grad is None and head.weight_VH.grad is None and weight.grad is not None
    with torch.no_grad():
        total, *_ = linear_group_loss((hidden, Head(weight)), student, (states, head), tokens, losses()[0])
    assert not total.requires_grad


def test_no_groups_and_groups_that_do_not_fit() -> None:
    hidden, weight, _, targets = inputs()
    (states, head), tokens = teacher_of()
    none = GroupTokens(targets[:0], [])
    total, *found = linear_group_loss((hidden[:0], Head(weight)), none, (states[:0], head), none, losses()[0])
    assert total == 0 and [one.shape for one in found] == [(0, 2), (0, 1)]
    total.backward()
    assert weight.grad is not None and not weight.grad.any()
    with pytest.raises(ValueError, match=r"do not fit: .* \[\(3, 7, 7\), \(4, 5, 5\)\]"):
        linear_group_loss((hidden, Head(weight)), GroupTokens(targets, [1, 2, 4]), (states, head), tokens, losses()[0])


def test_logits_are_there_for_a_chunk_of_groups_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 groups over vocabularies of 3,000: never more than 8 positions of them, nor more than 2 sorted."""
    groups, vocabulary = 60, 3000
    monkeypatch.setitem(module.BLOCK_BYTES, "cpu", 2 * vocabulary * 4)
    weight = torch.randn(vocabulary, H).requires_grad_()
    hidden = torch.randn(groups, H, requires_grad=True)
    tokens = GroupTokens(torch.zeros(groups, dtype=torch.long), [1] * groups)
    with Work() as work:
        linear_group_loss(
            (hidden, Head(weight)), tokens, (hidden, Head(weight.detach())), tokens, losses()[0], chunk_tokens=8
        )[0].backward()
    assert work.largest == 8 * vocabulary
