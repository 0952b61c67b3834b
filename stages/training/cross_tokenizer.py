"""The objective of distillation from a teacher with another tokenizer; its unit is a group of tokens that end at the
same byte in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from stages.losses.group_loss import MERGES, GroupLoss, GroupTokens, Matching, hybrid_parts, sorted_distance
from stages.losses.host_numbers import on_device
from stages.losses.linear_group_loss import linear_group_loss
from stages.training.batch import Group, TokenBatch
from stages.training.cross_settings import CrossTokenizer
from stages.training.distillation import asked_hidden, runs_of
from stages.training.loop import Trainer
from stages.training.metrics import Mean
from stages.training.model import Scorer
from stages.training.objective import Forward, Readout

LossOf = Callable[[tuple[int, int], torch.device], GroupLoss]
"""(tokens of the student's and of the teacher's head, where they are) -> the loss."""


@dataclass(frozen=True)
class Counterpart:
    """What a group's data is: the same text as the teacher reads it. The tokens that are asked for, here and in the
    student's group, are those that both have in groups with equal ends."""

    teacher: Group
    sizes: tuple[tuple[int, int], ...]
    """(student's tokens, teacher's tokens) of each such group, in order."""
    completion_tokens: int
    """The student's, whether they are in such a group or not."""
    given: bool
    """Whether the completion comes from the dataset."""


class ReadingTeacher:
    """A model beside the student that reads texts by its own tokenizer."""

    vocabulary = None

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def join(self, trainer: Trainer) -> None:
        """On the trainer's device."""
        self.scorer.to(trainer.accelerator.device)

    def taught(self, dataset: str, groups: list[Group]) -> list[Group]:
        """They have what it reads."""
        return groups

    @torch.no_grad()
    def read(self, groups: Sequence[Group], tokens: int) -> tuple[Tensor, Tensor]:
        """(hidden states [M, H] where the groups' asked-for tokens are predicted, these tokens [M]), in passes of at
        most so many tokens."""
        groups = [group for group in groups if any(group.branches[0].loss_mask or ())]
        batches = [self.scorer.layout(run) for run in runs_of(groups, tokens)] if groups else []
        hidden = [self.scorer(batch, asked_hidden(batch)) for batch in batches]
        weight_VH = self.scorer.head().weight_VH
        return (
            torch.cat([weight_VH.new_empty(0, weight_VH.shape[1]), *hidden]),
            torch.cat([torch.empty(0, dtype=torch.long, device=weight_VH.device), *(one.target_N for one in batches)]),
        )


class CrossTokenizerLoss:
    """Sum over groups of tokens of what a GroupLoss says of them."""

    def __init__(
        self, teacher: ReadingTeacher, loss_of: LossOf, parts: Sequence[str], temperatures: tuple[float, float]
    ) -> None:
        """`parts`: names of the loss's parts as metrics, none where it has but one. `temperatures`: of the student and
        of the teacher."""
        self.teacher, self.parts, self.temperatures = teacher, parts, temperatures
        self._loss_of = loss_of
        self._loss: GroupLoss | None = None
        self.metric_names: Sequence[str] = ("divergence", *parts, "crossentropy", "aligned_tokens")

    def count(self, group: Group) -> float:
        """Groups of tokens."""
        return len(group.data.sizes)

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(summed loss, the mean divergence with its parts, the cross-entropy of given completions where it counts, the
        share of the student's tokens that are in groups)."""
        known: list[Counterpart] = [group.data for group in batch.groups]
        sizes = [pair for one in known for pair in one.sizes]
        teacher_MH, targets_M = self.teacher.read([one.teacher for one in known], batch.num_tokens)
        student = GroupTokens(batch.target_N, [own for own, _ in sizes])
        teacher = GroupTokens(targets_M, [other for _, other in sizes])
        given = list(chain.from_iterable([one.given] * len(one.sizes) for one in known))

        def read(hidden_NH: Tensor, scorer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
            assert isinstance(scorer, Scorer)
            head, taught = scorer.head(self.temperatures[0]), self.teacher.scorer.head(self.temperatures[1])
            loss = self.loss((head.vocabulary, taught.vocabulary), hidden_NH.device)
            return linear_group_loss(
                (hidden_NH, head), student, (teacher_MH, taught), teacher, loss, crossentropy=given
            )

        total, sums_G2, parts_GK = forward(batch, Readout(batch.source_N, read))
        metrics = {"divergence": Mean(sums_G2[:, 0].sum(), len(sizes))}
        metrics |= {name: Mean(parts_GK[:, place].sum(), len(sizes)) for place, name in enumerate(self.parts)}
        assert self._loss is not None
        if self._loss.crossentropy_weight:
            counted = on_device([group for group, one in enumerate(given) if one], sums_G2.device, torch.long)
            metrics["crossentropy"] = Mean(sums_G2[:, 1].index_select(0, counted).sum(), len(counted))
        tokens = sum(one.completion_tokens for one in known)
        metrics["aligned_tokens"] = Mean(float(sum(student.sizes)), tokens)
        return total, metrics

    def loss(self, vocabularies: tuple[int, int], device: torch.device) -> GroupLoss:
        """For heads of these sizes; made once."""
        if self._loss is None:
            self._loss = self._loss_of(vocabularies, device)
        return self._loss


def cross_loss(
    teacher: ReadingTeacher,
    cross: CrossTokenizer,
    pairs: Callable[[], Sequence[tuple[int, int]]],
    *,
    beta: float,
    temperature: float,
) -> CrossTokenizerLoss:
    """The objective that the settings name. `pairs`: tokens that are the same in student and teacher."""
    temperatures = cross.student_temperature or temperature, cross.teacher_temperature or temperature
    make, parts = _LOSSES[cross.loss_type]
    return CrossTokenizerLoss(teacher, partial(make, cross, pairs, beta), parts, temperatures)


def _by_rank(
    cross: CrossTokenizer,
    pairs: Callable[[], Sequence[tuple[int, int]]],
    beta: float,
    vocabularies: tuple[int, int],
    device: torch.device,
) -> GroupLoss:
    def parts(student_GV: Tensor, teacher_GU: Tensor) -> Tensor:
        return sorted_distance(student_GV, teacher_GU)[:, None]

    return GroupLoss(MERGES[cross.token_merge_strategy], parts, (1.0,), cross.crossentropy_weight)


def _hybrid(
    cross: CrossTokenizer,
    pairs: Callable[[], Sequence[tuple[int, int]]],
    beta: float,
    vocabularies: tuple[int, int],
    device: torch.device,
) -> GroupLoss:
    kept = [pair for pair in pairs() if pair[0] < vocabularies[0] and pair[1] < vocabularies[1]]
    student_M, teacher_M = on_device(kept, device, torch.long).reshape(-1, 2).unbind(1)
    matching = Matching.of(student_M, teacher_M, vocabularies)
    share = len(kept) / vocabularies[1]
    weights = (
        share if cross.matched_weight is None else cross.matched_weight,
        1 - share if cross.unmatched_weight is None else cross.unmatched_weight,
    )
    parts = partial(hybrid_parts, matching=matching, beta=beta)
    return GroupLoss(MERGES[cross.token_merge_strategy], parts, weights, cross.crossentropy_weight)


_LOSSES: dict[str, tuple[Callable[..., GroupLoss], tuple[str, ...]]] = {
    "uld": (_by_rank, ()),
    "hybrid": (_hybrid, ("matched_loss", "unmatched_loss")),
}
"""Loss -> (how it is made, what its parts are called where it has several)."""
