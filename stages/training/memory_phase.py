"""What a stage's process holds at once in a phase of its work, part by part, and which phase decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stages.training.memory_allocator import Device
from stages.training.memory_training import Setup

PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "head",
    "reference",
    "averages",
    "sampler",
    "engine",
    "checkpoint",
    "process",
)
"""What memory is for. `weights`: with float32 masters and gathered shards; `reference`: reference, teacher and
reward models; `averages`: what weight_averaging keeps where it trains; `engine`: vLLM, in the process or as the stage's
servers; `checkpoint`: what is gathered of slices to be written; `process`: Python and its libraries."""

PROCESS_BYTES: Mapping[Device, int] = {"cpu": 500_000_000, "cuda": 600_000_000}
"""Resident in a stage's process before it loads a model (CPU), or taken on the GPU by CUDA's context."""


@dataclass(frozen=True)
class Phase:
    """What is held at once at the worst moment of a part of a stage; only parts that are not zero."""

    name: str
    parts: Mapping[str, float]
    room: float | None = None
    """What it may have, where that is not what a process may: vLLM's share of a GPU, or its cache."""

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts.values())

    def with_parts(self, changed: Mapping[str, float]) -> Phase:
        """With these parts in the place of its own; parts in their order."""
        known = {**self.parts, **changed}
        return replace(self, parts={part: float(known[part]) for part in PARTS if known.get(part)})

    def filling(self, limit: float) -> float:
        """Share of its room that it takes, or of the `limit` of a process; it fits up to 1."""
        return self.total / (limit if self.room is None else self.room)


def phase(name: str, parts: Mapping[str, float], setup: Setup) -> Phase:
    """With what the process itself holds; parts in their order."""
    return Phase(name, {}).with_parts({**parts, "process": PROCESS_BYTES[setup.device]})


def worst(phases: Sequence[Phase], limit: float) -> Phase:
    """The phase that decides where a process may have so much: the one that is furthest past its room, or the largest
    of the process where all fit."""
    over = [one for one in phases if one.filling(limit) > 1]
    largest = max((one for one in phases if one.room is None), key=lambda one: one.total)
    return max(over, key=lambda one: one.filling(limit), default=largest)
