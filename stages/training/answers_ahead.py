"""What teachers elsewhere say of completions, asked for as soon as these are there: while the trainer is busy with
earlier ones, and while the student's servers sample later ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from stages.data.ledger import RowLedger
from stages.losses.top_divergence import TopTokens
from stages.training.batch import Group
from stages.training.job_queue import JobQueue
from stages.training.rollout_drawing import Draws
from stages.training.rollout_records import Sampled

_OF_ANSWERS = "answers"


@dataclass(frozen=True)
class Answered:
    """A group's data with what its teacher said of the group's asked-for tokens."""

    data: Any
    said: TopTokens


@runtime_checkable
class Foretelling(Protocol):
    """A teacher that may be asked before the batch comes, by another thread than the trainer's."""

    def foretell(self, groups: Sequence[Group]) -> list[TopTokens | None]:
        """What it says of each group; None: that is computed with the batch."""
        ...

    def answered(self, group: Group, said: TopTokens) -> Group:
        """The group with what it said of it, for it to find there."""
        ...


class AnswersAhead:
    """`Draws` whose generations are put before the teachers as they come, and what they said of them."""

    on_policy = True

    def __init__(
        self,
        drawing: Draws,
        teacher: Foretelling,
        groups_of: Callable[[int, Sequence[Sampled]], list[Group]],
        line: JobQueue,
    ) -> None:
        """`groups_of`: (generation, what was drawn) -> its groups."""
        self.drawing, self._teacher, self._groups_of, self._line = drawing, teacher, groups_of, line
        self._said: dict[int, Future[list[TopTokens | None]]] = {}
        self._saved: Mapping[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.drawing)

    def draw(self, generation: int) -> tuple[list[Sampled], list[Sampled]]:
        """As it is drawn; the teachers are asked, and not waited for."""
        kept, replaced = self.drawing.draw(generation)
        groups = self._groups_of(generation, kept)
        self._said[generation] = self._line.submit(partial(self._teacher.foretell, groups))
        return kept, replaced

    def groups(self, generation: int, kept: Sequence[Sampled]) -> list[Group]:
        """Of a generation that was drawn, with what the teachers said as soon as that is there."""
        said, groups = self._said.pop(generation).result(), self._groups_of(generation, kept)
        return [
            group if one is None else self._teacher.answered(group, one)
            for group, one in zip(groups, said, strict=True)
        ]

    def moved_on(self) -> None:
        """Teachers stay as they are."""
        self.drawing.moved_on()

    def metrics(self, kept: Sequence[Sampled], replaced: Sequence[Sampled]) -> dict[str, float]:
        """What was chosen."""
        return self.drawing.metrics(kept, replaced)

    def note_unused(self, ledger: RowLedger) -> None:
        """Take back from the ledger the prompts of which nothing was trained."""
        self.drawing.note_unused(ledger)

    def state(self) -> dict[str, Any]:
        """JSON values from which drawing goes on. Waits for what is in flight: `tensors` has it."""
        told = {
            str(number): [None if one is None else len(one.ids_NK) for one in said.result()]
            for number, said in self._said.items()
        }
        return {"drawing": self.drawing.state(), "told": told}

    def tensors(self) -> dict[str, Tensor]:
        """What was said of generations that are still to come."""
        found = {}
        for number, future in self._said.items():
            if said := [one for one in future.result() if one is not None]:
                found[f"{_OF_ANSWERS}.{number}.ids"] = torch.cat([one.ids_NK for one in said])
                found[f"{_OF_ANSWERS}.{number}.logs"] = torch.cat([one.logs_NK for one in said])
        return found

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Those of a saved state, before `load`."""
        self._saved = tensors

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` and `tensors` gave."""
        self.drawing.load(state["drawing"])
        for number, counts in state["told"].items():
            future: Future[list[TopTokens | None]] = Future()
            future.set_result(self._parts(number, counts))
            self._said[int(number)] = future
        self._saved = {}

    def _parts(self, number: str, counts: Sequence[int | None]) -> list[TopTokens | None]:
        lengths = [count for count in counts if count is not None]
        if not lengths:
            return [None] * len(counts)
        ids, logs = (self._saved[f"{_OF_ANSWERS}.{number}.{name}"].split(lengths) for name in ("ids", "logs"))
        told = iter(zip(ids, logs, strict=True))
        return [None if count is None else TopTokens(*next(told)) for count in counts]
