"""Which prompts a generation samples, and which of their groups it goes on with."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, Protocol

from stages.data.ledger import RowLedger
from stages.data.tokenize import TokenizedPrompt
from stages.seeds import derive
from stages.training.prompt_order import PromptOrder
from stages.training.rollout_plan import Plan
from stages.training.rollout_records import Sampled
from stages.training.rollout_selection import has_signal


class Generate(Protocol):
    """Samples completions of prompts with the present weights, and scores them; on every process the same result."""

    def __call__(
        self, prompts: Sequence[TokenizedPrompt], seeds: Sequence[tuple[int, ...]], *, some_scored: bool = True
    ) -> list[Sampled]:
        """some_scored: that no reward function scores any of them is an error."""
        ...


class Draws(Protocol):
    """Where a generation's groups come from."""

    @property
    def on_policy(self) -> bool:
        """Whether the ratios of the loss are to the weights before the first step on them; else to those that sampled
        them."""
        ...

    def __len__(self) -> int:
        """Prompts of an epoch."""
        ...

    def draw(self, generation: int) -> tuple[list[Sampled], list[Sampled]]:
        """(The groups of a generation, those that they replaced because all of their rewards were equal)."""
        ...

    def moved_on(self) -> None:
        """Called before every further step on a generation: the weights are others by now."""
        ...

    def metrics(self, kept: Sequence[Sampled], replaced: Sequence[Sampled]) -> dict[str, float]:
        """What was chosen, where there is a choice."""
        ...

    def note_unused(self, ledger: RowLedger) -> None:
        """Take back from the ledger the prompts of which nothing was trained."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON values from which drawing goes on."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        ...


class Drawing:
    """Takes prompts in their order, and replaces groups without signal as often as the plan allows: dynamic sampling
    (DAPO, arXiv:2503.14476, eq. 11)."""

    on_policy = True

    def __init__(self, prompts: Sequence[TokenizedPrompt], plan: Plan, generate: Generate) -> None:
        self.prompts, self.plan, self.generate = prompts, plan, generate
        self.order = PromptOrder(len(prompts), plan.seed, plan.selection.curriculum)
        self.outcomes: dict[str, bool] = {}
        """Row id of every prompt sampled so far -> whether a group of it told its completions apart; of dynamic
        sampling only."""

    def __len__(self) -> int:
        return len(self.prompts)

    def draw(self, generation: int) -> tuple[list[Sampled], list[Sampled]]:
        """(The groups of a generation, those that they replaced because all of their rewards were equal)."""
        kept = self._sample(generation, 0, self.plan.prompts_per_generation)
        replaced: list[Sampled] = []
        for turn in range(1, self.plan.selection.dynamic_sampling_rounds + 1):
            flat = [place for place, entry in enumerate(kept) if not has_signal(entry.totals)]
            if not flat:
                break
            for place, entry in zip(flat, self._sample(generation, turn, len(flat)), strict=True):
                replaced.append(kept[place])
                kept[place] = entry
        return kept, replaced

    def moved_on(self) -> None:
        """The next generation is drawn by those of its time."""

    def _sample(self, generation: int, turn: int, count: int) -> list[Sampled]:
        """Completions of the next prompts; `turn` 0 is the generation's own, others replace groups of it."""
        rows = self.order.take(count)
        prompts = [self.prompts[row] for row in rows]
        purpose = ("sample", generation) if turn == 0 else ("sample again", generation, turn)
        seeds = [
            tuple(
                derive(self.plan.seed, *purpose, place, prompt.row_id, index)
                for index in range(self.plan.num_generations)
            )
            for place, prompt in enumerate(prompts)
        ]
        sampled = self.generate(prompts, seeds, some_scored=turn == 0)
        for row, entry in zip(rows, sampled, strict=True):
            self.order.note(row, entry.totals)
            if self.plan.selection.dynamic_sampling_rounds:
                told_apart = self.outcomes.get(entry.prompt.row_id, False)
                self.outcomes[entry.prompt.row_id] = told_apart or has_signal(entry.totals)
        return sampled

    def metrics(self, kept: Sequence[Sampled], replaced: Sequence[Sampled]) -> dict[str, float]:
        """What was chosen, where there is a choice."""
        metrics = {}
        if self.plan.selection.dynamic_sampling_rounds:
            metrics["dynamic_sampling/replaced_groups"] = float(len(replaced))
            metrics["dynamic_sampling/remaining_groups"] = float(sum(not has_signal(entry.totals) for entry in kept))
        rates = self.order.pass_rates
        if self.order.curriculum is not None and rates:
            metrics["curriculum/pass_rate"] = fmean(rates.values())
            metrics["curriculum/measured_prompts"] = float(len(rates))
        return metrics

    def note_unused(self, ledger: RowLedger) -> None:
        """Dynamic sampling may sample a prompt and go on without it, whenever its turn comes."""
        for prompt in self.prompts:
            if self.outcomes.get(prompt.row_id) is False:
                detail = "in every group of it all rewards are equal"
                ledger.take_back(prompt.row_id, "without signal", detail, tokens=len(prompt.prompt_ids))

    def state(self) -> dict[str, Any]:
        """JSON values from which drawing goes on."""
        return {"order": self.order.state(), "outcomes": dict(self.outcomes)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.order.load(state["order"])
        self.outcomes = dict(state["outcomes"])
