"""Metrics as sums and counts: added over micro-batches and processes first, divided once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A sum and what to divide it by, both scalars (tensors stay on their device until a step is logged)."""

    sum: Tensor | float
    count: Tensor | float


class Extreme(Mean):
    """The largest (or smallest) of a batch's values, which is a sum of one; of a step it is the extreme of them."""


@dataclass
class MetricSums:
    """Adds up the Means of a step by name, without waiting for the device."""

    known: dict[str, list[float]] = field(default_factory=dict)
    """[sum, count] of what the host knows."""
    computed: dict[str, list[Tensor | None]] = field(default_factory=dict)
    """[sum, count] of what is on the device, in float64."""
    extremes: dict[str, Tensor] = field(default_factory=dict)
    """The largest so far of every Extreme, in float64; of a smallest its negative, by `signs`."""
    signs: Mapping[str, int] = field(default_factory=dict)
    """Names of Extremes: 1 of the largest, -1 of the smallest."""

    def add(self, metrics: Mapping[str, Mean]) -> None:
        """Take in the metrics of one micro-batch."""
        for name, mean in metrics.items():
            if isinstance(mean, Extreme):
                value = torch.as_tensor(mean.sum).detach().double() * self.signs[name]
                self.extremes[name] = torch.maximum(self.extremes.get(name, value), value)
                continue
            known = self.known.setdefault(name, [0.0, 0.0])
            computed = self.computed.setdefault(name, [None, None])
            for place, part in enumerate((mean.sum, mean.count)):
                if isinstance(part, Tensor):
                    before, value = computed[place], part.detach().double()
                    computed[place] = value if before is None else before + value
                else:
                    known[place] += part

    def stacked_extremes(self, rank: int, size: int, device: torch.device) -> Tensor:
        """[names of `signs` x processes] with this process's column filled in: summed over processes, all are there."""
        table = torch.zeros(len(self.signs), size, dtype=torch.float64, device=device)
        for row, name in enumerate(self.signs):
            table[row, rank] = self.extremes.get(name, -torch.inf)
        return table.flatten()

    def stacked(self, names: Sequence[str], device: torch.device) -> Tensor:
        """[2 x names] sums and counts in float64; zeros for what was not measured."""
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        host = [value for name in names for value in self.known.get(name, (0.0, 0.0))]
        parts = [part for name in names for part in self.computed.get(name, (None, None))]
        computed = torch.stack([nothing if part is None else part.to(device) for part in parts])
        return computed + torch.tensor(host, dtype=torch.float64).to(device, non_blocking=True)


def extremes(signs: Mapping[str, int], values: Sequence[float], size: int) -> dict[str, float]:
    """Name -> extreme over all processes, from the values of `stacked_extremes`; those that no process has are left
    out."""
    most = {name: max(values[row * size : (row + 1) * size]) for row, name in enumerate(signs)}
    return {name: signs[name] * value for name, value in most.items() if value > -math.inf}


def pairs(names: Sequence[str], values: Sequence[float]) -> dict[str, tuple[float, float]]:
    """Name -> (sum, count), from the values of `MetricSums.stacked`."""
    return {name: (values[2 * place], values[2 * place + 1]) for place, name in enumerate(names)}
