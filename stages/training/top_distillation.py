"""The objective of distillation from a teacher's likeliest tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from stages.losses.distillation import Divergence
from stages.losses.top_divergence import TopTokens, linear_top_divergence
from stages.training.batch import Group, TokenBatch
from stages.training.language_modeling import asked_tokens
from stages.training.metrics import Mean
from stages.training.model import Scorer
from stages.training.objective import Forward, Readout

Teaching = Callable[[TokenBatch], TopTokens]
"""What a teacher says of a batch's asked-for tokens, in their order."""


class TopDistillationLoss:
    """Sum over asked-for tokens of the divergence of student and teacher, over the teacher's likeliest tokens one by
    one and all others together. A group's data is what the teacher sees in place of the prompt, as in
    `DistillationLoss`."""

    metric_names: Sequence[str] = ("divergence", "teacher/rest_probability")

    def __init__(self, teaching: Teaching, divergence: Divergence, temperature: float) -> None:
        """`temperature` divides the student's logits; the teacher has it already."""
        self.teaching, self.divergence, self.temperature = teaching, divergence, temperature

    def count(self, group: Group) -> float:
        """Asked-for tokens."""
        return asked_tokens(group)

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(summed divergence, its mean and the mean probability of the tokens that count together)."""
        teacher = self.teaching(batch)

        def read(hidden_NH: Tensor, student: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
            assert isinstance(student, Scorer)
            head = student.head(self.temperature)
            loss, divergences_N = linear_top_divergence(hidden_NH, head, teacher, self.divergence)
            return loss, divergences_N, teacher.rest_N(head.vocabulary)

        loss, divergences_N, rest_N = forward(batch, Readout(batch.source_N, read))
        count = len(divergences_N)
        return loss, {
            "divergence": Mean(divergences_N.sum(), count),
            "teacher/rest_probability": Mean(rest_N.sum(), count),
        }
