"""Changes of an engine's settings that take less memory: of vLLM's share of a GPU, its cache, and its servers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from stages.identity import is_operational
from stages.rollouts.engine_settings import EngineConfig
from stages.training.memory_engine import takes_a_share
from stages.training.memory_request import Request

_SHARES = tuple(number / 10 for number in range(1, 10))
"""Of a GPU."""
_HALVINGS = 6
"""Of the cache, and doublings."""


def engine_changes(request: Request) -> Iterator[dict[str, EngineConfig]]:
    """Of every engine apart that the stage opens, from what costs least on. Nothing of the kind changes what a stage
    computes."""
    for name, settings in vars(request.config).items():
        if isinstance(settings, EngineConfig) and settings.is_apart and not settings.urls:
            for values in _changes(settings, request):
                yield {name: settings.model_copy(update=values)}


def _changes(settings: EngineConfig, request: Request) -> Iterator[dict[str, Any]]:
    sleep: dict[str, Any] = {}
    trains = "gradient_checkpointing" in type(request.config).model_fields
    if request.setup.device == "cuda" and settings.engine == "vllm" and trains and not settings.enable_sleep_mode:
        sleep = {"enable_sleep_mode": True}
        yield sleep
    sizes = list(_shares(settings) if takes_a_share(settings, request.setup) else _caches(settings))
    # each GPU's servers are their own: fewer of them free none of it
    fewer = [] if isinstance(settings.devices, tuple) else range(settings.servers - 1, 0, -1)
    yield from sizes
    yield from ({"servers": count} for count in fewer)
    least = {**sleep, **({"servers": 1} if fewer else {})}
    yield from ({**least, **size} for size in sizes if least)


def _shares(settings: EngineConfig) -> Iterator[dict[str, Any]]:
    """The nearest first."""
    now = settings.gpu_memory_utilization
    for share in sorted(_SHARES, key=lambda one: abs(one - now)):
        if share != now:
            yield {"gpu_memory_utilization": share}


def _caches(settings: EngineConfig) -> Iterator[dict[str, Any]]:
    """Half, or twice as large where the longest row needs it, and so on."""
    for factor in (2.0**power for power in range(1, _HALVINGS + 1)):
        yield {"kv_cache_gib": settings.kv_cache_gib / factor}
        yield {"kv_cache_gib": settings.kv_cache_gib * factor}


def differences(config: BaseModel, name: str, then: Any) -> Iterator[tuple[str, Any, Any, bool]]:
    """(field, value now, then, whether it is operational), of nested settings one by one: `rollouts.servers`."""
    now = getattr(config, name)
    if isinstance(now, BaseModel):
        for inner in type(now).model_fields:
            for found, *values in differences(now, inner, getattr(then, inner)):
                yield (f"{name}.{found}", *values)
    elif now != then:
        yield name, now, then, is_operational(type(config).model_fields[name])
