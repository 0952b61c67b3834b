"""LoRA and its relatives on a model: added fresh, read from an adapter's folder, merged, written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from artifacts.errors import StageError
from stages.adapters import CONFIG, WEIGHTS, Base, read_adapter_config
from stages.seeds import derive
from stages.training.adapted_head import check_head_adapter
from stages.training.adapter_settings import MOVING
from stages.training.adapter_start import has_moved_base, keep_start, restated
from stages.training.adapter_targets import (
    beside_text,
    check_experts,
    check_olora,
    linear_names,
    paths_to_save,
    require_layers,
    require_modules,
    require_patterns,
)
from stages.training.config import TrainingConfig
from stages.training.model_check import check_regular_files, check_weight_file
from stages.training.multimodal import freeze_beside_text
from stages.training.quantization import check_dora

_READ = {
    "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules",
    "modules_to_save", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
    "target_parameters", "fan_in_fan_out",
}  # fmt: skip
"""Settings of peft's LoraConfig that decide what an adapter computes and that are understood here."""
_INDIFFERENT = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "megatron_core",
    "qalora_group_size", "runtime_config",
}  # fmt: skip
"""Settings without a part in it; all others must have their default."""
_LEAVE_THE_BASE = ("gaussian", "orthogonal", "eva")
"""Starts after which an adapter is of the weights as they came; after others it is of weights that are nowhere."""


def add_adapters(model: Any, config: TrainingConfig, shared: Callable[[Any], Any] = lambda adapted: adapted) -> Any:
    """The model with fresh LoRA adapters where the configuration asks for them. `shared`: makes them those of all
    processes (`SharedStart`).

    Raises StageError for names that no module has, and for modules that cannot have one.
    """
    if config.lora_r is None:
        return model
    from peft import LoraConfig

    check_experts(model, config)
    targets = _checked_targets(model, config)
    classifier = hasattr(model, "score")
    torch.manual_seed(derive(config.seed, "lora"))
    adapted = _adapted(
        model,
        LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            target_modules=targets if isinstance(targets, str) else list(targets),
            modules_to_save=paths_to_save(model, config.modules_to_save),
            exclude_modules=beside_text(model),
            layers_to_transform=None if config.layers_to_transform is None else list(config.layers_to_transform),
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=dict(config.alpha_pattern),
            init_lora_weights=True if config.init_lora_weights == "default" else config.init_lora_weights,  # type: ignore[arg-type]
            task_type="SEQ_CLS" if classifier else "CAUSAL_LM",
        ),
    )
    for field in ("rank_pattern", "alpha_pattern"):
        require_patterns(adapted, field, getattr(config, field))
    if config.init_lora_weights in MOVING:
        keep_start(adapted)
    return shared(adapted)


def _checked_targets(model: Any, config: TrainingConfig) -> Any:
    """What gets adapters: names, or peft's word for all of a kind. Raises StageError for what the model has not."""
    targets = config.lora_target_modules
    if config.layers_to_transform is not None:
        targets = linear_names(model) if isinstance(targets, str) else targets
    if not isinstance(targets, str):
        require_modules(model, "lora_target_modules", targets)
        if config.layers_to_transform is not None:
            require_layers(model, config.layers_to_transform, targets)
    if config.init_lora_weights == "olora":
        check_olora(model, targets)
    require_modules(model, "modules_to_save", config.modules_to_save, whole=True)
    if not isinstance(targets, str) and (both := set(targets) & set(config.modules_to_save)):
        raise StageError(f"{min(both)} is in lora_target_modules and in modules_to_save; name it in one of them")
    return targets


def load_adapter(model: Any, folder: Path, dropout: float = 0.0) -> Any:
    """The model with the adapter of a folder, which can be trained on; dropout is of the training, not of the adapter.

    Raises StageError for a folder that is no adapter of this model, and for kinds of adapters that are not supported.
    """
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    check_regular_files(folder, "adapter")
    values = read_adapter_config((folder / CONFIG).read_bytes(), f"adapter {folder.name}")
    defaults = LoraConfig().to_dict()
    if strange := _strange(values, defaults):
        raise StageError(
            f"adapter {folder.name}: {CONFIG} sets {strange} to {values[strange]!r}, which is not supported"
        )
    if not (folder / WEIGHTS).is_file():
        raise StageError(f"adapter {folder.name} has no {WEIGHTS}; only safetensors are read")
    check_weight_file(folder / WEIGHTS)
    settings = {name: value for name, value in values.items() if name in _READ - {"peft_type"}}
    adapted = _adapted(model, LoraConfig(**{**settings, "lora_dropout": dropout}))
    tensors = load_file(folder / WEIGHTS)
    _check_tensors(folder, get_peft_model_state_dict(adapted, save_embedding_layers=False), tensors)
    set_peft_model_state_dict(adapted, tensors)
    return adapted


def is_adapted(model: Any) -> bool:
    """Whether a model is wrapped by adapters."""
    return hasattr(model, "merge_and_unload")


def write_adapter(model: Any, folder: Path, base: Base | None) -> None:
    """In peft's format, the same bytes for the same adapter; with the name of its base instead of a path."""
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    if has_moved_base(model):
        restated(model, folder)
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = None if base is None else base.name
    values["revision"] = None if base is None else base.revision
    values["init_lora_weights"] = True  # from here on, where it started is no part of what it is
    for name in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(values.get(name), list):  # sets, in an order of chance
            values[name] = sorted(values[name])
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _adapted(model: Any, config: Any) -> Any:
    from peft import get_peft_model

    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output is not None and output.weight is embedding.weight
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise StageError(f"adapters cannot be put on {type(model).__name__}: {error}") from error
    if tied and (model.get_input_embeddings() is not embedding or model.get_output_embeddings() is not output):
        raise StageError(
            "embedding and head of this model are one weight, which an adapter on one of them, or a copy that is "
            "trained, would take apart; leave both out of lora_target_modules and modules_to_save"
        )
    if config.use_dora:
        check_dora(one.get_base_layer() for one in adapted.modules() if hasattr(one, "lora_magnitude_vector"))
    freeze_beside_text(model)  # an adapter that was trained on images reaches further
    if output is not None:
        check_head_adapter(model.get_output_embeddings())
    return adapted


def _strange(values: dict[str, Any], defaults: dict[str, Any]) -> str | None:
    """The first setting that is neither understood nor as if it were not there."""
    for name, value in sorted(values.items()):
        if name in _READ | _INDIFFERENT or value == defaults.get(name) or not value:
            continue
        if name == "init_lora_weights" and value in _LEAVE_THE_BASE:
            continue
        return name
    return None


def _check_tensors(folder: Path, expected: dict[str, Any], found: dict[str, Any]) -> None:
    for what, names in (("lacks", expected.keys() - found.keys()), ("has extra", found.keys() - expected.keys())):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise StageError(f"adapter {folder.name} {what} weights for this model: {shown}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise StageError(
                f"adapter {folder.name}: {name} has shape {tuple(tensor.shape)}, this model takes "
                f"{tuple(expected[name].shape)}: it is of another model"
            )
        if not bool(tensor.isfinite().all()):
            raise StageError(
                f"adapter {folder.name}: {int((~tensor.isfinite()).sum())} values of {name} are not finite"
            )
