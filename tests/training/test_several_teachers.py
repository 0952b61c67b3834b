"""The loss under several teachers on tiny models: that of each one's groups by itself, added up."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from stages.losses.distillation import divergence_of
from stages.training.batch import Group, TokenBatch
from stages.training.distillation import DistillationLoss
from stages.training.model import Scorer
from stages.training.row_teachers import OfTeacher
from stages.training.several_teachers import Foretold, LossOfTeachers
from stages.training.teachers import LocalTeacher
from stages.training.top_distillation import TopDistillationLoss
from tests.training.conftest import VOCABULARY, random_groups, tiny_model
from tests.training.test_objectives import agree, gradients, plain_logits


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(tiny_model().double())


@pytest.fixture(scope="module")
def teachers() -> list[Scorer]:
    """Of another architecture each, one with a vocabulary that is filled up further."""
    torch.manual_seed(1)
    kinds = {"qwen3": VOCABULARY, "llama": VOCABULARY + 9}
    return [Scorer(tiny_model(kind, vocab_size=size).double().requires_grad_(False)) for kind, size in kinds.items()]


def losses(teachers: list[Scorer], most: int | None, *, told: list[Foretold] | None = None) -> list[Any]:
    """Each teacher's objective; asked beforehand where they are `told`."""
    found: list[Any] = []
    for scorer in teachers:
        teacher: Any = LocalTeacher(scorer, most, 0.7)
        teacher.vocabulary = VOCABULARY
        if told is not None:
            told.append(teacher := Foretold(teacher, whole=most is None))
        kind = DistillationLoss if most is None else TopDistillationLoss
        found.append(kind(teacher, divergence_of(0.4), 0.7))
    return found


def together(teachers: list[Scorer], most: int | None) -> LossOfTeachers:
    told: list[Foretold] = []
    objectives = losses(teachers, most, told=told)
    return LossOfTeachers(objectives, told, ["math", "code"])


def tagged(groups: list[Group]) -> list[Group]:
    """In turns, with two of the first teacher's one after the other."""
    return [replace(group, data=OfTeacher(index % 3 % 2, group.data)) for index, group in enumerate(groups)]


def of(groups: list[Group], teacher: int) -> list[Group]:
    return [replace(group, data=None) for group in tagged(groups) if group.data.teacher == teacher]


def test_the_whole_divergence_by_hand(scorer: Scorer, teachers: list[Scorer]) -> None:
    """From the two models' own logits of separate rows; loss and gradients."""
    groups, values = random_groups(5, 2), []
    for number, teacher in enumerate(teachers):
        own = of(groups, number)
        ours, theirs = (torch.cat(plain_logits(one, own))[:, :VOCABULARY] / 0.7 for one in (scorer, teacher))
        values.append(divergence_of(0.4).of_logits(ours, theirs))
    metrics = agree(scorer, together(teachers, None), tagged(groups), torch.cat(values).sum())
    assert metrics["divergence"] == pytest.approx(float(torch.cat(values).detach().mean()), rel=1e-9)
    for label, value in zip(("math", "code"), values, strict=True):
        assert metrics[f"divergence/{label}"] == pytest.approx(float(value.detach().mean()), rel=1e-9)


@pytest.mark.parametrize("most", [None, 4])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_it_is_the_sum_of_what_each_teaches_apart(
    most: int | None, size: int, scorer: Scorer, teachers: list[Scorer]
) -> None:
    """However the rows are split into batches: some of these are one teacher's alone."""
    groups = random_groups(5, 2)
    apart = [
        objective(scorer, scorer.layout(of(groups, number)))[0]
        for number, objective in enumerate(losses(teachers, most))
    ]
    wanted = gradients(scorer, sum(apart))
    objective, rows = together(teachers, most), tagged(groups)
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    loss = sum(objective(scorer, scorer.layout(batch))[0] for batch in batches)
    assert_close(loss, sum(apart), rtol=1e-9, atol=1e-9)
    for gradient, other in zip(gradients(scorer, loss), wanted, strict=True):
        assert_close(gradient, other, rtol=1e-7, atol=1e-9)
    assert objective.count(rows[0]) == sum(len(branch.token_ids) for branch in rows[0].branches)


@pytest.mark.parametrize("breaks", [False, True])
def test_what_teachers_said_is_let_go(breaks: bool, scorer: Scorer, teachers: list[Scorer]) -> None:
    """It is as large as the batch; one that ran out of memory must not hold it either."""
    objective = together(teachers, None)
    heard = []

    def forward(batch: TokenBatch, readout: Any) -> Any:
        heard.extend(one.hidden(batch) for one in objective.told)
        if breaks:
            raise MemoryError
        return scorer(batch, readout)

    batch = scorer.layout(tagged(random_groups(5, 2)))
    with pytest.raises(MemoryError) if breaks else nullcontext():
        objective(forward, batch)
    assert len(heard) == 2 and not any(one is None for one in heard)
    assert [one.hidden(batch) for one in objective.told] == [None, None]
