"""Several teachers of one student, each of rows of its own (MOPD, arXiv:2606.30406)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from artifacts.errors import StageError
from stages.context import Context
from stages.losses.head import Head
from stages.losses.top_divergence import TopTokens
from stages.training.answers_ahead import Foretelling
from stages.training.batch import Group, TokenBatch
from stages.training.loop import Trainer
from stages.training.metrics import Mean
from stages.training.model import laid_out
from stages.training.objective import Forward, Objective, Readout
from stages.training.row_teachers import Choice
from stages.training.teacher_settings import number_problems
from stages.training.teachers import Teacher


class Foretold:
    """A teacher that has been asked about a batch before its objective asks: while the student reads a batch, and its
    states are held, no other model does."""

    def __init__(self, teacher: Any, *, whole: bool) -> None:
        """`whole`: it is asked for whole distributions."""
        self._ask: Callable[[TokenBatch], Any] = teacher.hidden if whole else teacher
        self._teacher = teacher
        self._said: Any = None

    def hear(self, batch: TokenBatch) -> None:
        """Ask it about this batch."""
        self._said = self._ask(batch)

    def forget(self) -> None:
        """Let go of what it said: for whole distributions that is states of the size of the batch."""
        self._said = None

    def hidden(self, batch: TokenBatch) -> Any:
        """What it said last."""
        return self._said

    def head(self) -> Head:
        """The teacher's."""
        head: Head = self._teacher.head()
        return head

    def __call__(self, batch: TokenBatch) -> Any:
        """What it said last."""
        return self._said


class LossOfTeachers:
    """Sum over groups of the loss that the objective of each one's teacher has. The student reads a batch once; each
    teacher reads its own groups, one teacher after the other."""

    def __init__(self, objectives: Sequence[Objective], told: Sequence[Foretold], labels: Sequence[str]) -> None:
        """`labels`: what the teachers are called among the metrics."""
        self.objectives, self.told = objectives, told
        self._own = [f"divergence/{label}" for label in labels]
        self.metric_names: Sequence[str] = (*objectives[0].metric_names, *self._own)

    def count(self, group: Group) -> float:
        """As its teacher's objective counts it."""
        objective: Objective = self.objectives[group.data.teacher]
        return objective.count(_plain(group))

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(summed loss, the objectives' metrics over all groups, and the divergence from each teacher)."""
        parts = self._parts(batch)

        def read(hidden_NH: Tensor, student: nn.Module) -> tuple[Tensor, dict[int, dict[str, Mean]]]:
            losses, metrics = [], {}
            for teacher, (part, places_M) in parts.items():
                loss, metrics[teacher] = self.objectives[teacher](_reading(hidden_NH[places_M], student), part)
                losses.append(loss)
            return torch.stack(losses).sum(), metrics

        try:
            for teacher, (part, _) in parts.items():
                self.told[teacher].hear(part)
            loss, metrics = forward(batch, Readout(batch.source_N, read))
        finally:
            for one in self.told:
                one.forget()
        return loss, self._together(metrics)

    def _parts(self, batch: TokenBatch) -> dict[int, tuple[TokenBatch, Tensor]]:
        """Teacher -> (its groups as a batch of their own, where the batch's N asked-for tokens are theirs)."""
        device = batch.source_N.device
        of_branch = [group.data.teacher for group in batch.groups for _ in group.branches]
        of_token_N = torch.tensor(of_branch).repeat_interleave(torch.tensor(batch.counts))
        found = {}
        for teacher in sorted(set(of_branch)):
            own = [_plain(group) for group in batch.groups if group.data.teacher == teacher]
            places_M = (of_token_N == teacher).nonzero().flatten().to(device, non_blocking=True)
            part = laid_out(own, share_prefixes=batch.packed is not None, device=device)
            found[teacher] = part, places_M
        return found

    def _together(self, metrics: dict[int, dict[str, Mean]]) -> dict[str, Mean]:
        """Sums and counts of all teachers, and of each one's divergence."""
        of_each = list(metrics.values())
        total = {
            name: Mean(sum(one[name].sum for one in of_each), sum(one[name].count for one in of_each))
            for name in of_each[0]
        }
        return total | {self._own[teacher]: found["divergence"] for teacher, found in metrics.items()}


def _plain(group: Group) -> Group:
    return replace(group, data=group.data.data)


def _reading(hidden_MH: Tensor, student: nn.Module) -> Forward:
    """The forward pass of a part whose states are there already."""

    def forward(part: TokenBatch, readout: Readout) -> Any:
        assert len(readout.positions_R) == len(hidden_MH), "an objective here reads all asked-for tokens"
        return readout.read(hidden_MH, student)

    return forward


class Teachers:
    """Several as one `Teacher`."""

    scorer, vocabulary = None, None

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.teachers = teachers

    def join(self, trainer: Trainer) -> None:
        """All of them. One that takes no packed rows settles it for the student; the others take both."""
        for teacher in self.teachers:
            teacher.join(trainer)

    def taught(self, dataset: str, groups: list[Group]) -> list[Group]:
        """They need nothing more."""
        return groups

    def foretell(self, groups: Sequence[Group]) -> list[TopTokens | None]:
        """Of those whose teachers are elsewhere; all of these are asked at once."""
        found: list[TopTokens | None] = [None] * len(groups)

        def ask(number: int) -> None:
            teacher = self.teachers[number]
            own = [place for place, group in enumerate(groups) if group.data.teacher == number]
            if isinstance(teacher, Foretelling):
                for place, said in zip(own, teacher.foretell([_plain(groups[one]) for one in own]), strict=True):
                    found[place] = said

        with ThreadPoolExecutor(len(self.teachers)) as pool:
            list(pool.map(ask, range(len(self.teachers))))
        return found

    def answered(self, group: Group, said: TopTokens) -> Group:
        """The group with what its teacher said of it."""
        teacher = self.teachers[group.data.teacher]
        assert isinstance(teacher, Foretelling)
        return replace(group, data=replace(group.data, data=teacher.answered(_plain(group), said).data))


def several_teachers(
    context: Context, name: str, one: Callable[..., tuple[Objective, Teacher, Any]]
) -> tuple[LossOfTeachers, Teachers, list[tuple[Any, int | None]], Choice]:
    """(objective, teachers, the tokenizer and the size of the head of each, which one teaches a row). `one`: (context,
    input, number, how its objective sees the teacher) -> the objective under one teacher, the teacher, its tokenizer.

    Raises StageError or DataError where settings, teachers and rows do not go together.
    """
    choice = _choice(context, name)
    told: list[Foretold] = []

    def seen(teacher: Any) -> Any:
        told.append(Foretold(teacher, whole=context.config.loss_top_k is None))
        return told[-1]

    found = [one(context, f"{name}.{number}", number, seen) for number in range(choice.teachers)]
    objectives, teachers, tokenizers = zip(*found, strict=True)
    known = [(tokenizer, teacher.vocabulary) for tokenizer, teacher in zip(tokenizers, teachers, strict=True)]
    return LossOfTeachers(objectives, told, choice.labels), Teachers(teachers), known, choice


def _choice(context: Context, name: str) -> Choice:
    config: Any = context.config
    number = len(context.inputs_of(name))
    if problems := number_problems(config, number):
        raise StageError("; ".join(problems))
    choice = Choice(config.teacher_column, config.teacher_names, number)
    for dataset in ("dataset", "eval_dataset"):
        if context.has(dataset):
            choice.check(context, dataset)
    return choice
