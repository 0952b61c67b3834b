"""Which modules of a model get adapters, or are trained whole beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from artifacts.errors import StageError
from stages.names import nearest
from stages.training.config import TrainingConfig
from stages.training.quantization import is_quantized
from stages.training.trunk import is_multimodal, paths_of_text, text_parameters

_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")
"""How peft finds the number of a layer in a path."""


def check_experts(model: Any, config: TrainingConfig) -> None:
    """Experts are stacked weights, which get adapters in one way only."""
    plain = {
        "use_dora": config.use_dora,
        "layers_to_transform": config.layers_to_transform is not None,
        "rank_pattern": bool(config.rank_pattern),
        "alpha_pattern": bool(config.alpha_pattern),
        f"init_lora_weights {config.init_lora_weights}": config.init_lora_weights not in ("default", "gaussian"),
    }
    for name, is_given in plain.items():
        if is_given and any(parameter.ndim == 3 for parameter in text_parameters(model)):
            raise StageError(f"{name}: this model's experts are stacked weights, which do not take it; leave it out")


def require_layers(model: Any, numbers: Sequence[int], names: Sequence[str]) -> None:
    """`names` of modules with adapters are of those layers: peft gives none to one beside the layers, but one to that
    of a whole path, wherever it is."""
    count = model.config.get_text_config().num_hidden_layers
    if (most := max(numbers)) >= count:
        raise StageError(f"layers_to_transform: {type(model).__name__} has layers 0 to {count - 1}, found {most}")
    for name in names:
        found = _named(model, name)
        layers = {int(one[1]) if (one := _LAYER.match(path)) else None for path in found}
        if None in layers:
            wrong = "is beside the numbered layers"
        elif name in found:
            wrong = "is the whole path of one module"
        elif not layers & set(numbers):
            wrong = f"is in none of the layers {', '.join(map(str, numbers))}"
        else:
            continue
        raise StageError(
            f"layers_to_transform is given, but {name!r} in lora_target_modules {wrong}; leave one of the two out, or "
            "name modules of layers by the last part of their paths (q_proj)"
        )


def linear_names(model: Any) -> tuple[str, ...]:
    """What all-linear stands for in a model's layers, by the last part of their paths."""
    from transformers.pytorch_utils import Conv1D

    linear = [path for path, one in _modules_of_text(model).items() if isinstance(one, torch.nn.Linear | Conv1D)]
    return tuple(sorted({path.rpartition(".")[2] for path in linear if re.search(r"\.\d+\.", path)}))


def check_olora(model: Any, targets: Sequence[str] | str) -> None:
    """peft takes an olora's factors of the weight as it is kept, which Conv1D does as [I, O]."""
    from transformers.pytorch_utils import Conv1D

    paths = _modules_of_text(model) if isinstance(targets, str) else [p for one in targets for p in _named(model, one)]
    if turned := sorted({path.rpartition(".")[2] for path in paths if isinstance(model.get_submodule(path), Conv1D)}):
        raise StageError(
            f"init_lora_weights is olora, but {', '.join(turned)} of {type(model).__name__} keep their weights the "
            "other way round (Conv1D), from which peft takes wrong factors; take pissa"
        )


def require_patterns(adapted: Any, field: str, patterns: Mapping[str, float]) -> None:
    """peft leaves a pattern that fits nothing alone, and of several takes the first; but its files, and what a result
    is known by, have them in the order of the alphabet."""
    paths = [path.removeprefix("base_model.model.") for path, one in adapted.named_modules() if hasattr(one, "lora_A")]
    last = sorted({path.rpartition(".")[2] for path in paths})
    for pattern in patterns:
        if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):
            raise StageError(f"{field}: no module that has an adapter fits {pattern!r}{nearest(pattern, last)}")
    for path in paths:
        fitting = {pattern: value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)}
        if len(set(fitting.values())) > 1:
            given = " and ".join(f"{value} by {pattern!r}" for pattern, value in fitting.items())
            raise StageError(
                f"{field}: {path} is given {given}, and an adapter's file keeps no order of patterns; write them so "
                "that each module fits one"
            )


def require_modules(model: Any, field: str, names: Sequence[str], *, whole: bool = False) -> None:
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


def _named(model: Any, name: str) -> list[str]:
    """Paths of the modules that a name in target_modules means."""
    return [path for path in _modules_of_text(model) if path.endswith(f".{name}") or path == name]


def paths_to_save(model: Any, names: Sequence[str]) -> list[str] | None:
    """Of a multimodal model the paths in its language model: peft would take all that end so."""
    if is_multimodal(model.config):
        return [path for path in _modules_of_text(model) if path.endswith(tuple(names))] if names else None
    return list(names) or None


def _modules_of_text(model: Any) -> dict[str, Any]:
    """The modules that may be trained, by their paths."""
    beside = beside_text(model)
    return {path: one for path, one in model.named_modules() if beside is None or not re.fullmatch(beside, path)}


def beside_text(model: Any) -> str | None:
    """peft's pattern of the modules that get no adapter, which other parts of a multimodal model may name alike."""
    if not is_multimodal(model.config):
        return None
    inside = "|".join(rf"{re.escape(path)}(?:\..*)?" for path in paths_of_text(model))
    return rf"(?!(?:{inside})$).*"
