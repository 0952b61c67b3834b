"""What the host learns of a step, before any weight changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stages.training.metrics import MetricSums, extremes, pairs

if TYPE_CHECKING:
    from stages.training.loop import Trainer


def measure(trainer: Trainer, sums: MetricSums) -> tuple[dict[str, tuple[float, float]], dict[str, float], float]:
    """(sum and count of every metric over all processes, what is no mean: extremes and the routers' load, gradient
    norm), in one transfer. Collective."""
    names, balance = ["loss", "num_tokens", *trainer.metric_names], trainer.balance
    device = trainer.processes.device
    norm = trainer.parallel.gradient_norm().double().reshape(1)
    wishes = torch.tensor(trainer.saver.wishes(), dtype=torch.float64).to(device, non_blocking=True)
    rank, size = trainer.processes.rank, trainer.processes.size
    bounds = sums.stacked_extremes(rank, size, device)
    loads = [] if balance is None else [balance.loads(sums, device)]
    summed = trainer.processes.sum(torch.cat([sums.stacked(names, device), bounds, *loads, wishes]))
    values: list[float] = torch.cat([summed, norm]).tolist()
    *values, due, busy, grad_norm = values
    trainer.saver.agreed = (due, busy)
    others = values[2 * len(names) :]
    found = extremes(sums.signs, others, size)
    if balance is not None:
        found |= balance.max_load(others[len(bounds) :])
    return pairs(names, values), found, grad_norm
