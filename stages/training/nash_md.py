"""Nash-MD: the policy's completions are preferred, or not, over those of its mixture with the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from stages.context import Context
from stages.data.tokenize import TokenizedPrompt
from stages.losses.host_numbers import on_device
from stages.losses.online import PREFERENCES, nash_md
from stages.training.batch import Group, TokenBatch
from stages.training.eos_penalty import penalized
from stages.training.generation import Generation, Sampling
from stages.training.initial import Reference
from stages.training.loop import Trainer
from stages.training.metrics import Mean
from stages.training.model import token_losses
from stages.training.objective import Forward, Window, WindowsAround
from stages.training.opponents import ByEpoch, Contest, by_author, margin
from stages.training.out_of_memory import TokenBudget
from stages.training.policy_known import Rollouts, token_values
from stages.training.reference import branch_logprobs
from stages.training.rollout_drawing import Drawing
from stages.training.rollout_plan import one_step_plan
from stages.training.rollout_records import Sampled
from stages.training.rollout_settings import sampler_tolerance
from stages.training.rollout_windows import Learning, RolloutWindows
from stages.training.sampler_check import SamplerCheck


class NashMdLoss:
    """`nash_md` summed over tokens; the mean over the completions of a step. The groups, of one completion, carry
    `Rollouts` with P - 1/2 as its advantage, and the reference's log-probabilities."""

    metric_names: Sequence[str] = (
        "entropy",
        "loss/score",
        "loss/kl",
        "logps/chosen",
        "logps/rejected",
        "objective/entropy",
        "rewards/accuracies",
        "rewards/margins",
        "rewards/probabilities",
    )

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def use(self, beta: float) -> None:
        """From now on."""
        self.beta = beta

    def count(self, group: Group) -> float:
        """One completion."""
        return 1

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(sum of the completions' losses, TRL's metrics). As in TRL, `logps/rejected` is the reference's view of the
        same completion, and `rewards/margins` and `rewards/accuracies` are of the difference."""
        advantages = [group.data.advantages[0] for group in batch.groups]
        advantages_B = on_device(advantages, batch.branch_N.device, torch.float64)
        advantages_N = advantages_B.index_select(0, batch.branch_N)
        reference_N = token_values(batch, attrgetter("reference_logprobs"))

        def token_loss(logprobs_C: Tensor, part: slice) -> Tensor:
            of_part = (values_N[part].to(logprobs_C.dtype) for values_N in (reference_N, advantages_N))
            return nash_md(logprobs_C, *of_part, beta=self.beta)

        loss, scores = forward(batch, token_losses(batch, token_loss))
        with torch.no_grad():
            sums_B, of_reference_B = (batch.sum_by_branch(one.double()) for one in (scores.logprobs_N, reference_N))
            ahead_B = sums_B - of_reference_B
            sums = {
                "loss/score": advantages_B * sums_B,
                "loss/kl": ahead_B,
                "logps/chosen": sums_B,
                "logps/rejected": of_reference_B,
                "objective/entropy": -sums_B,
                "rewards/accuracies": ahead_B > 0,
                "rewards/margins": ahead_B,
                "rewards/probabilities": advantages_B + 0.5,
            }
            metrics = {name: Mean(values_B.sum(), len(values_B)) for name, values_B in sums.items()}
            assert scores.entropy_N is not None
            metrics["entropy"] = Mean(scores.entropy_N.sum(), len(scores.entropy_N))
        return loss, metrics


class ContestWindows(WindowsAround):
    """Rollouts of two authors; the policy's completions go on, with the reference's log-probabilities."""

    def __init__(
        self, rollouts: RolloutWindows, contest: Contest, mixture: ByEpoch, trainer: Trainer, preference: Preference
    ) -> None:
        super().__init__(rollouts)
        self.rollouts = rollouts
        self.contest, self.mixture, self.trainer, self.preference = contest, mixture, trainer, preference
        self.budget = TokenBudget(trainer.context, trainer.config.micro_batch_tokens)

    def window(self, step: int) -> Window:
        """The groups of a step."""
        self.contest.mixture_coef = self.mixture.at(step)
        window = self.rollouts.window(step)
        own = [replace(group, branches=group.branches[:1]) for group in window.groups]
        with self.contest.reference() as scorer:
            scored = branch_logprobs(scorer, own, self.budget)
        groups = [
            replace(group, data=_of_first(group.data, logprobs))
            for group, [(logprobs, _)] in zip(own, scored, strict=True)
        ]
        metrics = {name: value for name, value in window.metrics.items() if name != "reward_std"}
        metrics |= by_author(self.preference.seen) | {"mixture_coef": self.contest.mixture_coef}
        for name, author in (("chosen", "model"), ("rejected", "ref")):
            if (scores := metrics.get(f"objective/{author}_scores")) is not None:
                metrics[f"rewards/{name}"] = scores
        return replace(window, groups=groups, metrics=metrics, num_tokens=sum(group.length for group in groups))


def _of_first(rollouts: Rollouts, reference_logprobs: list[float]) -> Rollouts:
    """What is known of the first completion."""
    return Rollouts(rollouts.advantages[:1], rollouts.sampled_logprobs[:1], reference_logprobs=(reference_logprobs,))


class Preference:
    """The advantages of a prompt's two completions: P - 1/2 and, of the opponent's, which is not trained, 0. P is 1/2
    where a reward is not known. Keeps what it saw last."""

    def __init__(self, name: str) -> None:
        self.probability = PREFERENCES[name]
        self.seen: Sequence[Sampled] = ()

    def __call__(self, sampled: Sequence[Sampled]) -> list[list[float]]:
        """For each of the completions."""
        self.seen = sampled
        return [[self.probability(margin(entry)) - 0.5, 0.0] for entry in sampled]


def contest_windows(
    context: Context, prompts: Sequence[TokenizedPrompt], trainer: Trainer, tokenizer: Any, reference: Reference
) -> ContestWindows:
    """Of a stage's configuration."""
    config: Any = context.config
    plan = one_step_plan(config, num_generations=2)
    contest = Contest(Sampling.of(trainer, tokenizer, config), reference)
    generation = replace(Generation.of(context, trainer, tokenizer, config), sampling=contest)
    preference = Preference(config.preference)
    check = SamplerCheck(trainer, temperature=config.temperature, tolerance=sampler_tolerance(config), completions=1)
    learning = Learning(preference, check, lambda _: 1.0, skippable=False)
    drawing = Drawing(prompts, plan, penalized(generation, config.missing_eos_penalty))
    rollouts = RolloutWindows(context, drawing, plan, learning)
    mixture = ByEpoch(config.mixture_coef, plan.prompts_per_step, len(prompts))
    return ContestWindows(rollouts, contest, mixture, trainer, preference)
