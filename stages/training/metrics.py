"""Metrics as sums and counts: added over micro-batches and processes first, divided once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A sum and what to divide it by, both scalars (tensors stay on their device until a step is logged)."""

    sum: Tensor | float
    count: Tensor | float


@dataclass
class MetricSums:
    """Adds up the Means of a step by name."""

    sums: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Mean]) -> None:
        """Take in the metrics of one micro-batch."""
        for name, mean in metrics.items():
            pair = torch.stack([torch.as_tensor(part).detach().double().cpu() for part in (mean.sum, mean.count)])
            self.sums.setdefault(name, []).append(pair)

    def reduce(self, names: list[str], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Name -> mean over micro-batches and processes. Every process passes the same names."""
        zero = torch.zeros(2, dtype=torch.float64)
        totals = torch.stack([torch.stack(self.sums.get(name, [zero])).sum(0) for name in names])
        totals = reduce(totals)
        return {name: float(total / count) for name, (total, count) in zip(names, totals, strict=True) if count != 0}
