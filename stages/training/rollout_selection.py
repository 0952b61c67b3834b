"""Which rollouts are trained: groups that tell completions apart, and in a group the completions that differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import pstdev, pvariance
from typing import Any

from stages.seeds import generator
from stages.training.batch import Group
from stages.training.prompt_order import Curriculum
from stages.training.rollout_records import Sampled
from stages.training.saved_groups import groups_from_json, groups_to_json


@dataclass(frozen=True)
class Selection:
    """How prompts and completions are chosen; the fields of `SelectionConfig`."""

    trained: int | None = None
    """Completions of a group that are trained; None: all."""
    dynamic_sampling_rounds: int = 0
    replay_buffer_size: int = 0
    curriculum: Curriculum | None = None


def has_signal(rewards: Sequence[float | None]) -> bool:
    """Whether two completions of a group are worth different rewards."""
    return len({reward for reward in rewards if reward is not None}) > 1


def most_varied(rewards: Sequence[float | None], count: int) -> list[int]:
    """Indices, ascending, of the `count` completions whose rewards have the largest variance. PODS, arXiv:2504.13818.

    The subset of largest variance is made of the highest and the lowest rewards (theorem 1 there), so one of
    `count` + 1 cuts of the sorted rewards is it; of equal ones the cut with the fewest high rewards. Completions that
    nothing scored come last.
    """
    scored = sorted((reward, index) for index, reward in enumerate(rewards) if reward is not None)
    missing = [index for index, reward in enumerate(rewards) if reward is None]
    if len(scored) <= count:
        return sorted([index for _, index in scored] + missing[: count - len(scored)])
    cuts = [scored[: count - high] + scored[len(scored) - high :] for high in range(count + 1)]
    best = max(cuts, key=lambda cut: pvariance([reward for reward, _ in cut]))
    return sorted(index for _, index in best)


def only(sampled: Sampled, indices: Sequence[int]) -> Sampled:
    """Some of a prompt's completions."""
    return replace(
        sampled,
        completions=[sampled.completions[index] for index in indices],
        texts=[sampled.texts[index] for index in indices],
        rewards={name: [values[index] for index in indices] for name, values in sampled.rewards.items()},
        totals=[sampled.totals[index] for index in indices],
        lessons=[sampled.lessons[index] for index in indices] if sampled.lessons else [],
    )


@dataclass(frozen=True)
class Kept:
    """A group that may be trained again."""

    score: float
    step: int
    """Index of the step that it was sampled for."""
    group: Group


class ReplayBuffer:
    """The most informative groups so far. They come back with the sampler's log-probabilities as the old ones, so
    that ratios are of the present policy to the distribution that the tokens were drawn from.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.entries: list[Kept] = []

    def add(self, groups: Sequence[Group], step: int) -> None:
        """Keep groups that inform; where there are too many, those that do most, newer ones first."""
        fresh = [Kept(information(group), step, _as_sampled(group)) for group in groups]
        self.entries = sorted([*fresh, *self.entries], key=lambda entry: (-entry.score, -entry.step))[: self.size]

    def draw(self, count: int, step: int) -> list[Kept]:
        """Up to `count` different groups, likelier the higher their score."""
        count = min(count, len(self.entries))
        if count == 0:
            return []
        total = sum(entry.score for entry in self.entries)
        chances = [entry.score / total for entry in self.entries]
        chosen = generator(self.seed, "replay", step).choice(len(chances), size=count, replace=False, p=chances)
        return [self.entries[int(index)] for index in chosen]

    def state(self) -> list[dict[str, Any]]:
        """JSON values from which the buffer is made again."""
        saved = groups_to_json([entry.group for entry in self.entries])
        return [
            {"score": entry.score, "step": entry.step, "group": group}
            for entry, group in zip(self.entries, saved, strict=True)
        ]

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """Take up what `state` gave."""
        groups = groups_from_json([entry["group"] for entry in state])
        self.entries = [Kept(entry["score"], entry["step"], group) for entry, group in zip(state, groups, strict=True)]


def information(group: Group) -> float:
    """Sum |advantage| x standard deviation of the advantages, the score of TRL's replay buffer; 0 where a group does
    not tell its completions apart."""
    advantages = group.data.advantages
    return float(sum(map(abs, advantages)) * pstdev(advantages))


def _as_sampled(group: Group) -> Group:
    return replace(group, data=replace(group.data, old_logprobs=group.data.sampled_logprobs))
