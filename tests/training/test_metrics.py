"""Metrics of several micro-batches and processes, by hand."""

from __future__ import annotations

import torch

from stages.training.metrics import Extreme, Mean, MetricSums, extremes, pairs

CPU = torch.device("cpu")
SIGNS = {"most": 1, "least": -1, "nowhere": 1}


def sums(*batches: dict[str, Mean]) -> MetricSums:
    """Of a process with these micro-batches."""
    found = MetricSums(signs=SIGNS)
    for batch in batches:
        found.add(batch)
    return found


def test_means_divide_once() -> None:
    one = sums({"loss": Mean(torch.tensor(2.0), 3)}, {"loss": Mean(torch.tensor(4.0), 1)})
    other = sums({"loss": Mean(6.0, torch.tensor(2.0))})
    together = one.stacked(["loss", "kl"], CPU) + other.stacked(["loss", "kl"], CPU)
    assert pairs(["loss", "kl"], together.tolist()) == {"loss": (12.0, 6.0), "kl": (0.0, 0.0)}


def test_extremes_are_those_of_all_processes() -> None:
    """Also where all values are negative, and where a process has none."""
    first = sums({"most": Extreme(torch.tensor(-5.0), 1), "least": Extreme(torch.tensor(-1.0), 1)})
    second = sums({"most": Extreme(torch.tensor(-3.0), 1)}, {"most": Extreme(-4.0, 1), "least": Extreme(2.0, 1)})
    third = sums()
    together = sum(one.stacked_extremes(rank, 3, CPU) for rank, one in enumerate((first, second, third)))
    assert extremes(SIGNS, together.tolist(), 3) == {"most": -3.0, "least": -1.0}
