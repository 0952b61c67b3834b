"""The objective of distillation: a divergence between student and teacher at every completion token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.losses.distillation import Divergence
from stages.losses.linear_divergence import linear_divergence
from stages.training.batch import Group, TokenBatch
from stages.training.language_modeling import asked_tokens
from stages.training.metrics import Mean
from stages.training.model import Scorer
from stages.training.objective import Forward, Readout


class DistillationLoss:
    """Sum over asked-for tokens of the divergence of the two next-token distributions."""

    metric_names: Sequence[str] = ("divergence",)

    def __init__(self, teacher: Scorer, divergence: Divergence, temperature: float) -> None:
        self.teacher, self.divergence, self.temperature = teacher, divergence, temperature

    def count(self, group: Group) -> float:
        """Asked-for tokens."""
        return asked_tokens(group)

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(summed divergence, its mean)."""
        with torch.no_grad():
            teacher_NH: Tensor = self.teacher(batch, _asked_hidden(batch))
        loss, divergences_N = forward(batch, self._readout(batch, teacher_NH))
        return loss, {"divergence": Mean(divergences_N.sum(), len(divergences_N))}

    def _readout(self, batch: TokenBatch, teacher_NH: Tensor) -> Readout:
        def read(hidden_NH: Tensor, student: nn.Module) -> tuple[Tensor, Tensor]:
            assert isinstance(student, Scorer)
            heads = student.head(self.temperature), self.teacher.head(self.temperature)
            return linear_divergence(hidden_NH, heads[0], teacher_NH, heads[1], self.divergence)

        return Readout(batch.source_N, read)


def _asked_hidden(batch: TokenBatch) -> Readout:
    return Readout(batch.source_N, lambda hidden_NH, _: hidden_NH)
