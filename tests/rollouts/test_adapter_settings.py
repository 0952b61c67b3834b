"""What a recipe may ask of adapters that are sent alone."""

from __future__ import annotations

from typing import Any

import pytest

from stages import rl

WIRED = frozenset({"model", "dataset"})
ALONE: dict[str, Any] = {"engine": "vllm", "lora_sync": "adapter"}
SERVER: dict[str, Any] = {"engine": "vllm_server", "lora_sync": "adapter"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"lora_r": 4, "use_dora": True, "rollouts": ALONE}, "use_dora with rollouts.lora_sync adapter: vLLM does not"),
    (
        {"lora_r": 4, "modules_to_save": ["lm_head"], "rollouts": ALONE},
        "modules_to_save (lm_head) with rollouts.lora_sync adapter",
    ),
    ({"lora_r": 600, "rollouts": ALONE}, "lora_r 600 with rollouts.lora_sync adapter: vLLM applies ranks up to 512"),
    (
        {"lora_r": 4, "rollouts": {**ALONE, "enable_sleep_mode": True}},
        "rollouts.enable_sleep_mode with lora_sync adapter",
    ),
    (
        {"lora_r": 4, "rollouts": {"lora_sync": "adapter"}},
        "rollouts.lora_sync is of engine vllm or vllm_server; embedded has none",
    ),
    (
        {"lora_r": 4, "rollouts": {**SERVER, "weight_transfer": "nccl", "devices": "1", "max_restarts": 0}},
        "rollouts.weight_transfer nccl with lora_sync adapter: vLLM reads adapters from files",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_refused(settings: dict[str, Any], message: str) -> None:
    (problem,) = rl.check(rl.Config(rewards=["exact_match"], **settings), WIRED)
    assert problem.startswith(message)


def test_taken() -> None:
    """Also without lora_r: the input may be an adapter."""
    for settings in ({"lora_r": 512}, {}):
        for engine in (ALONE, SERVER, {**SERVER, "max_staleness": 1}):
            assert rl.check(rl.Config(rewards=["exact_match"], rollouts=engine, **settings), WIRED) == []
