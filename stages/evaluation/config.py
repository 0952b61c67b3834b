"""Settings of stages that let a model answer prompts and score what it says. Imports nothing heavy."""

from __future__ import annotations

from pydantic import Field

from stages.rollouts.engine_problems import engine_problems
from stages.rollouts.engine_settings import EngineChoice, EngineConfig
from stages.rollouts.requests import SamplingConfig
from stages.rollouts.reward_spec import Reward, unknown_rewards
from stages.stage import operational


class AnswerConfig(EngineChoice, SamplingConfig):
    """How prompts are chosen, answered and scored."""

    num_generations: int = Field(1, gt=0)
    """Completions of one prompt."""
    rewards: tuple[Reward, ...] = ()
    """Reward functions: built-in names, `file.py:name` of your own, or a mapping with more."""
    reward_weights: tuple[float, ...] | None = None
    """One weight a reward; null: all 1."""
    max_length: int = Field(1024, gt=1)
    """Longest row in tokens: longer prompts are dropped, longer rows are cut; both are counted in the ledger."""
    limit: int | None = Field(None, gt=0)
    """Use so many rows only, drawn by the seed; null: all rows."""
    seed: int = Field(42, ge=0)
    """Every random number of the stage follows from it."""
    bf16: bool = False
    """Compute in bfloat16."""
    micro_batch_tokens: int = operational(8192, gt=0)
    """Most tokens (padding included) of one forward pass that scores given text."""


def answer_problems(config: AnswerConfig, num_rewards: int) -> list[str]:
    """What is wrong with the settings together; `num_rewards`: functions, and the reward model where it counts."""
    problems = unknown_rewards(config.rewards) + engine_problems(config, config)
    problems += [
        f"rollouts.{name} is of stages that train; here are none of their steps, leave it out"
        for name in ("enable_sleep_mode", "lora_sync", "proof_interval")
        if getattr(config.rollouts, name) != EngineConfig.model_fields[name].default
    ]
    if config.reward_weights is not None and len(config.reward_weights) != num_rewards:
        problems.append(f"reward_weights has {len(config.reward_weights)} numbers for {num_rewards} rewards")
    if config.temperature == 0 and config.num_generations > 1:
        problems.append(
            f"num_generations {config.num_generations} at temperature 0 gives the same completion "
            f"{config.num_generations} times; raise temperature, or set num_generations: 1"
        )
    return problems
