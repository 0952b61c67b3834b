"""Windows over a fixed dataset: everything follows from the step's number and the seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.training.batch import Group
from stages.training.config import TrainingConfig
from stages.training.objective import Window
from stages.training.planner import rows_of_step, steps_in


class DatasetWindows:
    """Optimizer steps over groups in an order that is shuffled anew for every epoch."""

    def __init__(self, groups: Sequence[Group], config: TrainingConfig) -> None:
        self.groups = groups
        self.batch_size = config.train_batch_size
        self.seed = config.seed
        self.total_steps = steps_in(len(groups), self.batch_size, config.num_train_epochs, config.max_steps)

    def window(self, step: int) -> Window:
        """The groups of a step."""
        rows = rows_of_step(step, len(self.groups), self.batch_size, self.seed)
        steps_per_epoch = -(-len(self.groups) // self.batch_size)
        return Window([self.groups[row] for row in rows], metrics={"epoch": (step + 1) / steps_per_epoch})

    def state(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""
