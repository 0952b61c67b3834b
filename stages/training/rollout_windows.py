"""Windows of on-line learning: prompts are sampled, scored, given advantages, and handed to the loop as groups.

Everything follows from the seed, the step and the weights, so a resumed run samples the same completions again;
what was sampled for steps still to come travels in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from stages.context import Context
from stages.data.tokenize import TokenizedPrompt
from stages.seeds import derive
from stages.training.batch import Branch, Group
from stages.training.objective import Window
from stages.training.planner import RowOrder
from stages.training.policy import Rollouts
from stages.training.rollout_metrics import rollout_metrics
from stages.training.rollout_records import Recorder, Sampled


class Generate(Protocol):
    """Samples completions of prompts with the present weights, and scores them; on every process the same result."""

    def __call__(self, prompts: Sequence[TokenizedPrompt], seeds: Sequence[tuple[int, ...]]) -> list[Sampled]: ...


@dataclass(frozen=True)
class Plan:
    """How prompts become steps."""

    prompts_per_step: int
    num_generations: int
    steps_per_generation: int
    num_iterations: int
    mask_truncated: bool
    seed: int
    epochs: float
    max_steps: int | None

    @property
    def prompts_per_generation(self) -> int:
        """Prompts that are sampled at once."""
        return self.prompts_per_step * self.steps_per_generation

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps between two generations."""
        return self.steps_per_generation * self.num_iterations

    def total_steps(self, num_prompts: int) -> int:
        """Optimizer steps of the run: whole generations, so every step is full."""
        generations = math.ceil(num_prompts * self.epochs / self.prompts_per_generation)
        return self.max_steps if self.max_steps is not None else generations * self.steps_per_batch


@dataclass(frozen=True)
class Learning:
    """How completions become something to learn from."""

    advantages: Callable[[list[list[float | None]]], list[list[float]]]
    measure: Callable[[list[Group]], list[Group]]
    """Adds the log-probabilities that the loss compares with."""
    count: Callable[[Group], float]
    skippable: bool
    """Whether a group whose advantages are all zero has no gradient."""


class RolloutWindows:
    """Generates when a step needs fresh completions; `steps_per_generation x num_iterations` steps use them."""

    def __init__(
        self,
        context: Context,
        prompts: Sequence[TokenizedPrompt],
        plan: Plan,
        generate: Generate,
        learning: Learning,
    ) -> None:
        self.context, self.prompts, self.plan = context, prompts, plan
        self.generate, self.learning = generate, learning
        self.total_steps = plan.total_steps(len(prompts))
        self.order = RowOrder(len(prompts), plan.prompts_per_generation, plan.seed, plan.epochs, self.total_steps)
        self.groups: list[Group] = []
        self.metrics: dict[str, float] = {}
        self.recorder = Recorder(context, plan.num_generations)

    def window(self, step: int) -> Window:
        """The groups of a step. Those without signal count in the denominator, but are not computed."""
        generation, use = divmod(step, self.plan.steps_per_batch)
        if use == 0:
            self._sample(generation, step)
        part = use % self.plan.steps_per_generation
        size = self.plan.prompts_per_step
        groups = self.groups[part * size : (part + 1) * size]
        idle = [group for group in groups if self._is_idle(group)]
        return Window(
            [group for group in groups if not self._is_idle(group)],
            uncounted_items=sum(self.learning.count(group) for group in idle),
            metrics=dict(self.metrics),
            num_tokens=sum(group.length for group in groups),
        )

    def _is_idle(self, group: Group) -> bool:
        """Whether nothing of the group reaches the gradient."""
        if all(branch.loss_mask is not None and not any(branch.loss_mask) for branch in group.branches):
            return True
        return self.learning.skippable and not any(group.data.advantages)

    def _sample(self, generation: int, step: int) -> None:
        prompts = [self.prompts[row] for row in self.order.rows(generation)]
        seeds = [
            tuple(
                derive(self.plan.seed, "sample", generation, place, prompt.row_id, index)
                for index in range(self.plan.num_generations)
            )
            for place, prompt in enumerate(prompts)
        ]
        sampled = self.generate(prompts, seeds)
        advantages = self.learning.advantages([entry.totals for entry in sampled])
        groups = [self._group(entry, values) for entry, values in zip(sampled, advantages, strict=True)]
        self.groups = self.learning.measure(groups)
        self.metrics = rollout_metrics(sampled)
        self.recorder.save(generation, step, sampled, advantages)

    def _group(self, sampled: Sampled, advantages: Sequence[float]) -> Group:
        masked = [self.plan.mask_truncated and not completion.finished for completion in sampled.completions]
        branches = tuple(
            Branch(completion.token_ids, [False] * len(completion.token_ids) if hidden else None)
            for completion, hidden in zip(sampled.completions, masked, strict=True)
        )
        logprobs = tuple(
            [] if hidden else list(completion.logprobs)
            for completion, hidden in zip(sampled.completions, masked, strict=True)
        )
        return Group(sampled.prompt.row_id, sampled.prompt.prompt_ids, branches, Rollouts(tuple(advantages), logprobs))

    def state(self) -> dict[str, Any]:
        """The groups of steps still to come, and the samples kept so far."""
        groups = [
            {
                "row_id": group.row_id,
                "prefix_ids": list(group.prefix_ids),
                "branches": [asdict(branch) for branch in group.branches],
                "data": asdict(group.data),
            }
            for group in (self.groups if self.plan.steps_per_batch > 1 else [])
        ]
        return {"groups": groups, "metrics": self.metrics, "samples": self.recorder.state()}

    def tensors(self) -> dict[str, Tensor]:
        """Nothing to save."""
        return {}

    def load(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave."""
        self.metrics = state.get("metrics", {})
        self.recorder.load(state.get("samples", []))
        self.groups = [
            Group(
                group["row_id"],
                group["prefix_ids"],
                tuple(Branch(**branch) for branch in group["branches"]),
                _rollouts(group["data"]),
            )
            for group in state.get("groups", [])
        ]

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Completions to look at, of every generation."""
        return self.recorder.samples

    def records(self) -> list[dict[str, Any]]:
        """Every rollout of the run, in order."""
        return self.recorder.records(-(-self.total_steps // self.plan.steps_per_batch))


def _rollouts(saved: dict[str, Any]) -> Rollouts:
    """From JSON, where tuples are lists."""
    fields: dict[str, Any] = {name: None if values is None else tuple(values) for name, values in saved.items()}
    return Rollouts(**fields)
