"""What of a configuration is part of a result, and what is known of it besides."""

from __future__ import annotations

from typing import Any

from stages import rl, sft
from stages.identity import operational_config, semantic_config, with_operational
from stages.stage import Config


def test_operational_fields_of_settings_within_settings() -> None:
    """They are in their places, with those of defaults, and the two parts give the whole again."""
    rewards: list[Any] = ["numeric_match", {"name": "math", "cache": False}]
    servers = {"engine": "vllm_server", "servers": 2, "devices": ["0", "1"]}
    configs: tuple[Config, ...] = (
        rl.Config.model_validate({"rewards": rewards, "rollouts": servers, "micro_batch_tokens": 77}),
        sft.Config.model_validate({"weight_averaging": {"kind": "ema", "device": "cpu"}}),
    )
    found = [operational_config(config) for config in configs]
    assert found[0]["micro_batch_tokens"] == 77 and found[0]["rewards"] == {"1": {"cache": False}}
    assert (found[0]["rollouts"]["servers"], found[0]["rollouts"]["devices"]) == (2, ["0", "1"])
    assert found[0]["rollouts"]["max_restarts"] == 3 and "engine" not in found[0]["rollouts"]
    assert found[1]["weight_averaging"] == {"device": "cpu"}
    for config, operational in zip(configs, found, strict=True):
        whole = with_operational(semantic_config(config), operational)
        assert type(config).model_validate(whole) == config
