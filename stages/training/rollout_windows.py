"""Windows of on-line learning: prompts are sampled, scored, given advantages, and handed to the loop as groups.

Everything follows from the seed, the step and the weights, so a resumed run samples the same completions again;
what was sampled for steps still to come travels in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, repeat
from statistics import fmean
from typing import Any

from torch import Tensor

from stages.context import Context
from stages.rollouts.requests import Completion
from stages.training.batch import Branch, Group
from stages.training.objective import Window
from stages.training.occupancy import WAITING, clocked
from stages.training.out_of_memory import trim_heap
from stages.training.policy_known import Rollouts
from stages.training.rollout_drawing import Draws
from stages.training.rollout_metrics import aged, rollout_metrics
from stages.training.rollout_plan import Plan
from stages.training.rollout_records import Recorder, Sampled
from stages.training.rollout_selection import ReplayBuffer, information, most_varied, only
from stages.training.saved_groups import groups_from_json, groups_to_json


def has_advantages(group: Group) -> bool:
    """Whether any of its completions is better or worse than the others."""
    return any(group.data.advantages)


@dataclass(frozen=True)
class Learning:
    """How completions become something to learn from."""

    advantages: Callable[[Sequence[Sampled]], list[list[float]]]
    measure: Callable[[list[Group]], list[Group]]
    """Adds the log-probabilities that the loss compares with."""
    count: Callable[[Group], float]
    skippable: bool
    """Whether a group that does not teach has no gradient."""
    of_step: Callable[[list[Group], bool], list[Group]] | None = None
    """Adds what the loss must know of a step as a whole; given its groups, and whether they are on policy."""
    data: Callable[..., Rollouts] = Rollouts
    """What `measure` leaves as the data of a group, by its fields."""
    informed: Callable[[Sampled, Group], Group] = lambda sampled, group: group
    """Adds to a fresh group what else is known of its completions."""
    teaches: Callable[[Group], bool] = has_advantages
    """Whether a group of a skippable loss has a gradient."""

    def is_idle(self, group: Group) -> bool:
        """Whether nothing of the group reaches the gradient."""
        return _is_masked(group) or (self.skippable and not self.teaches(group))


class RolloutWindows:
    """Generates when a step needs fresh completions; `steps_per_generation x num_iterations` steps use them."""

    def __init__(self, context: Context, drawing: Draws, plan: Plan, learning: Learning) -> None:
        self.context, self.drawing, self.plan = context, drawing, plan
        self.learning = learning
        self.total_steps = plan.total_steps(len(drawing))
        self.replay = ReplayBuffer(plan.selection.replay_buffer_size, plan.seed)
        self.groups: list[Group] = []
        self.metrics: dict[str, float] = {}
        self.recorder = Recorder(context, plan.num_generations, self.total_steps)

    def window(self, step: int) -> Window:
        """The groups of a step. Those without signal count in the denominator, but are not computed."""
        generation, use = divmod(step, self.plan.steps_per_batch)
        if use == 0:
            trim_heap()
            self._sample(generation, step)
            trim_heap()
        else:
            with clocked(self.context.timings, WAITING):
                self.drawing.moved_on()
        part = use % self.plan.steps_per_generation
        size = self.plan.prompts_per_step
        groups = self.groups[part * size : (part + 1) * size]
        num_tokens = sum(group.length for group in groups)
        if self.learning.of_step is not None:
            groups = self.learning.of_step(groups, use == 0 and not self.replay.size and self.drawing.on_policy)
        is_idle = self.learning.is_idle
        idle = [group for group in groups if is_idle(group)]
        return Window(
            [group for group in groups if not is_idle(group)],
            uncounted_items=sum(self.learning.count(group) for group in idle),
            metrics=aged(self.metrics, use),
            num_tokens=num_tokens,
        )

    def _sample(self, generation: int, step: int) -> None:
        with clocked(self.context.timings, WAITING):
            kept, replaced = self.drawing.draw(generation)
        chosen = [most_varied(entry.totals, self.plan.selection.trained or len(entry.totals)) for entry in kept]
        trained = [only(entry, indices) for entry, indices in zip(kept, chosen, strict=True)]
        values = self.learning.advantages(trained)
        self.groups = self.learning.measure([self._group(*pair) for pair in zip(trained, values, strict=True)])
        advantages = [group.data.advantages for group in self.groups]
        self.metrics = rollout_metrics([*kept, *replaced]) | self.drawing.metrics(kept, replaced)
        if self.replay.size:
            self._replay(step)
        of_all = [
            _spread(values, indices, len(entry.totals))
            for entry, values, indices in zip(kept, advantages, chosen, strict=True)
        ]
        of_all += [[0.0] * len(entry.totals) for entry in replaced]
        self.recorder.save(generation, step, [*kept, *replaced], of_all)

    def _replay(self, step: int) -> None:
        """Put kept groups in the places of those without signal; keep the best of the fresh ones."""
        informative = [information(group) > 0 and not _is_masked(group) for group in self.groups]
        idle = [place for place, informs in enumerate(informative) if not informs]
        drawn = self.replay.draw(len(idle), step)
        self.replay.add([group for group, informs in zip(self.groups, informative, strict=True) if informs], step)
        for place, entry in zip(idle, drawn, strict=False):
            self.groups[place] = entry.group
        self.metrics["replay/groups"] = float(len(drawn))
        self.metrics["replay/buffer_size"] = float(len(self.replay.entries))
        if drawn:
            self.metrics["replay/age"] = fmean(step - entry.step for entry in drawn)

    def _group(self, sampled: Sampled, advantages: Sequence[float]) -> Group:
        branches = tuple(
            Branch(completion.token_ids, loss_mask(completion, self.plan.mask_truncated))
            for completion in sampled.completions
        )
        logprobs = tuple(
            list(compress(completion.compared_logprobs, repeat(True) if branch.loss_mask is None else branch.loss_mask))
            for completion, branch in zip(sampled.completions, branches, strict=True)
        )
        data = Rollouts(tuple(advantages), logprobs)
        return self.learning.informed(sampled, Group(sampled.prompt.row_id, sampled.prompt.prompt_ids, branches, data))

    def state(self) -> dict[str, Any]:
        """The groups of steps still to come, what is chosen from, and the samples kept so far."""
        with clocked(self.context.timings, WAITING):
            drawing = self.drawing.state()
        return {
            "groups": groups_to_json(self.groups if self.plan.steps_per_batch > 1 else []),
            "metrics": self.metrics,
            "samples": self.recorder.state(),
            "drawing": drawing,
            "replay": self.replay.state(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Nothing to save."""
        return {}

    def load(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave."""
        if not state:
            return
        self.metrics = state["metrics"]
        self.recorder.load(state["samples"])
        self.groups = groups_from_json(state["groups"], self.learning.data)
        self.drawing.load(state["drawing"])
        self.replay.load(state["replay"])

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Completions to look at, of every generation."""
        return self.recorder.samples

    def records(self) -> list[dict[str, Any]]:
        """Every rollout of the run, in order."""
        return self.recorder.records(self.generations(self.total_steps))

    def generations(self, steps: int) -> int:
        """How often a run of so many steps samples."""
        return -(-steps // self.plan.steps_per_batch)


def loss_mask(completion: Completion, mask_truncated: bool) -> list[bool] | None:
    """What of it is trained; None: all. Nothing of an episode whose environment broke."""
    broken = completion.episode is not None and completion.episode.error is not None
    if broken or (mask_truncated and not completion.finished):
        return [False] * len(completion.token_ids)
    return completion.loss_mask


def asked(completion: Completion, mask_truncated: bool) -> bool:
    """Whether any of it is trained."""
    mask = loss_mask(completion, mask_truncated)
    return bool(completion.token_ids) if mask is None else any(mask)


def _is_masked(group: Group) -> bool:
    return all(branch.loss_mask is not None and not any(branch.loss_mask) for branch in group.branches)


def _spread(values: Sequence[float], indices: Sequence[int], count: int) -> list[float]:
    """The values at their indices among `count`, zeros elsewhere."""
    found = dict(zip(indices, values, strict=True))
    return [found.get(index, 0.0) for index in range(count)]
