"""Who computes which micro-batches of some groups, over all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.training.batch import Group, plan_micro_batches
from stages.training.planner import share_of_rank
from stages.training.processes import Processes


@dataclass(frozen=True)
class Turn:
    """One micro-batch of this process."""

    index: int
    """Among those of all processes."""
    groups: list[Group]
    weight: float
    """1; 0 of one that another process has as well, and that only keeps a collective pass company."""


def turns_of(
    groups: Sequence[Group], budget_tokens: int, processes: Processes, *, shared: bool, lockstep: bool
) -> list[Turn]:
    """The micro-batches of this process, each of at most `budget_tokens` tokens.

    `shared`: rows are packed, prompts shared. `lockstep`: a pass is collective, so a process without a micro-batch
    takes part with the cheapest one. None at all where there is no group.
    """
    rank, world = processes.rank, processes.size
    plan = plan_micro_batches(groups, budget_tokens, shared, least=world)
    costs = [sum(groups[i].length for i in batch) for batch in plan]
    mine = share_of_rank(costs, rank, world)
    turns = [Turn(index, [groups[i] for i in plan[index]], 1.0) for index in mine]
    if lockstep and len(mine) < -(-len(plan) // world):
        cheapest = costs.index(min(costs))
        turns.append(Turn(cheapest, [groups[i] for i in plan[cheapest]], 0.0))
    return turns
