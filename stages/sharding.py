"""What an accelerate configuration asks for: the whole model in every process, or a way to shard it.

Read from the file before a stage is started, and once more from the environment that `accelerate launch` made of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from artifacts.errors import StageError

_DATA_PARALLEL = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_XPU", "MULTI_HPU", "MULTI_MUSA")
_OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
)
"""Parts of a DeepSpeed file that the stage's own configuration decides."""
_KEPT_GATHERED = ("false", "shard_grad_op", "no_shard", "no_reshard")
"""What accelerate takes for: layers stay gathered between forward and backward pass."""
_HARMLESS = ("zero_optimization", "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer")


@dataclass(frozen=True)
class Whole:
    """Every process holds the whole model; gradients are summed."""

    name: str = "replicated"


@dataclass(frozen=True)
class Fsdp:
    """torch's FSDP2: every process holds a slice of every parameter, of its gradient and of its optimizer state."""

    layer_names: frozenset[str] = frozenset()
    """Class names of the layers that are gathered one at a time; empty: as the model says."""
    reshard_after_forward: bool = True
    name: str = "fsdp2"


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's ZeRO: optimizer state (1), gradients too (2), parameters too (3) are shared out."""

    stage: int
    options: Mapping[str, Any] = field(default_factory=dict)
    """More of DeepSpeed's `zero_optimization`."""

    @property
    def name(self) -> str:
        """As a launcher is called."""
        return f"zero{self.stage}"


Sharding = Whole | Fsdp | Zero


def sharding_of(settings: Mapping[str, Any]) -> Sharding:
    """The way of an accelerate configuration. Raises StageError for what the training loop does not do."""
    for name, sizes in (settings.get("parallelism_config") or {}).items():
        if name.endswith("_size") and not name.removeprefix("parallelism_config_").startswith("dp") and int(sizes) > 1:
            raise StageError(
                f"parallelism_config.{name} is {sizes}: tensor, context, sequence and expert parallelism are not "
                "supported; shard the model with fsdp2, zero2 or zero3"
            )
    kind = str(settings["distributed_type"])
    if kind in _DATA_PARALLEL:
        return Whole()
    if kind == "FSDP":
        return _fsdp(settings.get("fsdp_config") or {})
    if kind == "DEEPSPEED":
        return _zero(settings.get("deepspeed_config") or {})
    raise StageError(f"distributed_type {kind} is not supported; use one of the launchers ddp, fsdp2, zero2, zero3")


def sharding_of_environment(environment: Mapping[str, str]) -> Sharding:
    """The same from the variables that `accelerate launch` sets."""
    settings: dict[str, Any] = {"distributed_type": "MULTI_GPU"}
    if _is_true(environment.get("ACCELERATE_USE_FSDP")):
        values = {name.lower(): value for name, value in environment.items() if name.startswith("FSDP_")}
        settings = {"distributed_type": "FSDP", "fsdp_config": values}
    elif _is_true(environment.get("ACCELERATE_USE_DEEPSPEED")):
        start = "ACCELERATE_DEEPSPEED_"
        values = {
            name.removeprefix(start).lower(): value for name, value in environment.items() if name.startswith(start)
        }
        values["deepspeed_config_file"] = values.pop("config_file", "none")
        settings = {"distributed_type": "DEEPSPEED", "deepspeed_config": values}
    parallel = {name.lower(): size for name, size in environment.items() if name.startswith("PARALLELISM_CONFIG_")}
    return sharding_of({**settings, "parallelism_config": parallel})


def _fsdp(written: Mapping[str, Any]) -> Fsdp:
    values = {name if name.startswith("fsdp_") else f"fsdp_{name}": value for name, value in written.items()}
    if str(values.get("fsdp_version", 1)) != "2":
        raise StageError(
            "fsdp_config has no fsdp_version: 2; the training loop shards by FSDP2 (`accelerate to-fsdp2` converts)"
        )
    if _is_true(values.get("fsdp_offload_params")):
        raise StageError("fsdp_offload_params: parameters kept in host memory are not supported; leave it out")
    if _is_true(values.get("fsdp_activation_checkpointing")):
        raise StageError("fsdp_activation_checkpointing: say gradient_checkpointing in the stage's `with` instead")
    names = str(values.get("fsdp_transformer_layer_cls_to_wrap") or "none")
    if str(values.get("fsdp_auto_wrap_policy")) == "SIZE_BASED_WRAP":
        raise StageError("fsdp_auto_wrap_policy: layers are gathered by their class; SIZE_BASED_WRAP is not supported")
    return Fsdp(
        frozenset() if names.lower() == "none" else frozenset(name.strip() for name in names.split(",")),
        reshard_after_forward=str(values.get("fsdp_reshard_after_forward", True)).lower() not in _KEPT_GATHERED,
    )


def _zero(values: Mapping[str, Any]) -> Zero:
    for name in ("offload_optimizer_device", "offload_param_device"):
        if _is_named(values.get(name)):
            raise StageError(f"deepspeed_config.{name} is {values[name]}: offloading is not supported; leave it out")
    if _is_named(values.get("deepspeed_moe_layer_cls_names", values.get("moe_layer_cls_names"))):
        raise StageError("deepspeed_moe_layer_cls_names: expert parallelism is not supported; leave it out")
    options: dict[str, Any] = {}
    if _is_named(path := values.get("deepspeed_config_file")):
        options = _zero_options(Path(str(path)))
    stage = int(options.pop("stage", values.get("zero_stage", 2)))
    if stage not in (1, 2, 3):
        raise StageError(f"zero_stage is {stage}; ZeRO shards from stage 1 to 3. Without sharding, use ddp")
    return Zero(stage, options)


def _zero_options(path: Path) -> dict[str, Any]:
    """`zero_optimization` of a DeepSpeed file, which may say nothing that the stage decides."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError(f"deepspeed_config_file {path} cannot be read: {error}") from error
    decided = [name for name in _OURS if written.get(name, "auto") != "auto" and _says_something(written[name])]
    if decided:
        raise StageError(
            f"{path} sets {', '.join(decided)}: the stage's `with` decides these; leave them out or 'auto'"
        )
    if unknown := sorted(set(written) - {*_OURS, *_HARMLESS}):
        raise StageError(f"{path}: {', '.join(unknown)}: not supported; only zero_optimization is taken from this file")
    options = {name: value for name, value in written.get("zero_optimization", {}).items() if value != "auto"}
    for name in ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param"):
        if name in options:
            raise StageError(f"{path}: zero_optimization.{name}: offloading is not supported; leave it out")
    return options


def _says_something(value: Any) -> bool:
    """A section that is off, or all "auto", leaves the decision to the stage."""
    if isinstance(value, dict):
        return any(item not in ("auto", False) for item in value.values())
    return True


def _is_named(value: Any) -> bool:
    return value is not None and str(value).lower() not in ("none", "", "false")


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes")
