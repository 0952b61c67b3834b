"""Processes that share one engine, whose weights are split over them: what each asks for is computed by all together.

Each of them runs the engine's scheduler for itself, so all have to give it the same requests in the same order, and
to call it equally often: who has nothing to ask asks for nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch.distributed as dist

from artifacts.errors import StageError

Question = TypeVar("Question")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class EngineGroup:
    """Consecutive processes with one engine."""

    size: int
    """How many they are."""
    group: Any = None
    """Of torch.distributed; None: the process is alone."""

    @classmethod
    def of(cls, size: int) -> Self:
        """Those of this process, `size` of them. All processes that train call it, a multiple of `size`."""
        if size == 1:
            return cls(size)
        group, _ = dist.new_subgroups(size, backend="gloo")
        return cls(size, group)

    def together(
        self,
        questions: Sequence[Question],
        compute: Callable[[list[Question]], Sequence[Answer]],
        *,
        digest: Callable[[Answer], Any],
    ) -> list[Answer]:
        """Answers to this process's questions, from those that `compute` gives to all processes'.

        `digest`: what has to be equal everywhere. Raises StageError where processes found different answers.
        """
        if self.size == 1:
            return list(compute(list(questions))) if questions else []
        asked = self._gathered(list(questions))
        everything = [question for one in asked for question in one]
        if not everything:
            return []
        answers = compute(everything)
        text = repr([digest(answer) for answer in answers])
        if len(set(self._gathered(hashlib.sha256(text.encode()).hexdigest()))) > 1:
            raise StageError(
                "the processes that share vLLM drew different tokens from the same requests: sums that all of them "
                "should have are not the same; set rollouts.tensor_parallel_size: 1, an engine in each"
            )
        start = sum(map(len, asked[: dist.get_rank(self.group)]))
        return list(answers[start : start + len(questions)])

    def _gathered(self, mine: Any) -> list[Any]:
        """Of every process of the group, in order."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        return found
