"""What is kept of on-line learning: every completion with its log-probabilities, rewards and advantage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.context import Context
from stages.data.tokenize import TokenizedPrompt
from stages.rollouts.requests import Completion

SAMPLES_KEPT_PER_STEP = 1
"""Groups of a generation whose texts go into samples.jsonl."""


@dataclass(frozen=True)
class Sampled:
    """A prompt's completions, scored: the unit that is sampled, stored and trained as one."""

    prompt: TokenizedPrompt
    completions: list[Completion]
    texts: list[str]
    rewards: dict[str, list[float | None]]
    """By reward function."""
    totals: list[float | None]
    """Weighted sums; None where nothing scored the completion."""


class Recorder:
    """Saves the rollouts of every generation as a shard, and keeps some of them to be looked at."""

    def __init__(self, context: Context, num_generations: int) -> None:
        self.context, self.num_generations = context, num_generations
        self.samples: list[dict[str, Any]] = []

    def save(
        self, generation: int, step: int, sampled: Sequence[Sampled], advantages: Sequence[Sequence[float]]
    ) -> None:
        """The rollouts that were sampled for the step with this index, and those after it."""
        if not self.context.is_main:
            return
        records = [
            record
            for entry, values in zip(sampled, advantages, strict=True)
            for record in rollout_records(entry, values, step + 1)
        ]
        self.samples += records[: SAMPLES_KEPT_PER_STEP * self.num_generations]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self.context.shards.save(f"rollouts-{generation:08d}", lines.encode())

    def state(self) -> list[dict[str, Any]]:
        """The samples kept so far."""
        return list(self.samples)  # it grows while a checkpoint is written

    def load(self, samples: list[dict[str, Any]]) -> None:
        """Take up what `state` gave."""
        self.samples = samples

    def records(self, generations: int) -> list[dict[str, Any]]:
        """The rollouts of so many generations, in order, from the shards that were saved as the run went."""
        return [
            json.loads(line)
            for generation in range(generations)
            for line in self.context.shards.load(f"rollouts-{generation:08d}").decode().splitlines()
        ]


def rollout_records(sampled: Sampled, advantages: Sequence[float], step: int) -> list[dict[str, Any]]:
    """One row a completion. `weights`: the number of optimizer steps behind the weights that sampled it."""
    return [
        {
            "row_id": f"{sampled.prompt.row_id}/{step}/{index}",
            "prompt_row_id": sampled.prompt.row_id,
            "prompt": sampled.prompt.row["prompt"],
            "completion": text,
            "token_ids": completion.token_ids,
            "logprobs": completion.logprobs,
            "finished": completion.finished,
            "reward": sampled.totals[index],
            **{f"reward_{name}": values[index] for name, values in sampled.rewards.items()},
            "advantage": advantages[index],
            "step": step,
            "weights": step - 1,
        }
        for index, (completion, text) in enumerate(zip(sampled.completions, sampled.texts, strict=True))
    ]
