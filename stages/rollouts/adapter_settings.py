"""What vLLM does not compute of adapters, as far as a recipe says it. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

from stages.training.adapter_settings import MOVING

MOST_RANK = 512
"""Of an adapter that vLLM applies."""


def adapter_problems(config: Any) -> list[str]:
    """Of a stage's configuration whose `rollouts.lora_sync` is adapter."""
    problems = []
    if getattr(config, "use_dora", False):
        problems.append("use_dora with rollouts.lora_sync adapter: vLLM does not apply DoRA; use merged")
    if (start := getattr(config, "init_lora_weights", "default")) in MOVING:
        problems.append(
            f"init_lora_weights {start} with rollouts.lora_sync adapter: vLLM has the weights as they came, and the "
            "adapters are of what that start leaves of them; use merged"
        )
    if names := getattr(config, "modules_to_save", ()):
        problems.append(
            f"modules_to_save ({', '.join(names)}) with rollouts.lora_sync adapter: vLLM takes no whole modules "
            "with an adapter; use merged"
        )
    if (
        rank := max(getattr(config, "lora_r", None) or 0, *getattr(config, "rank_pattern", {}).values(), 0)
    ) > MOST_RANK:
        problems.append(
            f"lora_r {rank} with rollouts.lora_sync adapter: vLLM applies ranks up to {MOST_RANK}; use merged"
        )
    if config.rollouts.enable_sleep_mode:
        problems.append(
            "rollouts.enable_sleep_mode with lora_sync adapter: vLLM forgets the base as it sleeps, which merged sends "
            "again"
        )
    if config.rollouts.weight_transfer == "nccl":
        problems.append(
            "rollouts.weight_transfer nccl with lora_sync adapter: vLLM reads adapters from files; use folder, which "
            "sends little"
        )
    return problems
