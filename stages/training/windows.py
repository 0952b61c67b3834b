"""Windows over a fixed dataset: everything follows from the step's number and the seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from stages.training.batch import Group
from stages.training.config import TrainingConfig
from stages.training.objective import Window
from stages.training.planner import RowOrder


def row_order(num_rows: int, config: TrainingConfig) -> RowOrder:
    """The order of rows that the shared settings ask for."""
    return RowOrder(num_rows, config.train_batch_size, config.seed, config.num_train_epochs, config.max_steps)


class DatasetWindows:
    """Optimizer steps over groups in an order that is shuffled anew for every epoch."""

    def __init__(
        self, groups: Sequence[Group], config: TrainingConfig, packs: Sequence[Sequence[int]] | None = None
    ) -> None:
        """`packs`: indices of groups that are one item of the batch; None: each is one."""
        self.packs = [[index] for index in range(len(groups))] if packs is None else packs
        self.groups = groups
        self.order = row_order(len(self.packs), config)
        self.total_steps = self.order.total_steps

    def window(self, step: int) -> Window:
        """The groups of a step."""
        groups = [self.groups[row] for pack in self.order.rows(step) for row in self.packs[pack]]
        return Window(groups, metrics={"epoch": self.order.epoch_after(step)})

    def state(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Nothing to save."""
        return {}

    def load(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Nothing to take up."""
