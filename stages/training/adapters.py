"""LoRA and its relatives on a model: added fresh, read from an adapter's folder, merged, written."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from artifacts.errors import StageError
from stages.adapters import CONFIG, WEIGHTS, Base, read_adapter_config
from stages.names import nearest
from stages.seeds import derive
from stages.training.adapted_head import check_head_adapter
from stages.training.config import TrainingConfig
from stages.training.model_check import check_regular_files, check_weight_file
from stages.training.multimodal import freeze_beside_text
from stages.training.quantization import check_dora, is_quantized
from stages.training.trunk import is_multimodal, paths_of_text, text_parameters

_READ = {
    "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules",
    "modules_to_save", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
    "target_parameters",
}  # fmt: skip
"""Settings of peft's LoraConfig that decide what an adapter computes and that are understood here."""
_INDIFFERENT = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "megatron_core",
    "qalora_group_size", "runtime_config",
}  # fmt: skip
"""Settings without a part in it; all others must have their default."""


def add_adapters(model: Any, config: TrainingConfig) -> Any:
    """The model with fresh LoRA adapters where the configuration asks for them.

    Raises StageError for names that no module has, and for modules that cannot have one.
    """
    if config.lora_r is None:
        return model
    from peft import LoraConfig

    if config.use_dora and any(parameter.ndim == 3 for parameter in text_parameters(model)):
        raise StageError("use_dora: this model's experts are stacked weights, which DoRA does not take; use LoRA alone")
    targets = config.lora_target_modules
    if not isinstance(targets, str):
        _require_modules(model, "lora_target_modules", targets)
    _require_modules(model, "modules_to_save", config.modules_to_save, whole=True)
    if not isinstance(targets, str) and (both := set(targets) & set(config.modules_to_save)):
        raise StageError(f"{min(both)} is in lora_target_modules and in modules_to_save; name it in one of them")
    classifier = hasattr(model, "score")
    torch.manual_seed(derive(config.seed, "lora"))
    return _adapted(
        model,
        LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            target_modules=targets if isinstance(targets, str) else list(targets),
            modules_to_save=_paths_to_save(model, config.modules_to_save),
            exclude_modules=_beside_text(model),
            task_type="SEQ_CLS" if classifier else "CAUSAL_LM",
        ),
    )


def _beside_text(model: Any) -> str | None:
    """peft's pattern of the modules that get no adapter, which other parts of a multimodal model may name alike."""
    if not is_multimodal(model.config):
        return None
    inside = "|".join(rf"{re.escape(path)}(?:\..*)?" for path in paths_of_text(model))
    return rf"(?!(?:{inside})$).*"


def _modules_of_text(model: Any) -> dict[str, Any]:
    """The modules that may be trained, by their paths."""
    beside = _beside_text(model)
    return {path: one for path, one in model.named_modules() if beside is None or not re.fullmatch(beside, path)}


def _paths_to_save(model: Any, names: Sequence[str]) -> list[str] | None:
    """Of a multimodal model the paths in its language model: peft would take all that end so."""
    if is_multimodal(model.config):
        return [path for path in _modules_of_text(model) if path.endswith(tuple(names))] if names else None
    return list(names) or None


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
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = None if base is None else base.name
    values["revision"] = None if base is None else base.revision
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


def _require_modules(model: Any, field: str, names: Sequence[str], *, whole: bool = False) -> None:
    """peft looks for a module of every name, and is content with those that it finds."""
    modules = _modules_of_text(model)
    last = sorted({path.rpartition(".")[2] for path, module in modules.items() if not any(module.children())})
    for name in names:
        # peft's own rules, which differ
        found = [one for path, one in modules.items() if path.endswith(name if whole else f".{name}") or path == name]
        if not found:
            raise StageError(f"{field}: {type(model).__name__} has no module {name!r}{nearest(name, last)}")
        if whole and any(any(module.children()) for module in found):
            raise StageError(f"{field}: {name!r} is made of other modules; name those ({', '.join(last)})")
        if whole and any(map(is_quantized, found)):
            raise StageError(f"{field}: {name!r} is quantized, so it cannot be trained whole; give it an adapter")


def _strange(values: dict[str, Any], defaults: dict[str, Any]) -> str | None:
    """The first setting that is neither understood nor as if it were not there."""
    for name, value in sorted(values.items()):
        if name in _READ | _INDIFFERENT or value == defaults.get(name) or not value:
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
