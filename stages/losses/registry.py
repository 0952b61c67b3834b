"""Losses by name, with what a recipe must know of them before anything heavy is imported."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

LossFunction = TypeVar("LossFunction", bound=Callable[..., Any])
Result = TypeVar("Result")


@dataclass(frozen=True)
class Loss:
    """A loss function `f(values, *, parameters)` -> one loss a row, and where it comes from."""

    name: str
    """`loss_type`: the function's name."""
    function: Callable[..., Tensor]
    title: str
    """What the field calls it."""
    paper: str
    """An arXiv number, or author and year."""
    reference: bool
    """Compares with a reference model."""
    f_divergence: bool = False
    """Reads log-ratios only as `scores`, so that any f-divergence can stand in for the reverse KL divergence."""
    gold: bool = False
    """Needs the third completion of triple preferences."""
    couples_rows: bool = False
    """The loss of a row depends on the other rows of the optimizer step."""
    needs: tuple[str, ...] = ()
    """Parameters that must not be 0."""
    reward: Callable[..., tuple[Tensor, Tensor]] | None = None
    """What its implicit reward is beta times of: `f(values, *, parameters)`; None: the log-ratios."""
    metrics: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    """What it is made of, to be logged: functions of the values alone."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Its keywords: fields of the stage's Config."""
        return _keywords(self.function)

    def with_settings(self, settings: Mapping[str, float]) -> Callable[..., Tensor]:
        """The function of the values alone."""
        return _of_values(self.function, settings)

    def metrics_with(self, settings: Mapping[str, float]) -> dict[str, Callable[..., Tensor]]:
        """The same of its `metrics`."""
        return {name: _of_values(metric, settings) for name, metric in self.metrics.items()}

    def reward_with(self, settings: Mapping[str, float]) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """The same of its `reward`."""
        return None if self.reward is None else _of_values(self.reward, settings)


def _keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    kinds = inspect.signature(function).parameters.values()
    return tuple(one.name for one in kinds if one.kind is inspect.Parameter.KEYWORD_ONLY)


def _of_values(function: Callable[..., Result], settings: Mapping[str, float]) -> Callable[..., Result]:
    """The function with those of the settings that it takes."""
    return partial(function, **{name: settings[name] for name in _keywords(function) if name in settings})


class Losses(dict[str, Loss]):
    """A table that functions enter by decoration."""

    def add(
        self, title: str, paper: str, *, reference: bool = True, **about: Any
    ) -> Callable[[LossFunction], LossFunction]:
        """Enter the function under its own name; it stays what it is."""

        def enter(function: LossFunction) -> LossFunction:
            name = function.__name__
            self[name] = Loss(name, function, title, paper, reference, **about)
            return function

        return enter
