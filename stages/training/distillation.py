"""The objective of distillation: a divergence between student and teacher at every completion token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from stages.losses.distillation import Divergence
from stages.losses.head import Head
from stages.losses.linear_divergence import linear_divergence
from stages.training.batch import Group, TokenBatch
from stages.training.language_modeling import asked_tokens
from stages.training.metrics import Mean
from stages.training.model import Scorer
from stages.training.objective import Forward, Readout


class WholeTeacher(Protocol):
    """What a teacher says of every token of the vocabulary."""

    def hidden(self, batch: TokenBatch) -> Tensor:
        """[N, H] where the batch's asked-for tokens are predicted, in their order."""
        ...

    def head(self) -> Head:
        """What makes logits of them, the temperature among it."""
        ...


class DistillationLoss:
    """Sum over asked-for tokens of the divergence of the two next-token distributions.

    A group's data, if any, is the prompt that the teacher sees in place of the group's own: with it, a teacher that is
    the student as it was teaches what it makes of that (SDFT, self-distillation with privileged context,
    arXiv:2601.19897). The divergence is over the whole vocabulary, of which `linear_divergence` never holds all logits;
    what a teacher elsewhere can send is `TopDistillationLoss`'s. Models of one tokenizer may have filled their
    vocabularies up to different sizes; the tokens behind the smaller one are none, and left out.
    """

    metric_names: Sequence[str] = ("divergence",)

    def __init__(self, teacher: WholeTeacher, divergence: Divergence, temperature: float) -> None:
        """`temperature` divides the student's logits; the teacher has it already."""
        self.teacher, self.divergence, self.temperature = teacher, divergence, temperature

    def count(self, group: Group) -> float:
        """Asked-for tokens."""
        return asked_tokens(group)

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(summed divergence, its mean)."""
        teacher_NH = self.teacher.hidden(batch)
        loss, divergences_N = forward(batch, self._readout(batch, teacher_NH))
        return loss, {"divergence": Mean(divergences_N.sum(), len(divergences_N))}

    def _readout(self, batch: TokenBatch, teacher_NH: Tensor) -> Readout:
        def read(hidden_NH: Tensor, student: nn.Module) -> tuple[Tensor, Tensor]:
            assert isinstance(student, Scorer)
            head, taught = student.head(self.temperature), self.teacher.head()
            common = min(head.vocabulary, taught.vocabulary)
            return linear_divergence(hidden_NH, head.first(common), teacher_NH, taught.first(common), self.divergence)

        return Readout(batch.source_N, read)


@torch.no_grad()
def teacher_hidden(teacher: Scorer, batch: TokenBatch) -> Tensor:
    """[N, H] a teacher's hidden states where the batch's asked-for tokens are predicted, in the same order."""
    batches = [batch]
    if any(group.data is not None for group in batch.groups):
        seen = [replace(group, prefix_ids=group.data) for group in batch.groups]
        batches = [teacher.layout(run) for run in runs_of(seen, batch.num_tokens)]
    hidden_NH = torch.cat([teacher(one, asked_hidden(one)) for one in batches])
    assert len(hidden_NH) == len(batch.source_N), "teacher and student have read different tokens"
    return hidden_NH


def asked_hidden(batch: TokenBatch) -> Readout:
    """The hidden states where the batch's asked-for tokens are predicted."""
    return Readout(batch.source_N, lambda hidden_NH, _: hidden_NH)


def runs_of(groups: Sequence[Group], tokens: int) -> Iterator[list[Group]]:
    """The groups in order, as many at a time as have at most so many tokens; a longer one stands alone."""
    run: list[Group] = []
    for group in groups:
        if run and sum(one.length for one in run) + group.length > tokens:
            yield run
            run = []
        run.append(group)
    yield run
