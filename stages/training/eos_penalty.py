"""Rewards of completions that did not come to an end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stages.data.tokenize import TokenizedPrompt
from stages.training.rollout_drawing import Generate
from stages.training.rollout_records import Sampled


@dataclass(frozen=True)
class MissingEosPenalty:
    """Another `Generate`, with a penalty taken off the reward of completions without an end token (TRL's
    missing_eos_penalty)."""

    generate: Generate
    penalty: float

    def __call__(
        self, prompts: Sequence[TokenizedPrompt], seeds: Sequence[tuple[int, ...]], *, some_scored: bool = True
    ) -> list[Sampled]:
        """What was generated, with less reward."""
        return [self._judged(entry) for entry in self.generate(prompts, seeds, some_scored=some_scored)]

    def _judged(self, sampled: Sampled) -> Sampled:
        totals = [
            total if total is None or completion.finished else total - self.penalty
            for total, completion in zip(sampled.totals, sampled.completions, strict=True)
        ]
        return replace(sampled, totals=totals)


def penalized(generate: Generate, missing_eos_penalty: float | None) -> Generate:
    """With the penalty of a stage's configuration, where it has one."""
    return generate if missing_eos_penalty is None else MissingEosPenalty(generate, missing_eos_penalty)
