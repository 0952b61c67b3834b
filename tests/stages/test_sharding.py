"""What accelerate configurations and their environments mean, and what is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from artifacts.errors import StageError
from flows.command import LAUNCHERS, launcher_settings
from stages.sharding import Fsdp, Whole, Zero, sharding_of, sharding_of_environment

FSDP = {"distributed_type": "FSDP"}
ZERO = {"distributed_type": "DEEPSPEED"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cpu", Whole()), ("ddp", Whole()), ("fsdp2", Fsdp()), ("zero2", Zero(2)), ("zero3", Zero(3))],
)
def test_shipped_launchers(name: str, expected: object) -> None:
    assert sharding_of(launcher_settings(name)) == expected
    assert {path.stem for path in LAUNCHERS.glob("*.yaml")} == {"cpu", "ddp", "fsdp2", "zero2", "zero3"}


def test_settings_of_fsdp2() -> None:
    given = {"fsdp_version": 2, "reshard_after_forward": False, "fsdp_transformer_layer_cls_to_wrap": "Block, Other"}
    assert sharding_of({**FSDP, "fsdp_config": given}) == Fsdp(frozenset({"Block", "Other"}), False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Whole()),
        ({"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}, Whole()),
        (
            # as accelerate launch sets them where a configuration says no more than the version
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_OFFLOAD_PARAMS": "false",
                "FSDP_RESHARD_AFTER_FORWARD": "full_shard",
                "FSDP_ACTIVATION_CHECKPOINTING": "false",
            },
            Fsdp(),
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"},
            Fsdp(frozenset(), False),
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, Zero(3)),
    ],
)
def test_environments_of_the_launcher(environment: dict[str, str], expected: object) -> None:
    assert sharding_of_environment(environment) == expected


def test_a_deepspeed_file(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(
        json.dumps(
            {
                "zero_optimization": {
                    "stage": 3,
                    "stage3_param_persistence_threshold": 0,
                    "reduce_bucket_size": "auto",
                },
                "train_batch_size": "auto",
                "bf16": {"enabled": "auto"},
                "fp16": {"enabled": False},
            }
        )
    )
    expected = Zero(3, {"stage3_param_persistence_threshold": 0})
    assert sharding_of({**ZERO, "deepspeed_config": {"deepspeed_config_file": str(path)}}) == expected
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    assert sharding_of_environment(environment) == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({**FSDP, "fsdp_config": {"fsdp_sharding_strategy": "FULL_SHARD"}}, r"no fsdp_version: 2"),
        ({**FSDP, "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}}, r"host memory are not supported"),
        (
            {**FSDP, "fsdp_config": {"fsdp_version": 2, "fsdp_activation_checkpointing": True}},
            r"gradient_checkpointing",
        ),
        ({**FSDP, "fsdp_config": {"fsdp_version": 2, "fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}}, r"SIZE_BASED_WRAP"),
        ({**ZERO, "deepspeed_config": {"zero_stage": 0}}, r"zero_stage is 0.*use ddp"),
        ({**ZERO, "deepspeed_config": {"offload_optimizer_device": "cpu"}}, r"offload_optimizer_device is cpu"),
        (
            {**ZERO, "deepspeed_config": {"deepspeed_moe_layer_cls_names": "MoE"}},
            r"expert parallelism is not supported",
        ),
        ({**FSDP, "parallelism_config": {"parallelism_config_cp_size": 2}}, r"cp_size is 2: tensor, context, sequence"),
        ({"distributed_type": "MEGATRON_LM"}, r"MEGATRON_LM is not supported; use one of the launchers ddp"),
    ],
)
def test_what_the_loop_does_not_do_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(StageError, match=said):
        sharding_of(settings)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"optimizer": {"type": "Adam"}}, r"sets optimizer: the stage's `with` decides"),
        ({"gradient_clipping": 1.0, "fp16": {"enabled": True}}, r"sets gradient_clipping, fp16"),
        ({"sequence_parallel_size": 2}, r"sequence_parallel_size: not supported"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, r"offload_param: offloading"),
    ],
)
def test_deepspeed_files_that_decide_too_much(tmp_path: Path, written: dict[str, Any], said: str) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(written))
    with pytest.raises(StageError, match=said):
        sharding_of({**ZERO, "deepspeed_config": {"deepspeed_config_file": str(path)}})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    config = tmp_path / "zero.yaml"
    config.write_text(yaml.safe_dump({**ZERO, "deepspeed_config": {"deepspeed_config_file": "nowhere.json"}}))
    with pytest.raises(
        StageError, match=r"launch.config '.*zero.yaml': deepspeed_config_file .*nowhere.json cannot be"
    ):
        launcher_settings(str(config))
