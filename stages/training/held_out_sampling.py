"""Completions of held-out prompts, by the policy of the moment and the engine that samples for its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stages.data.tokenize import TokenizedPrompt
from stages.rollouts.requests import Completion
from stages.seeds import derive
from stages.training.generation import Sampling


@dataclass(frozen=True)
class Pieces:
    """A `Completing` that takes so many prompts at a time."""

    policy: Sampling
    size: int

    def __call__(self, prompts: Sequence[TokenizedPrompt], seeds: Sequence[tuple[int, ...]]) -> list[list[Completion]]:
        """For every prompt one completion a seed."""
        pieces = [slice(start, start + self.size) for start in range(0, len(prompts), self.size)]
        return [completions for piece in pieces for completions in self.policy(prompts[piece], seeds[piece])]

    def text(self, completion: Completion) -> str:
        """What a completion says."""
        return self.policy.text(completion)


def held_out_sampling(policy: Sampling, config: Any, *, completions: int) -> Pieces:
    """With the eval_ settings of a stage (a `SampledMeasuringConfig`) in the place of those that it trains with.

    The model in training takes no more `completions` at once than a generation of the training has, for more might
    not have room; an engine apart knows its own room.
    """
    settings = policy.settings.model_copy(update={"temperature": config.eval_temperature})
    size = max(1, completions // config.eval_num_generations) if policy.engine is None else 2**31
    return Pieces(replace(policy, settings=settings), size)


def held_out_seeds(config: Any, prompts: Sequence[TokenizedPrompt]) -> list[tuple[int, ...]]:
    """The same at every measurement, so that what differs between two of them is the weights."""
    return [
        tuple(
            derive(config.seed, "held out", place, prompt.row_id, index) for index in range(config.eval_num_generations)
        )
        for place, prompt in enumerate(prompts)
    ]
