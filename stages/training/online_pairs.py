"""Pairs that the policy makes: of its completions of a prompt, the one with the highest reward and the one with the
lowest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor

from stages.context import Context
from stages.data.tokenize import TokenizedPrompt
from stages.training.batch import Group
from stages.training.eos_penalty import penalized
from stages.training.generation import Generation
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.objective import Window, Windows
from stages.training.pair_windows import PairWindows
from stages.training.pairs import NO_REFERENCE, Reference
from stages.training.preference import PairSettings
from stages.training.rollout_drawing import Drawing
from stages.training.rollout_plan import Plan
from stages.training.rollout_records import Sampled
from stages.training.rollout_selection import Selection
from stages.training.rollout_settings import sampler_tolerance
from stages.training.rollout_windows import Learning, RolloutWindows
from stages.training.sampler_check import SamplerCheck


def margins(sampled: Sequence[Sampled]) -> list[list[float]]:
    """Of two completions a prompt, by how much each is worth more than the other; zeros where that is not known."""
    found = []
    for entry in sampled:
        first, second = entry.totals
        margin = 0.0 if first is None or second is None else first - second
        found.append([margin, -margin])
    return found


class OnlinePairs:
    """Rollouts as pairs: the better completion first, no reference yet. Equal ones teach nothing and are left out."""

    def __init__(self, rollouts: RolloutWindows) -> None:
        self.rollouts, self.total_steps = rollouts, rollouts.total_steps

    def window(self, step: int) -> Window:
        """The pairs of a step."""
        window = self.rollouts.window(step)
        gaps = [max(group.data.advantages) for group in window.groups]
        metrics = {name: value for name, value in window.metrics.items() if name != "reward_std"}
        if "reward" in metrics:
            metrics["objective/scores"] = metrics["reward"]
        metrics["objective/scores_margin"] = sum(gaps) / self.rollouts.plan.prompts_per_step
        metrics["val/contain_eos_token"] = 1 - metrics["completions/clipped_ratio"]
        return replace(window, groups=[_chosen_first(group) for group in window.groups], metrics=metrics)

    def state(self) -> dict[str, Any]:
        """That of the rollouts."""
        return self.rollouts.state()

    def tensors(self) -> dict[str, Tensor]:
        """Those of the rollouts."""
        return self.rollouts.tensors()

    def load(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Into the rollouts."""
        self.rollouts.load(state, tensors)


def _chosen_first(group: Group) -> Group:
    first, second = group.branches
    branches = (first, second) if group.data.advantages[0] > 0 else (second, first)
    return replace(group, branches=branches, data=NO_REFERENCE)


class ReferencedPairs(PairWindows):
    """Pairs with their sums under a reference that stays."""

    def __init__(
        self,
        windows: Windows,
        trainer: Trainer,
        settings: PairSettings,
        reference: Callable[[], AbstractContextManager[Scorer]],
    ) -> None:
        super().__init__(windows, trainer, settings)
        self.reference = reference

    def data(self, step: int, groups: Sequence[Group]) -> list[Reference]:
        """Of every pair of a step."""
        with self.reference() as scorer:
            return [Reference(*row) for row in self.sums(scorer, groups).tolist()]


def pair_rollouts(
    context: Context, prompts: Sequence[TokenizedPrompt], trainer: Trainer, tokenizer: Any
) -> RolloutWindows:
    """Of a stage's configuration: two completions of every prompt are kept, those furthest apart."""
    config: Any = context.config
    plan = Plan(
        prompts_per_step=config.train_batch_size,
        num_generations=config.num_generations,
        steps_per_generation=1,
        num_iterations=1,
        mask_truncated=False,
        seed=config.seed,
        epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        selection=Selection(trained=2, dynamic_sampling_rounds=config.dynamic_sampling_rounds),
    )
    generate = penalized(Generation.of(context, trainer, tokenizer, config), config.missing_eos_penalty)
    check = SamplerCheck(trainer, temperature=config.temperature, tolerance=sampler_tolerance(config))
    learning = Learning(margins, check, lambda _: 1.0, skippable=True)
    return RolloutWindows(context, Drawing(prompts, plan, generate), plan, learning)
