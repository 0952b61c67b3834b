"""A*-PO: the policy's log-ratio to the reference is regressed on the advantage under the optimal policy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from artifacts.errors import DataError, StageError
from stages.context import Context
from stages.data.ledger import RowLedger
from stages.data.tokenize import TokenizedPrompt
from stages.data.types import Dataset
from stages.losses.host_numbers import beside
from stages.losses.logprobs import TokenScores
from stages.losses.online import advantage_regression, optimal_value
from stages.training.batch import Group, TokenBatch
from stages.training.eos_penalty import penalized
from stages.training.generation import Generation
from stages.training.initial import Reference
from stages.training.loop import Trainer
from stages.training.metrics import Mean
from stages.training.model import token_logprobs
from stages.training.objective import Forward, Window, Windows
from stages.training.rollout_drawing import Drawing
from stages.training.rollout_metrics import OF_GROUPS
from stages.training.rollout_plan import one_step_plan
from stages.training.rollout_records import Sampled
from stages.training.rollout_settings import sampler_tolerance
from stages.training.rollout_windows import Learning, RolloutWindows
from stages.training.sampler_check import SamplerCheck
from stages.training.scored_windows import ScoredWindows


@dataclass(frozen=True)
class Regressed:
    """What is known of a completion."""

    advantage: float
    """r - V*."""
    reference: float
    """Its log-probability under the reference."""


class AdvantageRegression:
    """The mean of `advantage_regression` over completions. The groups, of one completion, carry `Regressed`."""

    metric_names: Sequence[str] = ("implicit_reward", "advantage", "objective/kl", "logps/chosen", "entropy")

    def __init__(self, beta2: float) -> None:
        self.beta2 = beta2

    def count(self, group: Group) -> float:
        """One completion."""
        return 1

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(sum of the completions' losses, TRL's metrics and more)."""
        scores: TokenScores = forward(batch, token_logprobs(batch, with_entropy=True))
        known: list[Regressed] = [group.data for group in batch.groups]
        sums_B = batch.sum_by_branch(scores.logprobs_N)
        advantages_B = beside([one.advantage for one in known], sums_B)
        log_ratios_B = sums_B - beside([one.reference for one in known], sums_B)
        losses_B = advantage_regression(log_ratios_B, advantages_B, beta2=self.beta2)
        with torch.no_grad():
            assert scores.entropy_N is not None
            values = {
                "implicit_reward": self.beta2 * log_ratios_B,
                "advantage": advantages_B,
                "objective/kl": log_ratios_B,
                "logps/chosen": sums_B,
                "entropy": scores.entropy_N,
            }
            metrics = {name: Mean(one.sum(), len(one)) for name, one in values.items()}
        return losses_B.sum(), metrics


def optimal_values(samples: Dataset, *, beta1: float) -> dict[str, tuple[float, bool]]:
    """Row id of every prompt -> (V*, whether none of its completions earned anything).

    Raises DataError where the dataset is of something else, or a completion has no reward.
    """
    missing = [column for column in ("prompt_row_id", "reward") if column not in samples.columns]
    if missing:
        raise DataError(
            f"input samples has no column {', '.join(missing)}; give output `completions` of a stage sample with "
            f"rewards; found {', '.join(samples.columns)}"
        )
    rewards: dict[str, list[float]] = defaultdict(list)
    for row in samples:
        if row["reward"] is None:
            raise DataError(
                f"input samples: row {row['row_id']} has no reward (all functions gave None); the value of a prompt "
                "needs a number for every completion"
            )
        rewards[row["prompt_row_id"]].append(row["reward"])
    return {name: (optimal_value(values, beta1=beta1), not any(values)) for name, values in rewards.items()}


def with_values(
    prompts: Sequence[TokenizedPrompt],
    values: Mapping[str, tuple[float, bool]],
    ledger: RowLedger,
    *,
    filter_all_incorrect: bool,
) -> list[TokenizedPrompt]:
    """The prompts that are trained; the ledger says why others are not. Raises DataError where none is left."""
    kept = []
    for prompt in prompts:
        if prompt.row_id not in values:
            state, detail = "without samples", "input samples has no completion of it"
        elif filter_all_incorrect and values[prompt.row_id][1]:
            state, detail = "all incorrect", "every sampled completion has reward 0 (filter_all_incorrect)"
        else:
            kept.append(prompt)
            continue
        ledger.take_back(prompt.row_id, state, detail, tokens=len(prompt.prompt_ids))
    if not kept:
        raise DataError(
            f"no prompt is left to train on ({ledger.summary()}): sample the same dataset, more completions a prompt, "
            "or set filter_all_incorrect: false"
        )
    return kept


@dataclass(frozen=True)
class OptimalAdvantage:
    """The advantages of a generation: reward less V* of the prompt."""

    values: Mapping[str, tuple[float, bool]]

    def __call__(self, sampled: Sequence[Sampled]) -> list[list[float]]:
        """For the one completion of every prompt. Raises StageError where it has no reward."""
        found = []
        for entry in sampled:
            (reward,) = entry.totals
            if reward is None:
                raise StageError(
                    f"no reward function scored the completion of row {entry.prompt.row_id} (all gave None); A*-PO "
                    "needs a number for every completion"
                )
            found.append([reward - self.values[entry.prompt.row_id][0]])
        return found


class RegressedWindows(ScoredWindows):
    """Windows of rollouts with the reference's log-probabilities."""

    def __init__(
        self, windows: Windows, trainer: Trainer, reference: Reference, values: Mapping[str, tuple[float, bool]]
    ) -> None:
        super().__init__(windows, trainer)
        self.reference, self.values = reference, values

    def window(self, step: int) -> Window:
        """The groups of a step."""
        window = super().window(step)
        metrics = {name: value for name, value in window.metrics.items() if name not in OF_GROUPS}
        found = [self.values[group.row_id][0] for group in window.groups]
        return replace(window, metrics=metrics | {"v_star": math.fsum(found) / len(found)})

    def present(self, groups: Sequence[Group]) -> list[Regressed]:
        """Of all their completions."""
        with self.reference() as scorer:
            sums = self.measured(scorer, groups, lambda branches: [sum(values) for values in branches]).tolist()
        return [Regressed(group.data.advantages[0], total) for group, (total,) in zip(groups, sums, strict=True)]


def regressed_windows(
    context: Context,
    prompts: Sequence[TokenizedPrompt],
    values: Mapping[str, tuple[float, bool]],
    trainer: Trainer,
    tokenizer: Any,
    reference: Reference,
) -> tuple[RolloutWindows, RegressedWindows]:
    """(the rollouts of a stage's configuration, one completion of every prompt; what is trained of them)."""
    config: Any = context.config
    plan = one_step_plan(config, num_generations=1)
    check = SamplerCheck(trainer, temperature=config.temperature, tolerance=sampler_tolerance(config))
    learning = Learning(OptimalAdvantage(values), check, lambda _: 1.0, skippable=False)
    generate = penalized(Generation.of(context, trainer, tokenizer, config), config.missing_eos_penalty)
    rollouts = RolloutWindows(context, Drawing(prompts, plan, generate), plan, learning)
    return rollouts, RegressedWindows(rollouts, trainer, reference, values)
