"""The micro-batches of a window: their losses and metrics summed, and their gradients accumulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.seeds import derive
from stages.training.batch import Branch, Group, TokenBatch
from stages.training.metrics import Mean, MetricSums
from stages.training.objective import Bounding, Readout
from stages.training.router_balance import AUX_LOSS
from stages.training.turns import Turn, turns_of

if TYPE_CHECKING:
    from stages.training.loop import Trainer


def backward(trainer: Trainer, step: int, groups: Sequence[Group], items: float, budget_tokens: int) -> MetricSums:
    """Accumulate the gradient of summed loss / items over this process's share; sums of its loss and metrics."""
    turns, parallel = _turns(trainer, groups, budget_tokens), trainer.parallel
    sums, sequences = _no_sums(trainer), sum(len(group.branches) for group in groups)
    for turn in turns:
        torch.manual_seed(derive(trainer.config.seed, "dropout", step, turn.index))
        with trainer.budget.micro_batch(turn.groups):
            batch = trainer.scorer.layout(turn.groups)
            loss, metrics, balance = losses(trainer, batch)
            share = loss * (turn.weight / items)
            if balance is not None:
                share = share + balance * (turn.weight / sequences)
            parallel.backward(share, last=turn is turns[-1])
        if turn.weight:
            sums.add({**metrics, "loss": Mean(loss, 0), "num_tokens": Mean(batch.num_tokens, 0)})
    if not turns and parallel.lockstep:
        _empty_pass(trainer)
    return sums


def passes(trainer: Trainer, groups: Sequence[Group], budget_tokens: int) -> MetricSums:
    """Sums of the loss and metrics of this process's share, of a model in evaluation, without a gradient."""
    sums = _no_sums(trainer)
    for turn in _turns(trainer, groups, budget_tokens):
        with trainer.budget.micro_batch(turn.groups):
            loss, metrics, _ = losses(trainer, trainer.scorer.layout(turn.groups))
        if turn.weight:
            sums.add({**metrics, "loss": Mean(loss, 0)})
    return sums


def losses(trainer: Trainer, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean], Tensor | None]:
    """(the objective's summed loss, metrics, the summed loss of the model's routers, where it is added)."""
    if trainer.balance is None:
        return *trainer.objective(trainer.parallel.forward, batch), None
    return trainer.balance.beside(trainer.objective, trainer.parallel.forward, batch)


def balance_loss(trainer: Trainer, totals: Mapping[str, tuple[float, float]]) -> float:
    """What the routers add to the loss of a step, from (sum, count) of every metric."""
    total, count = totals.get(AUX_LOSS, (0.0, 0.0))
    return trainer.balance.coefficient * total / count if trainer.balance is not None and count else 0.0


def _turns(trainer: Trainer, groups: Sequence[Group], budget_tokens: int) -> list[Turn]:
    return turns_of(
        groups,
        budget_tokens,
        trainer.processes,
        shared=trainer.scorer.share_prefixes,
        lockstep=trainer.parallel.lockstep,
    )


def _no_sums(trainer: Trainer) -> MetricSums:
    objective = trainer.objective
    return MetricSums(signs=objective.extremes if isinstance(objective, Bounding) else {})


def _empty_pass(trainer: Trainer) -> None:
    """A gradient of zero where no group has one: collective ways reduce what a backward pass leaves."""
    batch = trainer.scorer.layout([Group("nothing", (0,), (Branch((0,)),))])
    hidden = trainer.parallel.forward(batch, Readout(batch.source_N, lambda hidden_NH, _: hidden_NH))
    trainer.parallel.backward(hidden.sum() * 0.0, last=True)
