"""The weights of a model in training as a checkpoint without adapters would have them, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from artifacts.errors import StageError


@torch.no_grad()
def whole_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name in a checkpoint, tensor) of all weights of a transformers model.

    Adapters are merged into a copy of the layer that they are on, one layer at a time, so the model stays as it is bit
    by bit; where they are switched off, the layer is given without them. The head is always among them, also where it
    is the embedding: vLLM keeps a form of its own of it (packed for the CPU), which it would not renew otherwise.
    """
    from transformers.core_model_loading import revert_weight_conversion

    nothing: dict[str, Tensor] = {}
    if revert_weight_conversion(model, nothing) is nothing:  # checkpoints of this kind of model have its own names
        yield from _merged(model)
    else:
        yield from revert_weight_conversion(model, dict(_merged(model))).items()


def _merged(model: Any) -> Iterator[tuple[str, Tensor]]:
    adapted = dict(_adapted_modules(model))
    inside = tuple(f"{name}." for name in adapted)
    for name, tensor in model.state_dict().items():
        if not name.startswith(inside):
            yield name, tensor
    for name, module in adapted.items():
        for part, tensor in _without_adapter(name, module).state_dict().items():
            yield f"{name}.{part}", tensor.detach()


def _adapted_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """The outermost modules that peft has wrapped, by the names that they had before."""
    if not getattr(model, "peft_config", None) and not any("lora_" in name for name, _ in model.named_parameters()):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    last = ""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) and not (last and name.startswith(f"{last}.")):
            last = name
            yield name, module


def _without_adapter(name: str, module: Any) -> Any:
    """The module as it would be with what was learnt in it, or without, as the model is at the moment."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils import ModulesToSaveWrapper

    if module.disable_adapters:
        return module.original_module if isinstance(module, ModulesToSaveWrapper) else module.get_base_layer()
    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[module.active_adapters[0]]
    if isinstance(module, ParamWrapper):
        raise StageError(
            f"{name} has adapters on stacked weights (lora_target_modules names experts), which cannot be merged layer "
            "by layer; use rollouts.engine embedded"
        )
    merged = deepcopy(module)
    merged.merge()
    return merged.get_base_layer()
