"""What stages of on-line learning have in common: settings of their rollouts."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from pydantic import Field

from stages.rollouts.engine_settings import EngineChoice, OverlappedEngineChoice
from stages.rollouts.requests import SamplingConfig
from stages.rollouts.reward_spec import Reward, unknown_rewards
from stages.stage import Config, operational
from stages.training.config import PolicyConfig
from stages.training.eval_settings import SampledMeasuringConfig


class RolloutConfig(SampledMeasuringConfig):
    """What is shown of rollouts while they are made, and how held-out prompts are measured."""

    log_completions_steps: int | None = operational(None, gt=0)
    """Show a table of sample completions in the log and in Prefect every so many steps; null: ten times a run."""


class JudgedConfig(Config):
    """How completions are judged."""

    rewards: tuple[Reward, ...] = ()
    """Reward functions: built-in names, `file.py:name` of your own, or a mapping with more; input reward_model adds
    one."""
    reward_weights: tuple[float, ...] | None = None
    """One weight a reward, the reward model's last; null: all 1."""


class PenalizedConfig(JudgedConfig):
    """With a penalty for what does not end."""

    missing_eos_penalty: float | None = Field(None, gt=0)
    """Taken off the reward of completions that ended at max_completion_length."""


class JudgedRolloutConfig(PenalizedConfig, RolloutConfig, SamplingConfig):
    """How completions are sampled and judged; the names and defaults of TRL's on-line trainers."""

    temperature: float = Field(0.9, gt=0)
    """Sampling temperature; the loss is of the model without it, as in TRL."""
    max_completion_length: int = Field(64, gt=0)
    """Most tokens of a completion."""
    max_length: int = Field(512, gt=1)
    """Longest prompt in tokens; longer ones are dropped and counted in the ledger."""


class GroupedRolloutConfig(JudgedConfig, RolloutConfig, SamplingConfig):
    """How completions of one prompt are sampled, judged together and trained on. An item of train_batch_size is one."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    train_batch_size: int = Field(64, gt=0)
    """Completions of one optimizer step over all processes; a multiple of those of a group that are trained."""
    num_generations: int = Field(8, ge=2)
    """Completions of one prompt: the group that they are compared in."""
    steps_per_generation: int = Field(1, gt=0)
    """Optimizer steps that one generation is cut into."""
    num_iterations: int = Field(1, gt=0)
    """Times that every completion is used."""
    mask_truncated_completions: bool = False
    """Leave completions out that ended at max_completion_length."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; also divides the logits in the loss."""
    max_length: int = Field(1024, gt=1)
    """Longest prompt in tokens; longer ones are dropped and counted in the ledger."""


def reward_problems(rewards: Sequence[Reward], weights: Sequence[float] | None, wired: Set[str]) -> list[str]:
    """What is wrong with the rewards of a stage that may have a reward model wired in."""
    problems = unknown_rewards(rewards)
    count = len(rewards) + ("reward_model" in wired)
    if count == 0:
        problems.append("no reward: give rewards: [...] or wire input reward_model")
    if weights is not None and len(weights) != count:
        problems.append(f"reward_weights has {len(weights)} numbers for {count} rewards")
    return problems


def dropout_problems(config: PolicyConfig) -> list[str]:
    """Of a stage whose loss compares with the log-probabilities at sampling time."""
    if not config.lora_dropout:
        return []
    return [
        f"lora_dropout is {config.lora_dropout}, but completions are sampled without dropout, so no step would be on "
        "policy; leave it out"
    ]


def sampler_tolerance(config: Any) -> float | None:
    """Largest difference of sampler and trainer, in nats a token; None where the sampler did not draw from the plain
    distribution of the same weights, so that its numbers do not compare. It computes in float32; a bfloat16 trainer
    differs by rounding.
    """
    if isinstance(config, SamplingConfig) and config.filters():
        return None
    if isinstance(config, OverlappedEngineChoice) and config.rollouts.max_staleness:
        return None
    bf16 = bool(config.bf16)
    if isinstance(config, EngineChoice) and config.rollouts.is_apart:
        if config.structured is not None:
            return None
        return max(1e-2, config.rollouts.tolerance(bf16))
    return 0.5 if bf16 else 1e-2
