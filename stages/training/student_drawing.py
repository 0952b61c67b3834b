"""Which prompts the student completes in a step of distillation, as `Draws` of a generation a step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from stages.context import Context
from stages.data.ledger import RowLedger
from stages.data.tokenize import TokenizedPrompt
from stages.rollouts.requests import Completion
from stages.seeds import derive
from stages.training.answers_ahead import AnswersAhead, Foretelling
from stages.training.batch import Group
from stages.training.generation import Completing
from stages.training.job_queue import JobQueue
from stages.training.occupancy import WAITING, clocked
from stages.training.planner import RowOrder
from stages.training.rollout_drawing import Draws
from stages.training.rollout_records import Sampled
from stages.training.rollouts_ahead import ahead_of


class StudentDrawing:
    """The generations are the steps on own completions, in order; every prompt has one completion, and no reward."""

    on_policy = True
    steps_per_batch = 1

    def __init__(
        self,
        prompts: Sequence[TokenizedPrompt],
        order: RowOrder,
        steps: Sequence[int],
        sampling: Completing,
        seed: int,
    ) -> None:
        """`steps`: those on own completions."""
        self.prompts, self.order, self.steps = prompts, order, steps
        self._sampling, self._seed = sampling, seed

    def __len__(self) -> int:
        return len(self.prompts)

    def total_steps(self, num_prompts: int) -> int:
        """Steps on own completions."""
        return len(self.steps)

    def generation_of(self, step: int) -> int | None:
        """That of a step; None: it is on given completions."""
        place = bisect_left(self.steps, step)
        return place if place < len(self.steps) and self.steps[place] == step else None

    def chosen(self, generation: int) -> list[TokenizedPrompt]:
        """The prompts of a generation."""
        return [self.prompts[row % len(self.prompts)] for row in self.order.rows(self.steps[generation])]

    def draw(self, generation: int) -> tuple[list[Sampled], list[Sampled]]:
        """(The completions of a generation, nothing that they replaced)."""
        chosen, step = self.chosen(generation), self.steps[generation]
        seeds = [(derive(self._seed, "sample", step, place, prompt.row_id),) for place, prompt in enumerate(chosen)]
        made = self._sampling(chosen, seeds)
        return [Sampled(*pair, [], {}, [None]) for pair in zip(chosen, made, strict=True)], []

    def moved_on(self) -> None:
        """The next generation is drawn by those of its time."""

    def metrics(self, kept: Sequence[Sampled], replaced: Sequence[Sampled]) -> dict[str, float]:
        """Nothing is chosen."""
        return {}

    def note_unused(self, ledger: RowLedger) -> None:
        """Every prompt has its turn."""

    def state(self) -> dict[str, Any]:
        """All follows from the number of the generation."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """There is nothing to take up."""


class StudentGenerations:
    """Generations as groups: drawn when their step comes, or ahead of it (`max_staleness`)."""

    def __init__(
        self,
        context: Context,
        drawing: StudentDrawing,
        groups_of: Callable[[Sequence[TokenizedPrompt], Sequence[Completion]], list[Group]],
        sampling: Completing,
        teacher: Any,
    ) -> None:
        """`teacher`: one that is `Foretelling` is asked ahead as well."""
        self.drawing, self.sampling = drawing, sampling
        self._context, self._make = context, groups_of
        self._answers: AnswersAhead | None = None
        config: Any = context.config
        draws: Draws = drawing
        asks = config.loss_top_k is not None and isinstance(teacher, Foretelling)
        if config.rollouts.max_staleness and asks:
            line = JobQueue()
            context.resources.callback(line.close)  # before the engine's: nobody asks a server that is being stopped
            self._answers = draws = AnswersAhead(drawing, teacher, self._groups_of, line)
        self.draws = ahead_of(context, draws, drawing, sampling, drawing.steps.__getitem__)

    def __call__(self, generation: int) -> tuple[list[Completion], list[Group], dict[str, float]]:
        """(completions of a generation, its groups, how old the weights behind them are); the next one in order."""
        with clocked(self._context.timings, WAITING):
            kept, replaced = self.draws.draw(generation)
            answers = self._answers
            groups = self._groups_of(generation, kept) if answers is None else answers.groups(generation, kept)
        return [one.completions[0] for one in kept], groups, self.draws.metrics(kept, replaced)

    def _groups_of(self, generation: int, kept: Sequence[Sampled]) -> list[Group]:
        return self._make(self.drawing.chosen(generation), [one.completions[0] for one in kept])

    def tensors(self) -> dict[str, Tensor]:
        """What goes with the state of `draws`."""
        return {} if self._answers is None else self._answers.tensors()

    def load(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take up a saved state of `draws`."""
        if self._answers is not None:
            self._answers.take(tensors)
        self.draws.load(state)
