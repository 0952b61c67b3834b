"""What the loop asks of an objective and of the source of its batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from stages.training.batch import Group, TokenBatch
from stages.training.metrics import Mean


@dataclass(frozen=True)
class Readout:
    """What an objective needs of a forward pass: hidden states at R positions of the flattened rows, made into it."""

    positions_R: Tensor
    read: Callable[[Tensor, nn.Module], Any]
    """(hidden states [R, H], the Scorer) -> the result of the pass."""
    of_routers: Callable[[Sequence[Tensor]], Any] | None = None
    """What is made of the logits of all routers, of every layer's tokens; the pass then gives (its result, this)."""


Forward = Callable[[TokenBatch, Readout], Any]
"""The Scorer behind its distributed wrapper."""


class Objective(Protocol):
    """A loss with its own unit: tokens, pairs or sequences."""

    metric_names: Sequence[str]

    def count(self, group: Group) -> float:
        """Items of the group's share of the loss: the loop divides the summed loss by their sum over the step."""
        ...

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """The loss SUM over the items of the batch, and metrics."""
        ...


@runtime_checkable
class Concluding(Protocol):
    """An objective with metrics that follow from the means of others over the whole step."""

    def concluded(self, means: Mapping[str, float]) -> dict[str, float]:
        """More metrics, from those that the step has. Before any weight changes: what it raises, every process does."""
        ...


@runtime_checkable
class Bounding(Protocol):
    """An objective with metrics that are Extremes of a step's values."""

    extremes: Mapping[str, int]
    """Their names: 1 where it is the largest, -1 where it is the smallest."""


@runtime_checkable
class Remembering(Protocol):
    """An objective that goes by the steps before the present one."""

    def state(self) -> dict[str, Any]:
        """JSON values that a resumed run needs."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Take up a saved state; an empty one at the beginning of a run."""
        ...


@dataclass(frozen=True)
class Window:
    """The groups of one optimizer step, over all processes."""

    groups: Sequence[Group]
    uncounted_items: float = 0.0
    """Items whose gradient is known to be zero: they count in the denominator and are not computed."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What is known of the step before it is computed (rewards, lengths of completions)."""
    num_tokens: int | None = None
    """Tokens seen, where it is not simply the groups' own."""


class Windows(Protocol):
    """The source of an optimizer step's groups: a dataset in shuffled order, or rollouts of the model."""

    total_steps: int

    def window(self, step: int) -> Window:
        """The groups of a step; asked for in order, starting where a resumed run starts."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON values that a resumed run needs; empty where everything follows from the step."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs, the same on every process."""
        ...

    def load(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take up a saved state."""
        ...


@runtime_checkable
class Completing(Protocol):
    """Windows that add to groups what their loss must know; rows that are measured beside the training need it too."""

    def held_out(self, groups: Sequence[Group]) -> Sequence[Group]:
        """Groups of no step, with what is added to them together, under the weights as they are. Collective."""
        ...


class WindowsAround:
    """Windows that make something of what others give; what is saved is the others'."""

    def __init__(self, windows: Windows) -> None:
        self.windows, self.total_steps = windows, windows.total_steps

    def window(self, step: int) -> Window:
        """The groups of a step."""
        return self.windows.window(step)

    def state(self) -> dict[str, Any]:
        """That of the windows inside."""
        return self.windows.state()

    def tensors(self) -> dict[str, Tensor]:
        """Those of the windows inside."""
        return self.windows.tensors()

    def load(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Into the windows inside."""
        self.windows.load(state, tensors)
