"""Two completions of a prompt by two authors: the policy, and an opponent between it and the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from stages.data.tokenize import TokenizedPrompt
from stages.rollouts.mixture import MixtureSampler
from stages.rollouts.requests import Completion
from stages.training.generation import Sampling
from stages.training.initial import Reference
from stages.training.rollout_records import Sampled


@dataclass(frozen=True)
class MixtureSampling(Sampling):
    """Samples from the geometric mixture of the policy and a reference."""

    reference: Reference
    mixture_coef: float

    def sampler(self) -> MixtureSampler:
        """Of the present weights."""
        return MixtureSampler(self.scorer.transformers_model, self._model, self.mixture_coef, **self.endings())

    @contextmanager
    def _model(self) -> Iterator[Any]:
        with self.reference() as scorer:
            yield scorer.transformers_model


@dataclass
class Contest:
    """Sampling for prompts with two seeds each: the first completion is the policy's, the second one is drawn from
    policy^(1 - mixture_coef) reference^mixture_coef, token by token."""

    policy: Sampling
    reference: Reference
    mixture_coef: float = 1.0
    """0: the policy itself; 1: the reference. It may change between steps."""

    def __call__(self, prompts: Sequence[TokenizedPrompt], seeds: Sequence[tuple[int, ...]]) -> list[list[Completion]]:
        """For every prompt both completions."""
        own = self.policy(prompts, [pair[:1] for pair in seeds])
        other = self._opponents(prompts, [pair[1:] for pair in seeds])
        return [[*first, *second] for first, second in zip(own, other, strict=True)]

    def _opponents(
        self, prompts: Sequence[TokenizedPrompt], seeds: Sequence[tuple[int, ...]]
    ) -> list[list[Completion]]:
        if self.mixture_coef == 0.0:
            return self.policy(prompts, seeds)
        if self.mixture_coef == 1.0:
            with self.reference() as scorer:
                return self.policy.by(scorer)(prompts, seeds)
        parts = {name: getattr(self.policy, name) for name in ("scorer", "tokenizer", "settings", "accelerator")}
        return MixtureSampling(**parts, reference=self.reference, mixture_coef=self.mixture_coef)(prompts, seeds)

    def text(self, completion: Completion) -> str:
        """What the completion says."""
        return self.policy.text(completion)


def margin(sampled: Sampled) -> float:
    """By how much the first of two completions is worth more than the second; 0 where that is not known."""
    first, second = sampled.totals
    return 0.0 if first is None or second is None else first - second


def by_author(sampled: Sequence[Sampled]) -> dict[str, float]:
    """TRL's metrics of the policy's (`model`) and the opponent's (`ref`) completions apart."""
    found = {"objective/scores_margin": fmean(margin(entry) for entry in sampled)}
    for place, author in enumerate(("model", "ref")):
        found[f"val/{author}_contain_eos_token"] = fmean(entry.completions[place].finished for entry in sampled)
        scores = [entry.totals[place] for entry in sampled]
        known = [score for score in scores if score is not None]
        if known:
            found[f"objective/{author}_scores"] = fmean(known)
    return found


@dataclass(frozen=True)
class ByEpoch:
    """A number that may change from one pass over the prompts to the next; the last one stays."""

    values: float | tuple[float, ...]
    prompts_per_step: int
    prompts: int

    def at(self, step: int) -> float:
        """In the pass that a step begins in."""
        if not isinstance(self.values, tuple):
            return self.values
        epoch = step * self.prompts_per_step // self.prompts
        return self.values[min(epoch, len(self.values) - 1)]
