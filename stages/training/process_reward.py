"""The objective of process reward models: a judgement after every step. The unit is a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from stages.data.steps import TokenizedSteps
from stages.losses.host_numbers import on_device
from stages.losses.reward import step_cross_entropy
from stages.training.batch import Branch, Group, TokenBatch
from stages.training.metrics import Mean
from stages.training.model import Scorer
from stages.training.objective import Forward, Readout


@dataclass(frozen=True)
class StepLabels:
    """Where the steps of a row end, counted in its tokens, and whether each is right."""

    ends: Sequence[int]
    labels: Sequence[bool]


def step_group(row: TokenizedSteps) -> Group:
    """One sequence whose tokens are only read."""
    branch = Branch(row.token_ids, [False] * len(row.token_ids))
    return Group(row.row_id, (), (branch,), StepLabels(row.ends, row.labels))


class StepLoss:
    """Cross-entropy of the labels at the ends of steps; the groups carry `StepLabels`."""

    metric_names: Sequence[str] = ("accuracy",)

    def count(self, group: Group) -> float:
        """Steps."""
        return len(group.data.ends)

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(sum over the steps, TRL's metric)."""
        logits_S2: Tensor = forward(batch, step_logits(batch))
        labels_S = on_device([label for group in batch.groups for label in group.data.labels], logits_S2.device)
        losses_S = step_cross_entropy(logits_S2, labels_S)
        right_S = (logits_S2.detach().argmax(-1) == labels_S.long()).sum()
        return losses_S.sum(), {"accuracy": Mean(right_S, len(labels_S))}


def step_logits(batch: TokenBatch) -> Readout:
    """A readout: [S, 2] logits (wrong, right) at the ends of all steps of the batch."""
    starts = batch.row_starts()
    places = [start + end for start, group in zip(starts, batch.groups, strict=True) for end in group.data.ends]

    def read(hidden_SH: Tensor, scorer: nn.Module) -> Tensor:
        assert isinstance(scorer, Scorer)
        logits_S2: Tensor = scorer.transformers_model.score(hidden_SH)
        return logits_S2.float()

    return Readout(on_device(places, batch.source_N.device), read)
