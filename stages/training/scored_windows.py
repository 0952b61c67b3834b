"""Windows whose groups get something that is measured when their step comes: under present or moving weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stages.training.batch import Group
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.objective import Window, Windows, WindowsAround
from stages.training.out_of_memory import TokenBudget
from stages.training.reference import branch_logprobs


class ScoredWindows(WindowsAround):
    """The windows of a dataset, with something added to every group."""

    def __init__(self, windows: Windows, trainer: Trainer) -> None:
        super().__init__(windows)
        self.trainer = trainer
        self.budget = TokenBudget(trainer.context, trainer.config.micro_batch_tokens)

    def window(self, step: int) -> Window:
        """The groups of a step, with what is added as their data."""
        window = self.windows.window(step)
        return replace(window, groups=_with(window.groups, self.data(step, window.groups)))

    def data(self, step: int, groups: Sequence[Group]) -> Sequence[object]:
        """What is added to the groups of a step."""
        self.before(step, groups)
        return self.present(groups)

    def before(self, step: int, groups: Sequence[Group]) -> None:
        """What changes because a step comes; mostly nothing."""

    def present(self, groups: Sequence[Group]) -> Sequence[object]:
        """What is added to groups, under the weights as they are. Changes nothing."""
        raise NotImplementedError

    def held_out(self, groups: Sequence[Group]) -> Sequence[Group]:
        """See `Completing`; by the windows inside first."""
        if isinstance(self.windows, ScoredWindows):
            groups = self.windows.held_out(groups)
        return _with(groups, self.present(groups))

    def measured(
        self, scorer: Scorer, groups: Sequence[Group], measure: Callable[[Sequence[list[float]]], list[float]]
    ) -> Tensor:
        """[B, branches] float64 on every process: what `measure` makes of a group's log-probabilities, branch by
        branch. Each process computes its share. Collective."""
        if not groups:
            return torch.zeros(0, 0, dtype=torch.float64)
        processes, branches = self.trainer.processes, len(groups[0].branches)
        mine = range(processes.rank, len(groups), processes.size)
        values_BK = torch.zeros(len(groups), branches, dtype=torch.float64)
        scored = branch_logprobs(scorer, [groups[index] for index in mine], self.budget)
        for index, found in zip(mine, scored, strict=True):
            values_BK[index] = torch.tensor(measure([values for values, _ in found]), dtype=torch.float64)
        return processes.sum(values_BK.to(processes.device)).cpu()


def _with(groups: Sequence[Group], data: Sequence[object]) -> list[Group]:
    return [replace(group, data=one) for group, one in zip(groups, data, strict=True)]
