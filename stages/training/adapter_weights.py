"""A LoRA adapter in training, for an engine that holds the base already and is sent the adapter alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from artifacts.errors import StageError
from stages.rollouts.adapter_settings import MOST_RANK
from stages.rollouts.engine import ServedAdapter
from stages.training.adapter_start import has_moved_base

_MERGED = "set rollouts.lora_sync to merged"


def adapter_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name in an adapter's folder, tensor) of what is trained in a model of peft's."""
    from peft.utils import get_peft_model_state_dict

    yield from get_peft_model_state_dict(model, save_embedding_layers=False).items()


def served_adapter(model: Any) -> ServedAdapter:
    """What an engine has to know of the adapter beside its weights.

    Raises StageError where there is none, and for what vLLM does not compute.
    """
    if not hasattr(model, "peft_config"):
        raise StageError(f"rollouts.lora_sync is adapter, but all of the model is trained; give lora_r, or {_MERGED}")
    (settings,) = model.peft_config.values()
    if has_moved_base(model):
        raise StageError(
            f"rollouts.lora_sync is adapter, but init_lora_weights has changed the weights below it; {_MERGED}"
        )
    modules = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name, _ in adapter_weights(model)})
    ranks = [settings.r, *(settings.rank_pattern or {}).values()]
    unknown = {
        "use_dora": settings.use_dora,
        "modules_to_save": settings.modules_to_save,
        "target_parameters": settings.target_parameters,
        "lora_bias": settings.lora_bias,
        "bias": settings.bias != "none",
        f"a rank above {MOST_RANK}": max(ranks) > MOST_RANK,
        "one on the head": "lm_head" in modules,  # it breaks where prompts are scored
    }
    for name, is_there in unknown.items():
        if is_there:
            raise StageError(f"rollouts.lora_sync is adapter, but vLLM does not know {name} of adapters; {_MERGED}")
    return ServedAdapter(
        rank=max(ranks),
        settings={
            "peft_type": "LORA",
            "r": settings.r,
            "lora_alpha": settings.lora_alpha,
            "use_rslora": settings.use_rslora,
            "rank_pattern": dict(settings.rank_pattern or {}),
            "alpha_pattern": dict(settings.alpha_pattern or {}),
            "target_modules": modules,
            "bias": "none",
        },
    )
